"""Images held in memory as bytes."""

import functools
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from marval.runtime.rng import generator
from marval.spaces import TokenSpace


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
        """Images in [0, 1] and their labels."""
        return self.images[indices].float() / 255, self.labels[indices]

    def tokens(
        self,
        indices: Int[Tensor, " batch"],
        rows: slice,
        space: TokenSpace,
        device: torch.device,
        stream: tuple[int | str, ...] = (),
    ) -> tuple[Float[Tensor, "b l c"], Int[Tensor, " b"]]:
        """Tokens and labels of some rows of a batch, on the device. Nothing is random here: `stream` is not used."""
        images, labels = self.batch(indices[rows])
        return space.encode(images.to(device)), labels.to(device)


def batch_indices(count: int, batch_size: int, step: int, seed: int) -> Int[Tensor, " b"]:
    """The images of training step `step` (from 0): epochs are shuffled anew, and a batch may span two of them.

    A function of its arguments only, so that a resumed run sees what an uninterrupted one would have seen.
    """
    start = step * batch_size
    first, last = start // count, (start + batch_size - 1) // count
    epochs = torch.cat([_shuffled(count, seed, epoch) for epoch in range(first, last + 1)])
    return epochs[start - first * count :][:batch_size]


@functools.lru_cache(maxsize=4)
def _shuffled(count: int, seed: int, epoch: int) -> Int[Tensor, " n"]:
    return torch.randperm(count, generator=generator(seed, "epoch", epoch))


def split_data(data: ImageData, seed: int, share: float = 0.1) -> tuple[ImageData, ImageData]:
    """A random split into (1 - share) and share of each class's images; a class of one image is not split.

    Raises:
        ValueError: no class has two images.
    """
    order = torch.randperm(len(data), generator=generator(seed, "split"))
    by_class = order[data.labels[order].argsort(stable=True)].split(data.labels.bincount().tolist())
    held_out = [max(1, round(share * len(some))) if len(some) > 1 else 0 for some in by_class]
    if not any(held_out):
        raise ValueError(f"{len(data)} images of {len(by_class)} classes: none can be held out, add at least one")
    second = torch.cat([some[:count] for some, count in zip(by_class, held_out, strict=True)])
    first = torch.cat([some[count:] for some, count in zip(by_class, held_out, strict=True)])
    return (
        ImageData(data.images[first], data.labels[first], data.class_names),
        ImageData(data.images[second], data.labels[second], data.class_names),
    )
