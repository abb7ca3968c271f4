"""Fashion-MNIST (Xiao et al. 2017, MIT licence): found or fetched, recognised by its content; a part of it ships."""

import contextlib
import gzip
import hashlib
import sys
import urllib.request
import zlib
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from marval.data.images import ImageData
from marval.io.files import asset, atomic_path, cache_folder

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
PACKAGE = Path("/usr/share/datasets/fashion-mnist")  # Debian's dataset-fashion-mnist
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
    cache = cache_folder() / "fashion-mnist"
    folders = [PACKAGE, cache] if folder is None else [Path(folder)]
    files = [root / f"{name}{suffix}" for root in folders for suffix in (".gz", "")]
    urls = [f"{url}{name}.gz" for url in URLS] if folder is None and fetch else []
    problems = [f"no such file in {' or '.join(map(str, folders))}"]
    places: list[Path | str] = [*(file for file in files if file.is_file()), *urls]
    for place in places:
        try:
            packed = place.read_bytes() if isinstance(place, Path) else _fetched(place)
            content = gzip.decompress(packed) if packed.startswith(b"\x1f\x8b") else packed
        except (OSError, EOFError, zlib.error, HTTPException) as error:
            problems.append(f"{place}: {error}")
            continue
        if (digest := hashlib.sha256(content).hexdigest()) == SHA256[name]:
            if isinstance(place, str):
                with contextlib.suppress(ValueError), atomic_path(cache / f"{name}.gz") as partial:
                    partial.write_bytes(packed)  # where that fails it is fetched again the next time
            return content
        problems.append(f"{place}: {len(content):,} other bytes (SHA-256 {digest[:12]}..., not {SHA256[name][:12]}...)")
    raise ValueError(
        f"cannot find Fashion-MNIST's {name} ({'; '.join(problems[1:] or problems)}): install Debian's package "
        f"dataset-fashion-mnist, or put its four .gz files into {folder or cache}"
    )


def _fetched(url: str) -> bytes:
    print(f"Fetching {url}", file=sys.stderr, flush=True)
    with urllib.request.urlopen(url, timeout=TIMEOUT) as source:
        return source.read()
