"""Images held in memory as bytes, and folders of images."""

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageOps
from torch import Tensor

from marval.imagenet import imagenet_classes
from marval.randomness import generator
from marval.spaces import TokenSpace

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


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
        stream: tuple[object, ...] = (),
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


def list_folder(root: Path) -> tuple[list[Path], list[tuple[Path, int]]]:
    """The class folders of a data set in alphabetical order, and every image file with its class's number.

    Raises:
        ValueError: no such folder, no images, or a class without any.
    """
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder: expected one with a sub-folder of images for each class")
    classes = sorted(path for path in root.iterdir() if path.is_dir())
    files = [
        (file, label)
        for label, path in enumerate(classes)
        for file in sorted(path.rglob("*"))
        if file.suffix.lower() in IMAGE_SUFFIXES
    ]
    if not files:
        raise ValueError(f"{root} holds no images: expected DIR/CLASS/IMAGE.png, one sub-folder for each class")
    filled = {label for _, label in files}
    missing = [path.name for label, path in enumerate(classes) if label not in filled]
    if missing:
        raise ValueError(f"{root}: no images in {', '.join(missing[:5])}; remove such folders or fill them")
    return classes, files


def load_folder(folder: Path | str, size: tuple[int, int] | None = None) -> ImageData:
    """Images in one sub-folder per class (the class's name), scaled to cover `size`, then cropped at the centre.

    The size is inferred when None: that of the images where all agree, else a square of the smallest side; cut
    down to a multiple of 4, at most 64. Images are grey when every file is.

    Raises:
        ValueError: no such folder, fewer than one class with images, or files that are not images.
    """
    classes, files = list_folder(Path(folder))
    pictures = [open_image(file) for file, _ in files]
    mode = "L" if all(picture.mode in ("1", "L", "I;16", "LA") for picture in pictures) else "RGB"
    size = size or _common_size([picture.size for picture in pictures])
    images = np.stack([np.asarray(ImageOps.fit(p.convert(mode), (size[1], size[0]))) for p in pictures])
    tensor = torch.from_numpy(images)
    tensor = tensor[:, None] if mode == "L" else tensor.permute(0, 3, 1, 2).contiguous()
    return ImageData(tensor, torch.tensor([label for _, label in files]), class_names(classes))


def class_names(folders: list[Path]) -> tuple[str, ...]:
    """The folders' names; ImageNet's readable names where they are WordNet ids."""
    return tuple(imagenet_classes().get(folder.name, folder.name) for folder in folders)


def open_image(file: Path) -> Image.Image:
    """A decoded image.

    Raises:
        ValueError: the file cannot be read as one.
    """
    try:
        picture = Image.open(file)
        picture.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file} cannot be read as an image ({error}): mend or remove it") from None
    return picture


def _common_size(sizes: list[tuple[int, int]]) -> tuple[int, int]:
    width, height = sizes[0] if len(set(sizes)) == 1 else (min(min(size) for size in sizes),) * 2
    rows, columns = (min(side, 64) // 4 * 4 for side in (height, width))
    if min(rows, columns) < 8:
        raise ValueError(f"the smallest image is {width}x{height}: expected at least 8 pixels a side")
    return rows, columns


def split_data(data: ImageData, seed: int, share: float = 0.1) -> tuple[ImageData, ImageData]:
    """A random split into (1 - share) and share of the images."""
    order = torch.randperm(len(data), generator=generator(seed, "split"))
    cut = len(data) - max(1, round(share * len(data)))
    first, second = order[:cut], order[cut:]
    return (
        ImageData(data.images[first], data.labels[first], data.class_names),
        ImageData(data.images[second], data.labels[second], data.class_names),
    )
