"""Pictures: files of any kind to 8-bit images, tensors to PNG files and labelled grids."""

import contextlib
import functools
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import ExifTags, Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from marval.io.files import atomic_path, one_line

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA", "ICO")  # names of Pillow's


@functools.cache
def readable_suffixes() -> frozenset[str]:
    """List the suffixes of files that `read_image` reads, in lower case with their dots."""
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in (*FORMATS, "MPO"))


def printable(name: str | os.PathLike[str]) -> str:
    """Show a file's name of any bytes: those that are no UTF-8 are escaped."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def read_image(
    source: Path | io.BytesIO,
    *,
    most_pixels: int | None = None,
    formats: tuple[str, ...] = FORMATS,
    draft: int | None = None,
) -> Image.Image:
    """Read an image file as an upright 8-bit picture of mode "L" or "RGB", transparency over white.

    Args:
        most_pixels: refuse larger pictures, by their header, before they are decoded.
        formats: Pillow's names of the formats to accept.
        draft: pixels a side that are enough: a larger JPEG is decoded at 1/2, 1/4 or 1/8 of its size.

    Raises:
        ValueError: not an image, damaged, too large, or of numbers whose white is unknown.
    """
    with _one_error(source), Image.open(source, formats=formats) as picture:
        pixels = picture.width * picture.height
        if most_pixels is not None and pixels > most_pixels:
            raise ValueError(f"it has {picture.width}x{picture.height} pixels, expected at most {most_pixels:,}")
        if draft is not None:
            picture.draft(None, (draft, draft))
        picture.load()
        with contextlib.suppress(Exception):  # damaged metadata must not cost the picture
            ImageOps.exif_transpose(picture, in_place=True)
        upright = _eight_bits(picture)
        upright.info = {}
        return upright


def image_size(source: Path) -> tuple[int, int]:
    """Read width and height of an image file's upright picture from its header."""
    with _one_error(source), Image.open(source, formats=FORMATS) as picture:
        camera = picture.format in ("JPEG", "MPO")  # others are seldom turned; a PNG would be decoded for the answer
        return (
            picture.size[::-1] if camera and picture.getexif().get(ExifTags.Base.Orientation, 1) >= 5 else picture.size
        )


@contextlib.contextmanager
def _one_error(source: Path | io.BytesIO) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a decoder may raise anything on damaged bytes
        name = printable(source) if isinstance(source, os.PathLike) else "this file"
        # Pillow names the object that it was given, too: an address in memory, or the path again.
        reason = "of no known format" if isinstance(error, Image.UnidentifiedImageError) else one_line(error)
        raise ValueError(f"{name} cannot be read as an image ({reason}): mend or remove it") from None


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Convert a loaded picture to mode "L" or "RGB", over white where it is transparent."""
    if picture.mode == "F" or (picture.mode == "I" and picture.format not in ("PNG", "PPM")):  # these hold 16 bits
        raise ValueError("it holds numbers whose white is unknown; save it with 8 or 16 bits")
    if picture.mode.startswith("I"):
        return Image.fromarray((np.asarray(picture) / 257).round().astype(np.uint8))
    grey = picture.mode in ("1", "L", "LA", "La")
    if picture.has_transparency_data:
        colours = picture.convert("RGBA")
        result = Image.alpha_composite(Image.new("RGBA", colours.size, "white"), colours).convert("RGB")
    else:
        result = picture.convert("L" if grey else "RGB")
    if picture.mode in ("P", "PA"):  # grey where all of its colours are
        channels = np.asarray(result)
        grey = bool((channels == channels[..., :1]).all())
    return result.convert("L") if grey else result


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
