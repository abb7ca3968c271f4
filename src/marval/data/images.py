"""Images held in memory as bytes: Fashion-MNIST and folders of images."""

import functools
import gzip
import hashlib
import os
import subprocess
import tempfile
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageOps
from torch import Tensor

from marval.imagenet import imagenet_classes
from marval.io.files import atomic_path
from marval.randomness import generator
from marval.spaces import TokenSpace

FASHION_CLASSES = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
FASHION_DEBIAN = Path("/usr/share/datasets/fashion-mnist")
FASHION_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
FASHION_MD5 = {  # as published in the data set's own README
    "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
}
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


FASHION_FORM = ImageData(torch.empty(0, 1, 28, 28, dtype=torch.uint8), torch.empty(0).long(), FASHION_CLASSES)
"""No images of Fashion-MNIST: what does not fit these fits none."""


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


def load_folder(
    folder: Path | str, size: tuple[int, int] | None = None, *, limit: int | None = None, seed: int = 0
) -> ImageData:
    """Images in one sub-folder per class (the class's name), scaled to cover `size`, then cropped at the centre.

    The size is inferred when None: that of the images where all agree, else a square of the smallest side; cut
    down to a multiple of 4, at most 64. Images are grey when every file is.

    Args:
        limit: read so many images only, chosen by `seed`: as many of each class as there are.

    Raises:
        ValueError: no such folder, fewer than one class with images, or files that are not images.
    """
    classes, files = list_folder(Path(folder))
    if limit is not None and limit < len(files):
        files = balanced(files, limit, seed)
    pictures = [open_image(file) for file, _ in files]
    mode = "L" if all(picture.mode in ("1", "L", "I;16", "LA") for picture in pictures) else "RGB"
    size = size or _common_size([picture.size for picture in pictures])
    images = np.stack([np.asarray(ImageOps.fit(p.convert(mode), (size[1], size[0]))) for p in pictures])
    tensor = torch.from_numpy(images)
    tensor = tensor[:, None] if mode == "L" else tensor.permute(0, 3, 1, 2).contiguous()
    return ImageData(tensor, torch.tensor([label for _, label in files]), class_names(classes))


def balanced(files: list[tuple[Path, int]], limit: int, seed: int) -> list[tuple[Path, int]]:
    """`limit` of the files, from all classes alike, in their order."""
    turns, seen = list[tuple[int, int]](), dict[int, int]()
    for i in torch.randperm(len(files), generator=generator(seed, "limit")).tolist():
        turn = seen[files[i][1]] = seen.get(files[i][1], 0) + 1
        turns.append((turn, i))
    return [files[i] for i in sorted(i for _, i in sorted(turns)[:limit])]


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


def load_fashion_mnist(split: str = "train", folder: Path | str | None = None) -> ImageData:
    """Fashion-MNIST (Xiao et al. 2017, MIT licence): 60,000 training or 10,000 test images of 28x28 pixels.

    Args:
        split: "train" or "test".
        folder: where the four `.gz` files lie; the Debian package's folder or the cache when None.

    Raises:
        ValueError: the files are not there and cannot be fetched, or are damaged.
    """
    prefix = {"train": "train", "test": "t10k"}[split]
    root = Path(folder) if folder is not None else fashion_mnist_folder()
    images = _read_idx(root / f"{prefix}-images-idx3-ubyte.gz")
    labels = _read_idx(root / f"{prefix}-labels-idx1-ubyte.gz")
    return ImageData(images[:, None], labels.long(), FASHION_CLASSES)


def fashion_mnist_folder() -> Path:
    """The folder that holds the four files; where no copy is found they are fetched into the user's cache.

    The network's copy is asked first, then Debian's package (unpacked without root).

    Raises:
        ValueError: no copy is to be had, or one with the wrong checksum.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "marval" / "fashion-mnist"
    for root in (FASHION_DEBIAN, cache):
        if all((root / name).is_file() for name in FASHION_MD5):
            return root
    try:
        contents = {name: _fetch(FASHION_URL + name) for name in FASHION_MD5}
    except OSError as error:
        contents = _from_debian_package()
        if not contents:
            raise ValueError(
                f"Fashion-MNIST is not here and could not be fetched ({error}): install Debian's package "
                f"dataset-fashion-mnist, or put its four .gz files into {cache}"
            ) from error
    for name, content in contents.items():
        if hashlib.md5(content).hexdigest() != FASHION_MD5[name]:
            raise ValueError(f"{name} of Fashion-MNIST arrived damaged (checksum differs): try again")
        with atomic_path(cache / name) as partial:
            partial.write_bytes(content)
    return cache


def _fetch(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=30) as response:
        return response.read()


def _from_debian_package() -> dict[str, bytes]:
    """The files out of Debian's package, where apt can fetch it; else nothing."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            for command in ("apt-get download dataset-fashion-mnist", "dpkg-deb -x dataset-fashion-mnist*.deb ."):
                subprocess.run(command, shell=True, cwd=folder, check=True, capture_output=True, timeout=300)
        except (OSError, subprocess.SubprocessError):
            return {}
        root = Path(folder) / FASHION_DEBIAN.relative_to("/")
        return {name: (root / name).read_bytes() for name in FASHION_MD5}


def _read_idx(path: Path) -> UInt8[Tensor, "n *rest"]:
    """One IDX file: two zero bytes, type 8 (bytes), number of dimensions, sizes in big-endian, then the bytes."""
    try:
        content = gzip.decompress(path.read_bytes())
        dimensions = content[3]
        shape = np.frombuffer(content, ">u4", dimensions, 4).astype(int)
        array = np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: expected the four .gz files of Fashion-MNIST there") from None
    except (OSError, EOFError, ValueError, IndexError) as error:
        raise ValueError(f"{path} is damaged ({error}): fetch it again") from None
    return torch.from_numpy(array.copy())
