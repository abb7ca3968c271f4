"""Fashion-MNIST (Xiao et al. 2017, MIT licence): found or fetched, recognised by its content; a part of it ships."""

import contextlib
import gzip
import hashlib
import io
import os
import sys
import urllib.request
import zlib
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from marval.data.images import ImageData
from marval.io.files import asset, atomic_path, cache_folder, user_cache

FASHION_CLASSES = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
FASHION_FORM = ImageData(torch.empty(0, 1, 28, 28, dtype=torch.uint8), torch.empty(0).long(), FASHION_CLASSES)
"""An empty Fashion-MNIST, to check a model against before any image is read."""
SHA256 = {  # of the unpacked files: packages and mirrors compress them anew
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
URLS = (
    "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",  # the host offers no https
)
MOST_BYTES = 2**26  # read of a file: more than the largest has
TIMEOUT = 15  # seconds that a host may be silent


def load_fashion_mnist(split: str = "train", folder: Path | str | None = None, *, fetch: bool = True) -> ImageData:
    """Load the 60,000 training or 10,000 test images of 28x28 pixels.

    Args:
        split: "train" or "test".
        folder: where the files are, as `.gz` or unpacked. When None: where Debian's package puts them, the cache, or
            the network, from which they are fetched into the cache.
        fetch: whether the network may be asked.

    Raises:
        ValueError: no place has the files. The message says what is wrong with each.
    """
    prefix = {"train": "train", "test": "t10k"}[split]
    images, labels = (
        torch.tensor(np.frombuffer(_find_file(f"{prefix}-{name}-ubyte", folder, fetch), np.uint8, offset=header))
        for name, header in (("images-idx3", 16), ("labels-idx1", 8))
    )
    return ImageData(images.view(-1, 1, 28, 28), labels.long(), FASHION_CLASSES)


def load_fashion_sample() -> ImageData:
    """Load the first 200 training images of each class, which ship with the package as one picture."""
    with Image.open(asset("fashion-mnist-2000.png")) as sheet:
        pixels = torch.from_numpy(np.array(sheet))
    images = pixels.reshape(40, 28, 50, 28).transpose(1, 2).reshape(2000, 1, 28, 28)
    labels = torch.arange(10).repeat_interleave(200)  # four rows of 50 for each class
    return ImageData(images, labels, FASHION_CLASSES)


def _find_file(name: str, folder: Path | str | None, fetch: bool) -> bytes:
    """Read one file of Fashion-MNIST, unpacked, from the first place that has it with the right content."""
    cache, problems = cache_folder() / "fashion-mnist", []
    for place in _places(name, cache, folder, fetch):
        try:
            packed, content = _read(name, place)
        except (OSError, EOFError, zlib.error, HTTPException, ValueError) as error:
            reason = getattr(error, "strerror", None) or getattr(error, "reason", None) or error
            problems.append(f"{place}: {reason}")
            continue
        if isinstance(place, str):
            with contextlib.suppress(ValueError), atomic_path(cache / f"{name}.gz") as partial:
                partial.write_bytes(packed)  # where that fails it is fetched again the next time
        return content
    where = f"put {name}.gz there" if folder is not None else f"put its four .gz files into {cache}"
    raise ValueError(
        f"cannot find Fashion-MNIST's {name} ({'; '.join(problems)}): "
        f"install Debian's package dataset-fashion-mnist, or {where}"
    )


def _places(name: str, cache: Path, folder: Path | str | None, fetch: bool) -> Iterator[Path | str]:
    """The files to try (a folder stands for the file that it lacks), then the addresses."""
    shared = (os.environ.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share").split(":")
    folders = [Path(root) / "datasets" / "fashion-mnist" for root in shared if root]
    if user := user_cache():  # it may hold the files though nothing can be added: then `cache` is another one
        folders.append(user / "fashion-mnist")
    for root in [Path(folder)] if folder is not None else dict.fromkeys([*folders, cache]):
        yield from [file for file in (root / f"{name}.gz", root / name) if os.path.isfile(file)] or [root]
    if folder is None and fetch:
        yield from (f"{url}{name}.gz" for url in URLS)


def _read(name: str, place: Path | str) -> tuple[bytes, bytes]:
    """Read a file, as it is packed and unpacked, and compare its SHA-256 with the one expected."""
    if isinstance(place, Path) and place.is_dir():
        raise ValueError("no such file in it")
    with place.open("rb") if isinstance(place, Path) else urllib.request.urlopen(place, timeout=TIMEOUT) as source:
        if isinstance(place, str):
            print(f"Fetching {place}", file=sys.stderr, flush=True)
        packed = source.read(MOST_BYTES)
    zipped = packed.startswith(b"\x1f\x8b")
    content = gzip.GzipFile(fileobj=io.BytesIO(packed)).read(MOST_BYTES) if zipped else packed
    if (digest := hashlib.sha256(content).hexdigest()) != SHA256[name]:
        if content.lstrip()[:1] == b"<":
            raise ValueError("a web page in its place; does this network ask for a login?")
        raise ValueError(f"damaged: {len(content):,} bytes of SHA-256 {digest[:12]}..., not {SHA256[name][:12]}...")
    return packed, content
