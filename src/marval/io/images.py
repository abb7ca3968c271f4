"""Pictures: files of any kind to 8-bit images, tensors to PNG files and labelled grids."""

import functools
import io
import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from marval.io.files import atomic_path

# Formats that Pillow knows by name only, that another program would read, or that are no pictures.
UNREADABLE = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "PDF", "WMF"}
SEVERAL = {"MPO", "PSD"}  # of these files the first picture is the whole one: the others are views or layers
GREY_MODES = {"1", "L", "LA", "La"}
DEEP_MODES = {"I;16", "I;16B", "I;16L", "I;16N"}
GREY_STEP = {"L;2": 85, "L;4": 17}  # levels of 255 between two values of a grey PNG of 2 and 4 bits
ORIENTATION = 0x0112  # the tag of EXIF


@functools.cache
def readable_formats() -> tuple[str, ...]:
    """The formats that `read_image` reads, by Pillow's names."""
    Image.init()
    return tuple(name for name in Image.OPEN if name not in UNREADABLE)


@functools.cache
def readable_suffixes() -> frozenset[str]:
    """The suffixes of files that `read_image` reads, in lower case with their dots."""
    known = {*readable_formats(), "MPO"}  # Pillow's JPEG plugin opens these
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in known)


def printable(name: str | os.PathLike[str]) -> str:
    """A file's name of any bytes as text for one line: bytes that are no UTF-8 and control characters are escaped."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(ascii(c)[1:-1] if unicodedata.category(c) in ("Cc", "Zl", "Zp") else c for c in text)


def read_image(
    source: Path | io.BytesIO | io.BufferedReader,
    *,
    most_pixels: int | None = None,
    formats: Sequence[str] | None = None,
    draft: int | None = None,
) -> Image.Image:
    """Read an image file as an upright 8-bit picture of mode "L" or "RGB", transparency over white.

    Whatever Pillow reads: 1 to 16 bits, palettes, CMYK, and floating-point numbers from 0 (black) to 1 (white). Of an
    animation the first frame is read, and the picture's `info` says "animated".

    Args:
        most_pixels: refuse larger pictures, by their header, before they are decoded.
        formats: Pillow's names of the formats to accept; `readable_formats()` when None.
        draft: pixels a side that are enough: a larger JPEG is decoded at 1/2, 1/4 or 1/8 of its size.

    Raises:
        ValueError: not an image, damaged, too large, or of numbers whose white is unknown.
    """
    try:
        with Image.open(source, formats=readable_formats() if formats is None else tuple(formats)) as picture:
            pixels = picture.width * picture.height
            if most_pixels is not None and pixels > most_pixels:
                raise ValueError(f"it has {picture.width}x{picture.height} pixels, expected at most {most_pixels:,}")
            if draft is not None:
                picture.draft(None, (draft, draft))
            raw = raw_mode(picture)
            picture.load()
            found = eight_bits(picture, raw)
            if (method := orientation(picture)) is not None:
                found = found.transpose(method)
            animated = getattr(picture, "is_animated", False) and picture.format not in SEVERAL
    except Exception as error:  # a decoder may raise anything on damaged bytes
        raise _unreadable(source, error) from None
    found.info = {"animated": True} if animated else {}
    return found


def image_size(source: Path) -> tuple[int, int]:
    """Width and height of an image file's upright picture, from its header.

    Raises:
        ValueError: not an image.
    """
    try:
        with Image.open(source, formats=readable_formats()) as picture:
            # Pillow turns a TIFF's size itself, and would decode a whole PNG to look for EXIF behind the pixels.
            known = picture.format != "TIFF" and (picture.format != "PNG" or "exif" in picture.info)
            return picture.size[::-1] if known and orientation(picture) in TURNED else picture.size
    except Exception as error:
        raise _unreadable(source, error) from None


def _unreadable(source: Path | io.BytesIO | io.BufferedReader, error: Exception) -> ValueError:
    name = printable(source) if isinstance(source, os.PathLike) else "this file"
    # Pillow names the object that it was given, too: an address in memory, or the path again.
    reason = "of no known format" if isinstance(error, Image.UnidentifiedImageError) else str(error)
    reason = reason.splitlines()[0] if reason else type(error).__name__
    return ValueError(f"{name} cannot be read as an image ({printable(reason)}): mend or remove it")


METHODS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
TURNED = {METHODS[i] for i in (5, 6, 7, 8)}


def orientation(picture: Image.Image) -> Image.Transpose | None:
    """What turns a picture upright, by its EXIF; None where that is damaged or says nothing."""
    try:
        return METHODS.get(picture.getexif().get(ORIENTATION, 1))
    except Exception:  # metadata of any kind must not cost the picture
        return None


def raw_mode(picture: Image.Image) -> str:
    """How the file itself stores a pixel, such as "L;4" or "RGB;16B"; known before the picture is loaded."""
    arguments: Any = picture.tile[0][3] if getattr(picture, "tile", None) else ""  # type: ignore[attr-defined]
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ""


def eight_bits(picture: Image.Image, raw: str) -> Image.Image:
    """A loaded picture in mode "L" or "RGB", over white where it is transparent.

    Raises:
        ValueError: numbers whose black and white are unknown.
    """
    grey = picture.mode in GREY_MODES or raw.startswith("LA")
    key = picture.info.get("transparency")
    if picture.mode in DEEP_MODES or picture.mode in ("I", "F"):
        values = np.asarray(picture)
        opaque = None if key is None else values != key
        found = Image.fromarray(levels(picture, values))
        return found if opaque is None else over_white(found, opaque)
    if key is not None and picture.mode in ("1", "L", "RGB"):  # one value that stands for "transparent"
        scaled = np.asarray(key) * GREY_STEP.get(raw, 1) // (256 if ";16" in raw else 1)
        found = picture.convert("L" if grey else "RGB")
        differs = np.asarray(found) != scaled
        return over_white(found, differs if grey else differs.any(axis=2))
    if picture.has_transparency_data:
        found = picture.convert("RGBA")
        found = Image.alpha_composite(Image.new("RGBA", found.size, "white"), found).convert("RGB")
    else:
        found = picture.convert("L" if grey else "RGB")
    if picture.mode in ("P", "PA"):  # grey where all of its colours are
        array = np.asarray(found)
        grey = bool((array == array[..., :1]).all())
    return found.convert("L") if grey else found


def levels(picture: Image.Image, values: np.ndarray) -> np.ndarray:
    """A picture's `values` of more than 8 bits as levels from 0 to 255.

    Raises:
        ValueError: 32-bit integers, whose white is unknown, or floating-point numbers outside [0, 1].
    """
    tags: Any = getattr(picture, "tag_v2", {})  # of a TIFF
    bits = tags.get(258, (16,))[0]  # BitsPerSample
    if picture.mode == "F":
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise ValueError(
                f"it holds floating-point numbers from {values.min():g} to {values.max():g}, expected 0 (black) to 1 "
                "(white); or save it with 8 or 16 bits"
            )
        white = 1.0
    elif picture.mode == "I" and picture.format not in ("PNG", "PPM"):  # these hold 16 bits
        raise ValueError(f"it holds {bits}-bit integers, whose white is unknown; save it with 8 or 16 bits")
    else:
        white = float(2 ** (bits if bits < 16 else 16) - 1)
    shares = values.astype(np.float32) / white
    if tags.get(262) == 0:  # PhotometricInterpretation: white is zero
        shares = 1 - shares
    return (shares.clip(0, 1) * 255).round().astype(np.uint8)


def over_white(picture: Image.Image, opaque: np.ndarray) -> Image.Image:
    """The picture where `opaque` is True, and white elsewhere."""
    white = Image.new(picture.mode, picture.size, "white")
    return Image.composite(picture, white, Image.fromarray(opaque))


def pixels(picture: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """A picture scaled to cover `size` (rows, columns), then cropped at the centre: bytes (channels, rows, columns)."""
    array = np.asarray(ImageOps.fit(picture, size[::-1]))
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def to_pil(image: Float[Tensor, "c h w"], scale: int = 1) -> Image.Image:
    """An image in [0, 1] (1 or 3 channels) as 8-bit PIL image, enlarged `scale` times without smoothing."""
    array = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    picture = Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def grid(
    rows: Sequence[Float[Tensor, "_ c h w"]],
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    title: str = "",
    scale: int = 3,
    gap: int = 4,
) -> Image.Image:
    """Rows of images, with a label before each row (it may have several lines), above each column, and a title."""
    cells = [[to_pil(image, scale) for image in row] for row in rows]
    width, height = cells[0][0].size
    font = ImageFont.load_default(13)
    columns = max(len(row) for row in cells)
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))

    def text_width(text: str) -> int:
        return int(max(measure.textlength(line, font=font) for line in text.split("\n"))) if text else 0

    left = max((text_width(label) for label in row_labels), default=0) + (16 if row_labels else gap)
    top = (26 if title else gap) + (20 if column_labels else 0)
    size = (max(left + columns * (width + gap), text_width(title) + 16), top + len(cells) * (height + gap))
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((8, 6), title, "black", font=font)
    for j, label in enumerate(column_labels):
        draw.text((left + j * (width + gap) + width / 2, top - 17), label, "black", font=font, anchor="ma")
    for i, row in enumerate(cells):
        y = top + i * (height + gap)
        if i < len(row_labels):
            draw.multiline_text((8, y + height / 2), row_labels[i], "black", font=font, anchor="lm")
        for j, cell in enumerate(row):
            canvas.paste(cell, (left + j * (width + gap), y))
    return canvas


def png_bytes(picture: Image.Image, text: dict[str, str] | None = None) -> bytes:
    """A PNG file's content, with `text` in its metadata (iTXt)."""
    notes, buffer = PngInfo(), io.BytesIO()
    for key, value in (text or {}).items():
        notes.add_itxt(key, value)
    picture.save(buffer, format="PNG", pnginfo=notes)
    return buffer.getvalue()


def save_picture(file: Path, picture: Image.Image, text: dict[str, str] | None = None) -> None:
    """Write a PNG with `text` in its metadata, whole or not at all.

    Raises:
        ValueError: the folder cannot be written to, or the disk is full.
    """
    with atomic_path(file) as partial:
        partial.write_bytes(png_bytes(picture, text))


def square_rows(images: Float[Tensor, "n c h w"]) -> list[Float[Tensor, "_ c h w"]]:
    """Images cut into the rows of a nearly square grid."""
    side = max(1, int(torch.tensor(len(images)).sqrt().ceil()))
    return list(images.split(side))
