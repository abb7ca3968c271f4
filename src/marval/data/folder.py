"""Folders of people's own images: which files are read as which class, at which size, decoded once in threads."""

import functools
import itertools
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from marval.data.images import ImageData
from marval.imagenet import imagenet_classes
from marval.io.images import image_size, pixels, printable, read_image, readable_suffixes
from marval.randomness import generator

MOST_CORRUPT = 0.01  # a larger share of images that cannot be read stops a run
SMALLEST, LARGEST = 8, 64  # pixels a side of an inferred size
SIZED = 5000  # images whose sizes are looked at
# Not hidden by a dot, but what macOS, Windows and file servers leave beside people's files.
NO_CLASSES = {"__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information"}

Given = TypeVar("Given")
Result = TypeVar("Result")
Labelled = tuple[str, int]  # a file and its class's number


@dataclass(frozen=True)
class Folder:
    """The images of a folder, and what of it is no image of a class."""

    root: Path
    class_names: tuple[str, ...]
    files: list[Labelled]
    left_out: "LeftOut"


@dataclass
class LeftOut:
    """What is not read: how many, and a few names, of each kind."""

    counts: Counter[str] = field(default_factory=Counter)
    names: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, path: str) -> None:
        """Count one."""
        self.counts[kind] += 1
        if len(names := self.names.setdefault(kind, [])) < 3:
            names.append(printable(os.path.basename(path)))

    def __str__(self) -> str:
        return "; ".join(
            f"{count} {kind} ({', '.join(self.names[kind])}{', ...' if count > len(self.names[kind]) else ''})"
            for kind, count in self.counts.items()
        )


@functools.lru_cache(maxsize=1000)
def say_once(line: str) -> None:
    """Print a line, however often a command reads the same folder; of several processes the first does."""
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)


def list_folder(root: Path) -> Folder:
    """The images of a folder with one sub-folder for each class; without sub-folders, all of them in one class.

    Hidden files are ignored and links are followed. Classes and files are in alphabetical order; a class is called as
    its folder, or by ImageNet's readable name where that is a WordNet id.

    Raises:
        ValueError: no such folder, no images, a class without any, or two folders of one class.
    """
    if not root.is_dir():
        raise ValueError(f"{printable(root)} is not a folder: expected one with a sub-folder of images for each class")
    left_out = LeftOut()
    ids = {_identity(str(parent)) for parent in (root.resolve(), *root.resolve().parents)}
    entries = list(_visible(str(root), left_out))
    folders = [entry.path for entry in entries if _is_folder(entry) and not _leads_back(entry, ids, left_out)]
    loose = [entry.path for entry in entries if not _is_folder(entry) and _is_image(entry, left_out)]
    found = [list(_images(path, {*ids, _identity(path)}, left_out)) for path in folders]
    if loose and not any(found):
        folders, found = [str(root.resolve())], [loose]
        name = printable(root.resolve().name)
        say_once(f"{printable(root)} has no sub-folders of images: its images, {len(loose)}, are one class, {name!r}")
    else:
        for path in loose:
            left_out.add("images beside the folders of classes", path)
    if not any(found):
        seen = f"; it holds {left_out}" if left_out.counts else ""
        raise ValueError(
            f"{printable(root)} holds no images: expected DIR/CLASS/IMAGE.png, one sub-folder for each class{seen}"
        )
    empty = [printable(os.path.basename(path)) for path, files in zip(folders, found, strict=True) if not files]
    if empty:
        raise ValueError(f"{printable(root)}: no images in {', '.join(empty[:5])}; remove such folders or fill them")
    files = [(file, label) for label, some in enumerate(found) for file in some]
    return Folder(root, class_names(folders), files, left_out)


def class_names(folders: Sequence[str]) -> tuple[str, ...]:
    """The folders' names; ImageNet's readable names where they are WordNet ids.

    Raises:
        ValueError: two folders with one name.
    """
    named: dict[str, str] = {}
    for path in folders:
        folder = os.path.basename(path)
        name = imagenet_classes().get(folder, printable(folder))
        if name in named:
            raise ValueError(
                f"the folders {printable(named[name])} and {printable(folder)} are both the class {name!r}: "
                "rename one, or move its images into the other"
            )
        named[name] = folder
    return tuple(named)


def _visible(folder: str, left_out: LeftOut) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as content:
            entries = sorted(content, key=lambda entry: entry.name)
    except OSError as error:
        raise ValueError(f"{printable(folder)} cannot be listed ({error.strerror}): allow it or remove it") from None
    for entry in entries:
        if entry.name.startswith(".") or (entry.name in NO_CLASSES and _is_folder(entry)):
            left_out.add("hidden", entry.path)
        else:
            yield entry


def _images(folder: str, seen: set[tuple[int, int]], left_out: LeftOut) -> Iterator[str]:
    """The images below a class's folder; each folder once, by whatever links it is reached."""
    for entry in _visible(folder, left_out):
        if _is_folder(entry):
            if not _leads_back(entry, seen, left_out):
                seen.add(_identity(entry.path))
                yield from _images(entry.path, seen, left_out)
        elif _is_image(entry, left_out):
            yield entry.path


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _leads_back(entry: os.DirEntry[str], seen: set[tuple[int, int]], left_out: LeftOut) -> bool:
    back = _identity(entry.path) in seen
    if back:
        left_out.add("links to folders that were read already", entry.path)
    return back


def _identity(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _is_image(entry: os.DirEntry[str], left_out: LeftOut) -> bool:
    suffix = os.path.splitext(entry.name)[1].lower()
    if suffix not in readable_suffixes():
        left_out.add(f"{printable(suffix)} files" if suffix else "files without a suffix", entry.path)
    elif not os.path.isfile(entry.path):
        left_out.add("broken links" if entry.is_symlink() else "special files", entry.path)
    else:
        return True
    return False


def in_threads(
    function: Callable[[Given], Result], items: Iterable[Given], ahead: int | None = None
) -> Iterator[Result]:
    """`function` of every item, in order, computed in threads; at most `ahead` results wait."""
    threads = min(8, (os.cpu_count() or 1) + 1)
    waiting: deque[Future[Result]] = deque()
    rest = iter(items)
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in itertools.islice(rest, ahead or 4 * threads):
                waiting.append(pool.submit(function, item))
            while waiting:
                yield waiting.popleft().result()
                waiting.extend(pool.submit(function, item) for item in itertools.islice(rest, 1))
        finally:
            pool.shutdown(cancel_futures=True)


class Progress:
    """A line about long work, every few seconds and at its end; nothing of what is done sooner."""

    def __init__(self, what: str, total: int, seconds: float = 5.0):
        self.what, self.total, self.seconds = what, total, seconds
        self.began = self.printed = time.monotonic()
        self.long = False

    def __call__(self, done: int) -> None:
        """Say how far it is."""
        now = time.monotonic()
        if now - self.printed > self.seconds or (self.long and done == self.total):
            self.printed, self.long = now, True
            rate = done / (now - self.began)
            left = int((self.total - done) / rate)
            line = f"{self.what}: {done:,} of {self.total:,}, {rate:.0f}/s, {left // 60} min {left % 60} s left"
            print(line, flush=True)


def load_folder(
    folder: Path | str,
    size: tuple[int, int] | None = None,
    limit: int | None = None,
    seed: int = 0,
    *,
    channels: int | None = None,
) -> ImageData:
    """Images in one sub-folder per class, scaled to cover `size` (rows, columns), then cropped at the centre.

    Each is decoded once, in threads, and kept as bytes of that size. Images are grey when every file is. One in a
    hundred may be damaged: it is left out.

    Args:
        size: inferred when None (see `infer_size`).
        limit: read a random sample of at most this many images, equally many of each class where there are.
        seed: of the sample.
        channels: 3: RGB even where every file is grey.

    Raises:
        ValueError: as `list_folder`, or too many files that cannot be read.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"a limit of {limit} images: expected at least 1")
    found = list_folder(Path(folder))
    files = found.files if limit is None else balanced_sample(found.files, limit, seed)
    size = infer_size([file for file, _ in files]) if size is None else size
    images = np.empty((len(files), 3, *size), np.uint8)
    labels: list[int] = []
    grey, corrupt, animated = channels != 3, list[str](), LeftOut()
    progress = Progress(f"images of {printable(found.root)}", len(files))
    for i, (read, (file, label)) in enumerate(zip(in_threads(reader(size), files), files, strict=False)):
        if isinstance(read, ValueError):
            corrupt.append(str(read))
            check_corrupt(corrupt, len(files))
        else:
            picture, moves = read
            images[len(labels)] = picture  # a grey one fills all three channels
            labels.append(label)
            grey &= len(picture) == 1
            if moves:
                animated.add("animations whose first frames are read", file)
        progress(i + 1)
    say_left_out(found)
    if animated.counts:
        say_once(f"{printable(found.root)}: {animated}")
    if corrupt:
        say_once(f"{printable(found.root)}: left out {len(corrupt)} that cannot be read, such as: {corrupt[0]}")
    tensor = torch.from_numpy(images)[: len(labels)]
    return ImageData(tensor[:, :1].clone() if grey else tensor, torch.tensor(labels), found.class_names)


def reader(size: tuple[int, int]) -> Callable[[Labelled], tuple[np.ndarray, bool] | ValueError]:
    """What reads a file: its bytes at `size`, and whether it is an animation; or the error."""

    def read(file: Labelled) -> tuple[np.ndarray, bool] | ValueError:
        try:
            picture = read_image(Path(file[0]))
        except ValueError as error:
            return error
        return pixels(picture, size), "animated" in picture.info

    return read


def say_left_out(found: Folder) -> None:
    """Print what of a folder is not read."""
    if found.left_out.counts:
        say_once(f"{printable(found.root)}: left out {found.left_out}")


def check_corrupt(corrupt: Sequence[str], total: int, then: str = "") -> None:
    """Refuse a set of which too much cannot be read.

    Args:
        corrupt: why each of those images cannot be read.
        then: what else to do, after mending them.

    Raises:
        ValueError: they are more than `MOST_CORRUPT` of `total`.
    """
    if len(corrupt) > MOST_CORRUPT * total:
        more = f" (and {len(corrupt) - 1} others, more than {MOST_CORRUPT:.0%} of {total})" if len(corrupt) > 1 else ""
        raise ValueError(f"{corrupt[0]}{then}{more}")


def balanced_sample(files: Sequence[Labelled], limit: int, seed: int) -> list[Labelled]:
    """At most `limit` of the files, drawn at random, of every class in turn; in the order of `files`."""
    if limit >= len(files):
        return list(files)
    order = torch.randperm(len(files), generator=generator(seed, "sample")).tolist()
    seen: Counter[int] = Counter()
    turns = []
    for place, i in enumerate(order):
        label = files[i][1]
        turns.append((seen[label], place, i))  # the first of every class, then the second ones, ...
        seen[label] += 1
    return [files[i] for i in sorted(i for _, _, i in sorted(turns)[:limit])]


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
