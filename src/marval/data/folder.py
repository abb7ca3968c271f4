"""Folders of people's own images: which files belong to which class, and their pixels."""

import functools
import hashlib
import os
import weakref
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from marval.data.images import ImageData, in_threads, infer_size
from marval.io.images import pixels, printable, read_image, readable_suffixes
from marval.io.official import imagenet_classes
from marval.runtime.progress import progress
from marval.runtime.rng import generator

FEW_DAMAGED, MOST_DAMAGED = 3, 0.01  # more images than both, a number and a share, stop a run
# Not hidden by a dot, but what macOS, Windows and file servers leave beside people's files.
NO_CLASSES = {"__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information"}

Labelled = tuple[str, int]  # a file and its class's number
Skipped = defaultdict[str, list[str]]  # why something is not read -> names


@dataclass(frozen=True)
class Folder:
    """The images of a folder."""

    root: Path
    class_names: tuple[str, ...]
    files: list[Labelled]


@functools.lru_cache(maxsize=1000)
def say_once(line: str) -> None:
    """Print a line, once however often a folder is read, and only from the first of several processes."""
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)


def list_folder(root: Path) -> Folder:
    """List a folder with one sub-folder of images for each class; without sub-folders all images are one class.

    Hidden files are skipped and links are followed; what is left out is printed. Classes and files are sorted by name.
    A class has its folder's name, or ImageNet's readable name where that is a WordNet id.

    Raises:
        ValueError: no such folder, no images, a class without images, or two folders of one class.
    """
    if not root.is_dir():
        raise ValueError(f"{printable(root)} is not a folder: expected one with a sub-folder of images for each class")
    skipped: Skipped = defaultdict(list)
    above = set(map(str, (root.resolve(), *root.resolve().parents)))
    folders, loose = _entries(str(root), set(above), skipped)
    images = [_images(folder, {*above, os.path.realpath(folder)}, skipped) for folder in folders]
    if loose and not any(images):
        folders, images = [str(root.resolve())], [loose]
        name = printable(root.resolve().name)
        say_once(f"{printable(root)} has no sub-folders of images: its images, {len(loose)}, are one class, {name!r}")
    elif loose:
        skipped["images beside the folders of classes"] += [os.path.basename(file) for file in loose]
    left_out = _describe(skipped)
    more = f" (left out: {left_out})" if left_out else ""
    if not any(images):
        raise ValueError(
            f"{printable(root)} holds no images: expected DIR/CLASS/IMAGE.png, one sub-folder for each class{more}"
        )
    if empty := [os.path.basename(folder) for folder, files in zip(folders, images, strict=True) if not files]:
        names = ", ".join(map(printable, empty[:5]))
        raise ValueError(f"{printable(root)}: no images in {names}; remove such folders or fill them{more}")
    class_names = _class_names(folders)
    if left_out:
        say_once(f"{printable(root)}: left out {left_out}")
    return Folder(root, class_names, [(file, label) for label, files in enumerate(images) for file in files])


def _entries(folder: str, read: set[str], skipped: Skipped) -> tuple[list[str], list[str]]:
    """The images directly in a folder, and its sub-folders that are not in `read`, where they are noted."""
    folders, images = [], []
    try:
        with os.scandir(folder) as content:
            entries = sorted(content, key=lambda entry: entry.name)
    except OSError as error:
        raise ValueError(f"{printable(folder)} cannot be listed ({error.strerror}): allow it or remove it") from None
    for entry in entries:
        suffix = os.path.splitext(entry.name)[1].lower()
        is_folder = os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()
        if entry.name.startswith(".") or (is_folder and entry.name in NO_CLASSES):
            skipped["hidden"].append(entry.name)
        elif is_folder and (place := os.path.realpath(entry.path)) in read:
            skipped["links to folders that were read already"].append(entry.name)
        elif is_folder:
            read.add(place)
            folders.append(entry.path)
        elif suffix not in readable_suffixes():
            skipped[f"{printable(suffix)} files" if suffix else "files without a suffix"].append(entry.name)
        elif not os.path.isfile(entry.path):
            skipped["broken links" if entry.is_symlink() else "special files"].append(entry.name)
        else:
            images.append(entry.path)
    return folders, images


def _images(folder: str, read: set[str], skipped: Skipped) -> list[str]:
    """All images below a class's folder; each folder once, by whatever links it is reached."""
    folders, images = _entries(folder, read, skipped)
    for path in folders:
        images += _images(path, read, skipped)
    return images


def _describe(skipped: dict[str, list[str]]) -> str:
    return "; ".join(
        f"{len(names)} {reason} ({', '.join(map(printable, names[:3]))}{', ...' if len(names) > 3 else ''})"
        for reason, names in skipped.items()
    )


def _class_names(folders: Sequence[str]) -> tuple[str, ...]:
    """Return the folders' names, or ImageNet's readable names where they are WordNet ids."""
    folder_of: dict[str, str] = {}
    for folder in map(os.path.basename, folders):
        name = imagenet_classes().get(folder, printable(folder))
        if name in folder_of:
            raise ValueError(
                f"the folders {printable(folder_of[name])} and {printable(folder)} are both the class {name!r}: "
                "rename one, or move its images into the other"
            )
        folder_of[name] = folder
    return tuple(folder_of)


def load_folder(
    folder: Path | str, size: tuple[int, int] | None = None, *, limit: int | None = None, channels: int | None = None
) -> ImageData:
    """Load a folder's images (see `list_folder`), scaled to cover `size` and cropped at the centre.

    Images are grey when every file is. Three, or one in a hundred, may be damaged: they are left out.

    Args:
        size: rows and columns; inferred when None (see `infer_size`).
        limit: read a random sample of at most this many images, the same number of each class where there are enough.
        channels: 3: RGB even where every file is grey.

    Raises:
        ValueError: as `list_folder`, or too many files cannot be read.
    """
    listing = list_folder(Path(folder))
    files = listing.files if limit is None else _balanced_sample(listing.files, limit)
    size = infer_size([file for file, _ in files]) if size is None else size
    key = (listing_hash(listing.root, files), listing.class_names, size, channels)
    if (data := _decoded.get(key)) is None:
        data = _decoded[key] = _decode(listing, files, size, grey=channels != 3)
    return data


# Training images that are the judge's, too, are decoded once.
_decoded: "weakref.WeakValueDictionary[tuple[object, ...], ImageData]" = weakref.WeakValueDictionary()


def _decode(listing: Folder, files: Sequence[Labelled], size: tuple[int, int], grey: bool) -> ImageData:
    """Decode some files of a folder in threads into bytes of `size`; with `grey`, one channel if every file is grey."""
    images = np.empty((len(files), 3, *size), np.uint8)
    labels, damaged, animations = list[int](), list[str](), list[str]()

    def read(file: Labelled) -> tuple[np.ndarray, bool]:
        picture = read_image(Path(file[0]))
        return pixels(picture, size), "animated" in picture.info

    with progress(len(files), f"images of {printable(listing.root)}") as advance:
        for result, (file, label) in zip(in_threads(read, files), files, strict=True):
            advance(1)
            if isinstance(result, ValueError):
                damaged.append(str(result))
                check_damaged(damaged, len(files))
                continue
            picture, animated = result
            images[len(labels)] = picture  # a grey one fills all three channels
            labels.append(label)
            grey &= len(picture) == 1
            animations += [os.path.basename(file)] * animated
    root = printable(listing.root)
    if animations:
        say_once(f"{root}: {_describe({'animations whose first frames are read': animations})}")
    if damaged:
        say_once(f"{root}: left out {len(damaged)} that cannot be read, such as: {damaged[0]}")
    if lost := sorted({label for _, label in files} - set(labels)):
        names = ", ".join(listing.class_names[label] for label in lost[:5])
        raise ValueError(f"{root}: no image of {names} can be read; mend or remove such folders")
    tensor = torch.from_numpy(images)[: len(labels)]
    return ImageData(tensor[:, :1].clone() if grey else tensor, torch.tensor(labels), listing.class_names)


def listing_hash(root: Path, files: Sequence[Labelled]) -> str:
    """Hash (SHA-256) the files' classes, names, sizes and times, which change when a picture does."""
    digest = hashlib.sha256()
    for file, label in files:
        status = os.stat(file)
        name = os.fsencode(os.path.relpath(file, root))
        digest.update(b"%d %d %d %s\0" % (label, status.st_size, status.st_mtime_ns, name))
    return digest.hexdigest()


def check_damaged(reasons: Sequence[str], total: int, advice: str = "") -> None:
    """Refuse a set in which more images than `FEW_DAMAGED` and than `MOST_DAMAGED` of `total`, or all, are damaged."""
    count = len(reasons)
    if count > max(FEW_DAMAGED, MOST_DAMAGED * total) or 0 < count == total:
        more = f" (and {count - 1} others, more than {MOST_DAMAGED:.0%} of {total})" if count > 1 else ""
        raise ValueError(f"{reasons[0]}{advice}{more}")


def _balanced_sample(files: Sequence[Labelled], limit: int) -> list[Labelled]:
    """Draw at most `limit` files at random, from every class in turn; they keep their order."""
    if limit < 1:
        raise ValueError(f"a limit of {limit} images: expected at least 1")
    drawn: Counter[int] = Counter()

    def turn(i: int) -> int:
        drawn[files[i][1]] += 1
        return drawn[files[i][1]]

    order = torch.randperm(len(files), generator=generator(0, "sample")).tolist()
    chosen = sorted(order, key=turn)[:limit]  # the first of every class, then the second ones, ...
    return [files[i] for i in sorted(chosen)]
