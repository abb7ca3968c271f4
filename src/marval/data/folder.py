"""Folders of people's own images: which files are read as which class, decoded once."""

import functools
import hashlib
import os
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from marval.data.imagenet import imagenet_classes
from marval.data.images import ImageData
from marval.data.reading import in_threads
from marval.data.sizes import infer_size
from marval.io.images import pixels, printable, read_image, readable_suffixes
from marval.runtime.progress import progress
from marval.runtime.rng import generator

MOST_CORRUPT = 0.01  # a larger share of images that cannot be read stops a run,
FEW_CORRUPT = 3  # but not so few
# Not hidden by a dot, but what macOS, Windows and file servers leave beside people's files.
NO_CLASSES = {"__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information"}

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
        seen = f" (left out: {left_out})" if left_out.counts else ""
        raise ValueError(
            f"{printable(root)}: no images in {', '.join(empty[:5])}; remove such folders or fill them{seen}"
        )
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


def load_folder(
    folder: Path | str,
    size: tuple[int, int] | None = None,
    limit: int | None = None,
    seed: int = 0,
    *,
    channels: int | None = None,
) -> ImageData:
    """Images in one sub-folder per class, scaled to cover `size` (rows, columns), then cropped at the centre.

    Each is decoded once, in threads, and kept as bytes of that size. Images are grey when every file is. Three, or one
    in a hundred, may be damaged: they are left out.

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
    say_left_out(found)
    files = found.files if limit is None else balanced_sample(found.files, limit, seed)
    size = infer_size([file for file, _ in files]) if size is None else size
    key = (listing_hash(found.root, files), found.class_names, size, channels)
    if (data := _loaded.get(key)) is None:
        data = _loaded[key] = decode(found, files, size, channels)
    return data


# A command's training images are often its judge's, too: they are decoded once, and kept while somebody holds them.
_loaded: "weakref.WeakValueDictionary[tuple[object, ...], ImageData]" = weakref.WeakValueDictionary()


def decode(found: Folder, files: Sequence[Labelled], size: tuple[int, int], channels: int | None) -> ImageData:
    """Some files of a folder as `load_folder` keeps them.

    Raises:
        ValueError: too many of them cannot be read.
    """
    images = np.empty((len(files), 3, *size), np.uint8)
    labels: list[int] = []
    grey, corrupt, animated = channels != 3, list[str](), LeftOut()
    with progress(len(files), f"images of {printable(found.root)}") as advance:
        for read, (file, label) in zip(in_threads(reader(size), files), files, strict=False):
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
            advance(1)
    if animated.counts:
        say_once(f"{printable(found.root)}: {animated}")
    if corrupt:
        say_once(f"{printable(found.root)}: left out {len(corrupt)} that cannot be read, such as: {corrupt[0]}")
        empty = sorted({label for _, label in files} - set(labels))
        if empty:
            names = ", ".join(found.class_names[label] for label in empty[:5])
            raise ValueError(f"{printable(found.root)}: no image of {names} can be read; mend or remove such folders")
    tensor = torch.from_numpy(images)[: len(labels)]
    return ImageData(tensor[:, :1].clone() if grey else tensor, torch.tensor(labels), found.class_names)


def listing_hash(root: Path, files: Sequence[Labelled]) -> str:
    """SHA-256 of the files' classes, names, sizes and times: what changes when a picture does."""
    digest = hashlib.sha256()
    for file, label in files:
        status = os.stat(file)
        name = os.fsencode(os.path.relpath(file, root))
        digest.update(b"%d %d %d %s\0" % (label, status.st_size, status.st_mtime_ns, name))
    return digest.hexdigest()


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
        ValueError: they are more than `FEW_CORRUPT` and than `MOST_CORRUPT` of `total`, or all.
    """
    if len(corrupt) > max(FEW_CORRUPT, MOST_CORRUPT * total) or len(corrupt) == total:
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
