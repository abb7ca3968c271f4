"""Image data sets: Fashion-MNIST and folders of images, held in memory as bytes."""

import functools
import gzip
import hashlib
import os
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from marval.randomness import generator

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

    def batch(self, indices: Int[Tensor, " b"]) -> tuple[Float[Tensor, "b c h w"], Int[Tensor, " b"]]:
        """Images in [0, 1] and their labels."""
        return self.images[indices].float() / 255, self.labels[indices]


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
    """The folder that holds the four files; they are fetched into the user's cache where no copy is found.

    Raises:
        ValueError: no copy and no network, or a file with the wrong checksum.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "marval" / "fashion-mnist"
    for root in (FASHION_DEBIAN, cache):
        if all((root / name).is_file() for name in FASHION_MD5):
            return root
    cache.mkdir(parents=True, exist_ok=True)
    for name, checksum in FASHION_MD5.items():
        try:
            with urllib.request.urlopen(FASHION_URL + name, timeout=30) as response:
                content = response.read()
        except OSError as error:
            raise ValueError(
                f"Fashion-MNIST is not here and could not be fetched ({error}): install Debian's package "
                f"dataset-fashion-mnist, or put its four .gz files into {cache}"
            ) from error
        if hashlib.md5(content).hexdigest() != checksum:
            raise ValueError(f"{FASHION_URL}{name} arrived damaged (checksum differs): try again")
        partial = cache / (name + ".part")
        partial.write_bytes(content)
        partial.replace(cache / name)
    return cache


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
