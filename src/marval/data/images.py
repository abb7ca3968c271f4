"""Images held in memory as bytes, and the batches of a training."""

import functools
import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from marval.runtime.rng import generator
from marval.spaces import TokenSpace

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class ImageData:
    """Images of one size with a class each."""

    images: UInt8[Tensor, "n c h w"]
    labels: Int[Tensor, " n"]
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, rows and columns of an image."""
        _, channels, rows, columns = self.images.shape
        return channels, rows, columns

    def batch(self, indices: Int[Tensor, " b"]) -> tuple[Float[Tensor, "b c h w"], Int[Tensor, " b"]]:
        """Return images in [0, 1] and their labels."""
        return self.images[indices].float() / 255, self.labels[indices]

    def tokens(
        self,
        indices: Int[Tensor, " batch"],
        rows: slice,
        space: TokenSpace,
        device: torch.device,
        stream: tuple[int | str, ...] = (),
    ) -> tuple[Float[Tensor, "b l c"], Int[Tensor, " b"]]:
        """Return tokens and labels of some rows of a batch, on the device. Nothing is random: `stream` is not used."""
        images, labels = self.batch(indices[rows])
        return space.encode(images.to(device)), labels.to(device)


def batch_indices(count: int, batch_size: int, step: int, seed: int) -> Int[Tensor, " b"]:
    """Choose the images of training step `step` (from 0). Every epoch has its own order; a batch may span two epochs.

    The result depends on the arguments only, so a resumed run sees the batches of an uninterrupted one.
    """
    start = step * batch_size
    first, last = start // count, (start + batch_size - 1) // count
    epochs = torch.cat([_shuffled(count, seed, epoch) for epoch in range(first, last + 1)])
    return epochs[start - first * count :][:batch_size]


@functools.lru_cache(maxsize=4)
def _shuffled(count: int, seed: int, epoch: int) -> Int[Tensor, " n"]:
    return torch.randperm(count, generator=generator(seed, "epoch", epoch))


def split_data(data: ImageData, seed: int, share: float = 0.1) -> tuple[ImageData, ImageData]:
    """Split each class's images at random into (1 - share) and share; a class of one image is not split.

    Raises:
        ValueError: no class has two images.
    """
    order = torch.randperm(len(data), generator=generator(seed, "split"))
    by_class = order[data.labels[order].argsort(stable=True)].split(data.labels.bincount().tolist())
    cuts = [max(1, round(share * len(rows))) if len(rows) > 1 else 0 for rows in by_class]
    if not any(cuts):
        raise ValueError(f"{len(data)} images of {len(by_class)} classes: none can be held out, add at least one")
    first = torch.cat([rows[cut:] for rows, cut in zip(by_class, cuts, strict=True)])
    second = torch.cat([rows[:cut] for rows, cut in zip(by_class, cuts, strict=True)])
    train, held_out = (ImageData(data.images[rows], data.labels[rows], data.class_names) for rows in (first, second))
    return train, held_out


def in_threads(
    function: Callable[[Item], Result], items: Iterable[Item], ahead: int | None = None
) -> Iterator[Result | ValueError]:
    """Call `function` on every item in threads and yield the results in order; a ValueError counts as a result.

    Args:
        ahead: how many results may wait, so that large ones do not fill the memory.
    """
    threads = min(8, (os.cpu_count() or 1) + 1)
    waiting: deque[Future[Result]] = deque()
    rest = iter(items)
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in itertools.islice(rest, ahead or 4 * threads):
                waiting.append(pool.submit(function, item))
            while waiting:
                try:
                    yield waiting.popleft().result()
                except ValueError as error:
                    yield error
                waiting.extend(pool.submit(function, item) for item in itertools.islice(rest, 1))
        finally:
            pool.shutdown(cancel_futures=True)
