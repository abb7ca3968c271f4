"""Images held in memory as bytes, the batches of a training, and the sizes that people's images are given."""

import functools
import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped, UInt8
from torch import Tensor

from marval.data.captions import Captions
from marval.io.images import image_size
from marval.runtime.rng import generator
from marval.spaces import TokenSpace

SMALLEST, LARGEST = 8, 64  # pixels a side of an inferred size
SAMPLED = 5000  # images whose sizes are looked at
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class ImageData:
    """Images of one size with a class each, or with captions."""

    images: UInt8[Tensor, "n c h w"]
    labels: Int[Tensor, " n"]
    class_names: tuple[str, ...]
    captions: Captions | None = None  # then classes are the concepts that the captions are about

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

    def conditions(self, indices: Int[Tensor, " b"], keys: Int[Tensor, " b"]) -> Shaped[Tensor, "b *f"]:
        """Return what networks embed: the images' labels or, of each, one of its captions, drawn by its key."""
        return self.labels[indices] if self.captions is None else self.captions.draw(indices, keys)

    def read(self, indices: Int[Tensor, " b"], keys: Int[Tensor, " b"]) -> UInt8[Tensor, "b c h w"]:
        """Return images as they are stored; nothing is drawn, so `keys` are not used."""
        return self.images[indices]

    def tokens(
        self, stored: UInt8[Tensor, "b c h w"], keys: Int[Tensor, " b"], space: TokenSpace
    ) -> Float[Tensor, "b l d"]:
        """Return the tokens of what `read` gave."""
        return space.encode(stored.float() / 255)


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
    """Split each class's images at random into (1 - share) and share; a class of one image is not split."""
    order = torch.randperm(len(data), generator=generator(seed, "split"))
    by_class = order[data.labels[order].argsort(stable=True)].split(data.labels.bincount().tolist())
    cuts = [max(1, round(share * len(rows))) if len(rows) > 1 else 0 for rows in by_class]
    if not any(cuts):
        raise ValueError(f"{len(data)} images of {len(by_class)} classes: none can be held out, add at least one")
    first = torch.cat([rows[cut:] for rows, cut in zip(by_class, cuts, strict=True)])
    second = torch.cat([rows[:cut] for rows, cut in zip(by_class, cuts, strict=True)])
    train, held_out = (ImageData(data.images[rows], data.labels[rows], data.class_names) for rows in (first, second))
    return train, held_out


def in_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result | ValueError]:
    """Call `function` on every item in threads and yield the results in order; a ValueError counts as a result.

    Few results wait, so that large ones do not fill the memory.
    """
    threads, rest = min(8, (os.cpu_count() or 1) + 1), iter(items)
    with ThreadPoolExecutor(threads) as pool:
        try:
            waiting = deque(pool.submit(function, item) for item in itertools.islice(rest, 8 * threads))
            while waiting:
                try:
                    yield waiting.popleft().result()
                except ValueError as error:
                    yield error
                waiting.extend(pool.submit(function, item) for item in itertools.islice(rest, 1))
        finally:
            pool.shutdown(cancel_futures=True)


def infer_size(files: Sequence[str]) -> tuple[int, int]:
    """Choose rows and columns for images of any sizes, such that the small model can cut them into patches.

    The result has the images' shape where nine in ten agree within 3 %, and is square otherwise. It is no larger than
    nine in ten of the images, and 8 to 64 pixels a side.
    """
    headers = list(in_threads(lambda file: image_size(Path(file)), files[:: max(1, len(files) // SAMPLED)]))
    sizes = np.array([size for size in headers if not isinstance(size, ValueError)], float)
    if not len(sizes):
        raise next(size for size in headers if isinstance(size, ValueError))
    ratios = sizes[:, 0] / sizes[:, 1]  # width / height
    ratio = float(np.median(ratios))
    if np.mean(np.abs(ratios / ratio - 1) > 0.03) > 0.1:
        ratio = 1.0
    heights = np.minimum(sizes[:, 1], sizes[:, 0] / ratio)  # the largest that need no enlarging
    height = min(float(np.quantile(heights, 0.1, method="higher")), LARGEST, LARGEST / ratio)
    return cut_to_patches(round(height), round(height * ratio))


def cut_to_patches(height: int, width: int) -> tuple[int, int]:
    """Round a size down to rows and columns, at least 8, that `patch_size` can cut."""
    patch = max(4, -(-max(height, width) // 8))
    rows, columns = (max(-(-SMALLEST // patch), side // patch) * patch for side in (height, width))
    return rows, columns


def patch_size(rows: int, columns: int) -> int:
    """Choose the small model's patch: the smallest, from 4 pixels, that leaves at most 8 tokens a side."""
    least = max(4, -(-max(rows, columns) // 8))
    for patch in range(least, 2 * least):
        if rows % patch == columns % patch == 0:
            return patch
    near = cut_to_patches(*(side + (least + 1) // 2 for side in (rows, columns)))
    raise ValueError(
        f"images of {columns}x{rows} pixels cannot be cut into patches of {least} to {2 * least - 1} pixels: "
        f"expected a --size such as {near[1]}x{near[0]}"
    )


def parse_size(text: str) -> tuple[int, int]:
    """Read rows and columns from "32" or "WIDTHxHEIGHT"."""
    parts = text.lower().split("x")
    if not (1 <= len(parts) <= 2 and all(part.isascii() and part.isdigit() for part in parts)):
        raise ValueError(f"--size {text}: expected a number of pixels such as 32, or WIDTHxHEIGHT such as 48x24")
    columns, rows = int(parts[0]), int(parts[-1])
    if not all(SMALLEST <= side <= 1024 for side in (rows, columns)):
        raise ValueError(f"--size {text}: expected {SMALLEST} to 1024 pixels a side")
    patch_size(rows, columns)
    return rows, columns
