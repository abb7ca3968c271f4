"""Pictures as visitors send them: sound ones, damaged ones, and ones that lie about their size."""

import io
import struct
import zlib

import numpy as np
from PIL import Image


def content(picture, format="PNG", **options):
    """The bytes of a picture's file."""
    buffer = io.BytesIO()
    picture.save(buffer, format=format, **options)
    return buffer.getvalue()


def photo(size=(30, 20)):
    """A picture of noise."""
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def chunk(name, data):
    """A part of a PNG file."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_of(width, height, *chunks):
    """A PNG that says it has this size, with nearly nothing inside."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    rest = (*chunks, chunk(b"IDAT", zlib.compress(bytes(1000))), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(rest)


BAD_FILES = {
    "text": (b"hello", "cannot be read"),
    "half": (content(photo())[:200], "cannot be read"),
    "bomb": (png_of(100_000, 100_000), "cannot be read"),
    "wide": (png_of(5000, 5000), "5000x5000 pixels, expected at most 16,000,000"),
}
