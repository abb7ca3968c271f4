"""Pictures: tensors to PNG files and labelled grids."""

import io
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from marval.io.files import atomic_path


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


def save_animation(file: Path, frames: Sequence[Image.Image], milliseconds: Sequence[int]) -> None:
    """Write a GIF that shows each frame for its time and starts again, whole or not at all.

    Raises:
        ValueError: as `save_picture`.
    """
    with atomic_path(file) as partial:
        frames[0].save(
            partial, format="GIF", save_all=True, append_images=frames[1:], duration=list(milliseconds), loop=0
        )


def square_rows(images: Float[Tensor, "n c h w"]) -> list[Float[Tensor, "_ c h w"]]:
    """Images cut into the rows of a nearly square grid."""
    side = max(1, int(torch.tensor(len(images)).sqrt().ceil()))
    return list(images.split(side))
