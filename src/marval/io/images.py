"""Pictures: files of any kind to 8-bit images, tensors to PNG files and labelled grids."""

import functools
import io
import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import ExifTags, Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from marval.io.files import atomic_path

# Formats that Pillow knows by name only, that another program would read, or that are no pictures.
UNREADABLE = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "PDF", "WMF"}
SEVERAL = {"MPO", "PSD"}  # of these files the first picture is the whole one: the others are views or layers
GREY_MODES = {"1", "L", "LA", "La"}
DEEP_MODES = {"I;16", "I;16B", "I;16L", "I;16N", "I", "F"}
GREY_STEP = {"L;2": 85, "L;4": 17}  # levels of 255 between two values of a grey PNG of 2 and 4 bits
UPRIGHT = {  # by EXIF's orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip


@functools.cache
def readable_formats() -> tuple[str, ...]:
    """List the formats that `read_image` reads, by Pillow's names."""
    Image.init()
    return tuple(name for name in Image.OPEN if name not in UNREADABLE)


@functools.cache
def readable_suffixes() -> frozenset[str]:
    """List the suffixes of files that `read_image` reads, in lower case with their dots."""
    known = {*readable_formats(), "MPO"}  # Pillow's JPEG plugin opens these
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in known)


def printable(name: str | os.PathLike[str]) -> str:
    """Show a file's name of any bytes in one line: bytes that are no UTF-8 and control characters are escaped."""
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
            raw = _raw_mode(picture)
            picture.load()
            upright = _eight_bits(picture, raw)
            if (turn := UPRIGHT.get(_orientation(picture))) is not None:
                upright = upright.transpose(turn)
            animated = getattr(picture, "is_animated", False) and picture.format not in SEVERAL
    except Exception as error:  # a decoder may raise anything on damaged bytes
        raise _unreadable(source, error) from None
    upright.info = {"animated": True} if animated else {}
    return upright


def image_size(source: Path) -> tuple[int, int]:
    """Read width and height of an image file's upright picture from its header."""
    try:
        with Image.open(source, formats=readable_formats()) as picture:
            # Pillow turns a TIFF's size itself, and would decode a whole PNG to look for EXIF behind the pixels.
            known = picture.format != "TIFF" and (picture.format != "PNG" or "exif" in picture.info)
            return picture.size[::-1] if known and _orientation(picture) >= 5 else picture.size
    except Exception as error:
        raise _unreadable(source, error) from None


def _unreadable(source: Path | io.BytesIO | io.BufferedReader, error: Exception) -> ValueError:
    name = printable(source) if isinstance(source, os.PathLike) else "this file"
    # Pillow names the object that it was given, too: an address in memory, or the path again.
    reason = "of no known format" if isinstance(error, Image.UnidentifiedImageError) else str(error)
    reason = reason.splitlines()[0] if reason else type(error).__name__
    return ValueError(f"{name} cannot be read as an image ({printable(reason)}): mend or remove it")


def _orientation(picture: Image.Image) -> int:
    """Read EXIF's orientation, 1 to 8; 1, which is upright, where that is damaged or says nothing."""
    try:
        orientation = picture.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # metadata of any kind must not cost the picture
        return 1
    return orientation if orientation in UPRIGHT else 1


def _raw_mode(picture: Image.Image) -> str:
    """Tell how the file itself stores a pixel, such as "L;4" or "RGB;16B"; known before the picture is loaded."""
    arguments: Any = picture.tile[0][3] if getattr(picture, "tile", None) else ""  # type: ignore[attr-defined]
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ""


def _eight_bits(picture: Image.Image, raw: str) -> Image.Image:
    """Convert a loaded picture to mode "L" or "RGB", over white where it is transparent."""
    grey = picture.mode in GREY_MODES or raw.startswith("LA")
    key = picture.info.get("transparency")  # one value that stands for "transparent", or a palette's
    opaque = None
    if picture.mode in DEEP_MODES:
        values = np.asarray(picture)
        opaque = None if key is None else values != key
        result = Image.fromarray(_levels(picture, values))
    elif key is not None and picture.mode in ("1", "L", "RGB"):
        scaled = np.asarray(key) * GREY_STEP.get(raw, 1) // (256 if ";16" in raw else 1)
        result = picture.convert("L" if grey else "RGB")
        differs = np.asarray(result) != scaled
        opaque = differs if grey else differs.any(axis=2)
    elif picture.has_transparency_data:
        result = picture.convert("RGBA")
        result = Image.alpha_composite(Image.new("RGBA", result.size, "white"), result).convert("RGB")
    else:
        result = picture.convert("L" if grey else "RGB")
    if opaque is not None:
        return Image.composite(result, Image.new(result.mode, result.size, "white"), Image.fromarray(opaque))
    if picture.mode in ("P", "PA"):  # grey where all of its colours are
        colours = np.asarray(result)
        grey = bool((colours == colours[..., :1]).all())
    return result.convert("L") if grey else result


def _levels(picture: Image.Image, values: np.ndarray) -> np.ndarray:
    """Scale a picture's `values` of more than 8 bits to levels from 0 to 255."""
    tags: Any = getattr(picture, "tag_v2", {})  # of a TIFF
    bits = tags.get(ExifTags.Base.BitsPerSample, (16,))[0]
    white = 1.0 if picture.mode == "F" else float(2 ** min(bits, 16) - 1)
    if picture.mode == "F" and not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
        raise ValueError(
            f"it holds floating-point numbers from {values.min():g} to {values.max():g}, expected 0 (black) to 1 "
            "(white); or save it with 8 or 16 bits"
        )
    if picture.mode == "I" and picture.format not in ("PNG", "PPM"):  # these hold 16 bits
        raise ValueError(f"it holds {bits}-bit integers, whose white is unknown; save it with 8 or 16 bits")
    shares = values.astype(np.float32) / white
    if tags.get(ExifTags.Base.PhotometricInterpretation) == 0:  # white is zero
        shares = 1 - shares
    return (shares.clip(0, 1) * 255).round().astype(np.uint8)


def pixels(picture: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """Scale a picture to cover `size` (rows, columns) and crop it at the centre: bytes (channels, rows, columns)."""
    array = np.asarray(ImageOps.fit(picture, size[::-1]))
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """Crop a square as ADM does: halve (box filter) while twice too large, scale to `size` (bicubic), cut."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def to_pil(image: Float[Tensor, "c h w"], scale: int = 1) -> Image.Image:
    """Convert an image in [0, 1] (1 or 3 channels) to an 8-bit picture, enlarged `scale` times without smoothing."""
    array = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    picture = Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def grid(
    rows: Sequence[Float[Tensor, "_ c h w"]],
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    title: str = "",
    scale: int = 3,
) -> Image.Image:
    """Lay out rows of images, with a label before each row (of one or more lines), above each column, and a title."""
    gap = 4
    cells = [[to_pil(image, scale) for image in row] for row in rows]
    width, height = cells[0][0].size
    font = ImageFont.load_default(13)
    columns = max(len(row) for row in cells)

    def text_width(text: str) -> int:
        return int(max(font.getlength(line) for line in text.split("\n")))

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
    """Encode a PNG file, with `text` in its metadata (iTXt)."""
    notes, buffer = PngInfo(), io.BytesIO()
    for key, value in (text or {}).items():
        notes.add_itxt(key, value)
    picture.save(buffer, format="PNG", pnginfo=notes)
    return buffer.getvalue()


def save_picture(file: Path, picture: Image.Image, text: dict[str, str] | None = None) -> None:
    """Write a PNG with `text` in its metadata, whole or not at all."""
    with atomic_path(file) as partial:
        partial.write_bytes(png_bytes(picture, text))
