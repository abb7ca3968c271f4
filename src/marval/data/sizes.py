"""Image sizes: inferred for a set of images, read from `--size`, and cut into the small model's patches."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from marval.data.images import in_threads
from marval.io.images import image_size

SMALLEST, LARGEST = 8, 64  # pixels a side of an inferred size
SAMPLED = 5000  # images whose sizes are looked at


def infer_size(files: Sequence[str]) -> tuple[int, int]:
    """Choose rows and columns for images of any sizes, such that the small model can cut them into patches.

    The result has the images' shape where they agree within 3 %, and is square otherwise. It is no larger than the
    images, and 8 to 64 pixels a side. One image in ten (of three or more) may be odd without changing the result.

    Raises:
        ValueError: no image can be read.
    """
    headers = list(in_threads(lambda file: image_size(Path(file)), files[:: max(1, len(files) // SAMPLED)]))
    sizes = np.array([size for size in headers if not isinstance(size, ValueError)], float)
    if not len(sizes):
        raise next(size for size in headers if isinstance(size, ValueError))
    odd = max(len(sizes) // 10, int(len(sizes) > 2))
    ratios = np.sort(sizes[:, 0] / sizes[:, 1])  # width / height
    ratio = float(ratios[len(ratios) // 2])
    if np.sum(np.abs(ratios / ratio - 1) > 0.03) > odd:
        ratio = 1.0
    heights = np.sort(np.minimum(sizes[:, 1], sizes[:, 0] / ratio))  # the largest that need no enlarging
    height = min(float(heights[odd]), LARGEST, LARGEST / ratio)
    return cut_to_patches(round(height), round(height * ratio))


def cut_to_patches(height: int, width: int) -> tuple[int, int]:
    """Round a size down to rows and columns, at least 8, that `patch_size` can cut."""
    patch = max(4, -(-max(height, width) // 8))
    rows, columns = (max(-(-SMALLEST // patch), side // patch) * patch for side in (height, width))
    return rows, columns


def patch_size(rows: int, columns: int) -> int:
    """Choose the small model's patch: the smallest, from 4 pixels, that leaves at most 8 tokens a side.

    Raises:
        ValueError: no patch below twice that size divides both sides.
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
    """Read rows and columns from "32" or "WIDTHxHEIGHT".

    Raises:
        ValueError: it is no such size, or out of range.
    """
    parts = text.lower().split("x")
    if not (1 <= len(parts) <= 2 and all(part.isascii() and part.isdigit() for part in parts)):
        raise ValueError(f"--size {text}: expected a number of pixels such as 32, or WIDTHxHEIGHT such as 48x24")
    columns, rows = int(parts[0]), int(parts[-1])
    if not all(SMALLEST <= side <= 1024 for side in (rows, columns)):
        raise ValueError(f"--size {text}: expected {SMALLEST} to 1024 pixels a side")
    patch_size(rows, columns)
    return rows, columns
