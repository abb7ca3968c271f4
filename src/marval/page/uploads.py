"""Visitors' files: how they are read, one at a time, and how long they stay on the disk."""

import contextlib
import io
import os
import threading
import warnings
from pathlib import Path

from PIL import Image

from marval.io.images import read_image

UPLOAD_BYTES = 5 * 2**20
UPLOAD_PIXELS = 25_000_000  # of a JPEG, which is decoded at a part of its size
DECODED_PIXELS = 4_000_000  # or 16 times as many as the model's pictures have
UPLOAD_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
DECODER = threading.Lock()  # one upload is unpacked at a time, however many visitors there are
UPLOADED_BYTES = 100 * 2**20  # on the disk; a file is removed when it was read, and after five minutes
UPLOADED_FILES = 500


def read_upload(content: bytes, side: int) -> Image.Image:
    """A visitor's picture from a file's content, upright, for a model whose pictures have `side` pixels a side.

    Its size is known from the header: nothing that is too large is unpacked.

    Raises:
        ValueError: too large a file, not an image, an animation, or too many pixels to unpack.
    """
    if len(content) > UPLOAD_BYTES:
        raise ValueError(f"this file has {len(content) / 2**20:.1f} MB: at most {UPLOAD_BYTES / 2**20:.0f} MB")
    try:
        with warnings.catch_warnings(action="ignore"):  # Pillow warns of what is refused below
            header = Image.open(io.BytesIO(content), formats=UPLOAD_FORMATS)
    except Image.DecompressionBombError:
        raise ValueError(f"this picture has too many pixels: at most {UPLOAD_PIXELS // 1_000_000} million") from None
    except Exception:  # a decoder may raise anything on damaged bytes
        raise ValueError("this file cannot be read as a picture: upload a PNG, JPEG or WebP") from None
    most = UPLOAD_PIXELS if header.format in ("JPEG", "MPO") else max(DECODED_PIXELS, 16 * side**2)
    if header.width * header.height > most:
        raise ValueError(
            f"this picture has {header.width}x{header.height} pixels: expected at most {most // 1_000_000} million"
        )
    try:
        found = read_image(io.BytesIO(content), formats=UPLOAD_FORMATS, most_pixels=most, draft=2 * side)
    except ValueError:
        raise ValueError("this file cannot be read as a picture: upload a PNG, JPEG or WebP") from None
    if found.info.get("animated"):
        raise ValueError("this is an animation: upload a still picture")
    return found


def room_for_uploads(folder: Path) -> bool:
    """Whether the visitors' files leave room for one more."""
    sizes = []
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # it was removed meanwhile
                sizes.append(os.stat(os.path.join(place, name)).st_size)
    return len(sizes) < UPLOADED_FILES and sum(sizes) < UPLOADED_BYTES


def remove_upload(folder: Path, path: str) -> None:
    """Remove a file in the visitors' folder, and the folder that gradio made for it alone; no other file."""
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        file = Path(path).resolve()
        if file.is_relative_to(folder.resolve()):
            file.unlink()
            file.parent.rmdir()
