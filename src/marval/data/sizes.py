"""Sizes of people's own images: inferred for a set, said by `--size`, and cut into the small model's patches."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from marval.data.reading import in_threads
from marval.io.images import image_size

SMALLEST, LARGEST = 8, 64  # pixels a side of an inferred size
SIZED = 5000  # images whose sizes are looked at


def infer_size(files: Sequence[str]) -> tuple[int, int]:
    """Rows and columns for a set of images of any sizes, which the small model can cut into patches.

    Of their shape where they agree (within 3 %), else square; no larger than they are, at most 64 pixels a side, at
    least 8. One in ten (of three or more) may be odd: it is enlarged or cropped, and changes nothing for the others.

    Raises:
        ValueError: none of them can be read.
    """
    step = max(1, len(files) // SIZED)

    def size_of(file: str) -> tuple[int, int] | ValueError:
        try:
            return image_size(Path(file))
        except ValueError as error:
            return error

    found = list(in_threads(size_of, files[::step]))
    sizes = np.array([size for size in found if not isinstance(size, ValueError)], float)
    if not len(sizes):
        raise next(size for size in found if isinstance(size, ValueError))
    odd = max(len(sizes) // 10, int(len(sizes) > 2))
    ratios = np.sort(sizes[:, 0] / sizes[:, 1])
    ratio = float(ratios[len(ratios) // 2])
    if np.sum(np.abs(ratios / ratio - 1) > 0.03) > odd:
        ratio = 1.0
    heights = np.sort(np.minimum(sizes[:, 1], sizes[:, 0] / ratio))  # the largest that need no enlarging
    height = min(float(heights[odd]), LARGEST, LARGEST / ratio)
    return cut_to_patches(round(height), round(height * ratio))


def cut_to_patches(height: int, width: int) -> tuple[int, int]:
    """The rows and columns at or just below a size, at least 8, that `patch_size` can cut."""
    patch = max(4, -(-max(height, width) // 8))
    rows, columns = (max(-(-SMALLEST // patch), side // patch) * patch for side in (height, width))
    return rows, columns


def patch_size(rows: int, columns: int) -> int:
    """The small model's patch: the smallest of at least 4 pixels that cuts the image into at most 8 tokens a side.

    Raises:
        ValueError: none does without making single tokens of it; the nearest size that can be cut is named.
    """
    least = max(4, -(-max(rows, columns) // 8))
    for patch in range(least, 2 * least):
        if rows % patch == columns % patch == 0:
            return patch
    near = cut_to_patches(*(side + (least + 1) // 2 for side in (rows, columns)))
    raise ValueError(
        f"images of {columns}x{rows} pixels cannot be cut into patches of {least} to {2 * least - 1} pixels: "
        f"expected a --size such as {near[1]}x{near[0]}"
    )


def parse_size(text: str) -> tuple[int, int]:
    """Rows and columns of "32" or "WIDTHxHEIGHT".

    Raises:
        ValueError: not such a size, or out of range.
    """
    parts = text.lower().split("x")
    if not (1 <= len(parts) <= 2 and all(part.isascii() and part.isdigit() for part in parts)):
        raise ValueError(f"--size {text}: expected a number of pixels such as 32, or WIDTHxHEIGHT such as 48x24")
    columns, rows = (int(part) for part in (parts[0], parts[-1]))
    if not all(SMALLEST <= side <= 1024 for side in (rows, columns)):
        raise ValueError(f"--size {text}: expected {SMALLEST} to 1024 pixels a side")
    patch_size(rows, columns)
    return rows, columns
