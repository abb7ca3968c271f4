"""Visitors' files: small enough to unpack, and pictures."""

import io
import warnings

from PIL import Image

from marval.io.images import read_image

UPLOAD_BYTES = 5 * 2**20
JPEG_PIXELS = 25_000_000  # a JPEG is decoded at a part of its size
PIXELS = 4_000_000  # of other formats; or 16 times as many as the model's pictures have
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")


def read_upload(content: bytes, side: int) -> Image.Image:
    """Read a visitor's picture, upright, for a model whose pictures have `side` pixels a side.

    The header says its size: nothing that is too large is unpacked.

    Raises:
        ValueError: too large a file, too many pixels, not a picture, or an animation.
    """
    if len(content) > UPLOAD_BYTES:
        raise ValueError(f"this file has {len(content) / 2**20:.1f} MB: at most {UPLOAD_BYTES / 2**20:.0f} MB")
    unreadable = ValueError(
        "this file cannot be read as a picture: upload a PNG, JPEG or WebP of up to 25 million pixels"
    )
    try:
        with warnings.catch_warnings(action="ignore"):  # Pillow warns of what is refused below
            header = Image.open(io.BytesIO(content), formats=FORMATS)
    except Exception:  # a decoder may raise anything on damaged bytes, and of a bomb
        raise unreadable from None
    most = JPEG_PIXELS if header.format in ("JPEG", "MPO") else max(PIXELS, 16 * side**2)
    if header.width * header.height > most:
        size = f"{header.width}x{header.height}"
        raise ValueError(f"this picture has {size} pixels: expected at most {most // 1_000_000} million")
    try:
        picture = read_image(io.BytesIO(content), formats=FORMATS, most_pixels=most, draft=2 * side)
    except ValueError:
        raise unreadable from None
    if picture.info.get("animated"):
        raise ValueError("this is an animation: upload a still picture")
    return picture
