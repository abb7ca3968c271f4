"""Folders of people's own images: which files belong to which class, and their pixels."""

import functools
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from marval.data.captions import TRAIN, Captioned, find_captions
from marval.data.images import ImageData, in_threads, infer_size
from marval.io.images import pixels, printable, read_image, readable_suffixes
from marval.io.official import imagenet_classes
from marval.runtime.progress import progress
from marval.runtime.rng import generator

FEW_DAMAGED, MOST_DAMAGED = 3, 0.01  # more images than both, a number and a share, stop a run
# Not hidden by a dot, but what macOS, Windows and file servers leave beside people's files.
NO_CLASSES = {"__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information"}

Labelled = tuple[str, int]  # a file and its class's number


@functools.lru_cache(maxsize=1000)
def say_once(line: str) -> None:
    """Print a line, once however often a folder is read, and only from the first of several processes."""
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)


def list_folder(root: Path) -> tuple[tuple[str, ...], list[Labelled]]:
    """List the classes and images of a folder with one sub-folder for each class; without any, it is one class.

    Hidden files are skipped and links are followed; what else is left out is printed. Classes and files are sorted by
    name. A class has its folder's name, or ImageNet's readable name where that is a WordNet id.

    Raises:
        ValueError: no such folder, no images, or a class without images.
    """
    if not root.is_dir():
        raise ValueError(f"{printable(root)} is not a folder: expected one with a sub-folder of images for each class")
    others: Counter[str] = Counter()
    loose, names = _entries(root, others)
    images = {name: _images(root / name, others) for name in names}
    if loose and not any(images.values()):
        images = {root.resolve().name: loose}
        say_once(f"{printable(root)} has no sub-folders of images: its {len(loose)} images are one class")
    elif loose:
        others["images beside the folders of classes"] += len(loose)
    if others:
        left_out = ", ".join(f"{count} {suffix or 'without a suffix'}" for suffix, count in others.items())
        say_once(f"{printable(root)}: left out files ({left_out})")
    if not any(images.values()):
        raise ValueError(
            f"{printable(root)} holds no images: expected DIR/CLASS/IMAGE.png, one sub-folder for each class"
        )
    if empty := [printable(name) for name, files in images.items() if not files]:
        raise ValueError(f"{printable(root)}: no images in {', '.join(empty[:5])}; remove such folders or fill them")
    class_names = tuple(imagenet_classes().get(name, printable(name)) for name in images)
    return class_names, [(file, label) for label, files in enumerate(images.values()) for file in files]


def _entries(folder: Path, others: Counter[str]) -> tuple[list[str], list[str]]:
    """List the images in a folder, and the names of its sub-folders; count other files by their suffixes."""
    images, folders = [], []
    with os.scandir(folder) as content:
        entries = sorted((entry for entry in content if entry.name[0] != "."), key=lambda entry: entry.name)
    for entry in entries:
        suffix = os.path.splitext(entry.name)[1].lower()
        if entry.is_dir():
            folders += [entry.name] if entry.name not in NO_CLASSES else []
        elif suffix in readable_suffixes() and entry.is_file():  # a pipe would be waited for for ever
            images.append(entry.path)
        else:
            others[printable(suffix)] += 1
    return images, folders


def _images(folder: Path, others: Counter[str], above: tuple[str, ...] = ()) -> list[str]:
    """List all images below a class's folder; a link to a folder above is not followed."""
    if (place := os.path.realpath(folder)) in above:
        return []
    images, folders = _entries(folder, others)
    return images + [file for name in folders for file in _images(folder / name, others, (*above, place))]


def load_folder(
    folder: Path | str,
    size: tuple[int, int] | None = None,
    *,
    limit: int | None = None,
    channels: int | None = None,
    encoder: str = "",
    split: str = TRAIN,
) -> ImageData:
    """Load a folder's images (see `list_folder`), scaled to cover `size` and cropped at the centre.

    Images are grey when every file is. Three, or one in a hundred, may be damaged: they are left out.

    Args:
        size: rows and columns; inferred when None (see `infer_size`).
        limit: read a random sample of at most this many images, the same number of each class where there are enough.
        channels: 3: RGB even where every file is grey.
        encoder: the sentence encoder of the captions, if there are any (see `find_captions`); "": read classes.
        split: of the captions' table.

    Raises:
        ValueError: as `list_folder` and `find_captions`, or too many files cannot be read.
    """
    class_names, files, captioned = list_images(Path(folder), captions=bool(encoder), split=split)
    files = files if limit is None else _balanced_sample(files, limit)
    size = infer_size([file for file, _ in files]) if size is None else size
    images = np.empty((len(files), 3, *size), np.uint8)
    read, labels, damaged, grey = list[str](), list[int](), list[str](), channels != 3
    with progress(len(files), f"images of {printable(folder)}") as advance:
        enough = 2 * max(size)
        results = in_threads(lambda file: pixels(read_image(Path(file[0]), draft=enough), size), files)
        for picture, (file, label) in zip(results, files, strict=True):
            advance(1)
            if isinstance(picture, ValueError):
                damaged.append(str(picture))
                check_damaged(damaged, len(files))
                continue
            images[len(labels)] = picture  # a grey one fills all three channels
            labels.append(label)
            read.append(file)
            grey &= len(picture) == 1
    if damaged:
        say_once(f"{printable(folder)}: left out {len(damaged)} that cannot be read, such as: {damaged[0]}")
    tensor = torch.from_numpy(images)[: len(labels)]
    captions = None if captioned is None else captioned.captions(read, encoder)
    return ImageData(tensor[:, :1].clone() if grey else tensor, torch.tensor(labels), class_names, captions)


def list_images(
    root: Path, *, captions: bool, split: str = TRAIN
) -> tuple[tuple[str, ...], list[Labelled], Captioned | None]:
    """List a folder's concepts and images by its captions (see `find_captions`), or its classes (`list_folder`).

    Raises:
        ValueError: as both, or a split where there are no captions.
    """
    loose, folders = _entries(root, Counter()) if root.is_dir() else ([], [])
    captioned = find_captions(root, [] if folders else loose) if captions else None
    if captioned is not None:
        count = len({caption for entry in captioned.entries.values() for caption in entry.captions})
        say_once(f"{printable(root)}: {len(captioned.entries)} images with {count} different captions")
        return captioned.concepts, captioned.files(split), captioned
    if split != TRAIN:
        raise ValueError(f"{printable(root)} has no table of captions, which names its split {split!r}")
    return *list_folder(root), None


def check_damaged(reasons: Sequence[str], total: int, advice: str = "") -> None:
    """Refuse a set in which more images than `FEW_DAMAGED` and than `MOST_DAMAGED` of `total`, or all, are damaged."""
    count = len(reasons)
    if count > max(FEW_DAMAGED, MOST_DAMAGED * total) or 0 < count == total:
        more = f" (and {count - 1} others, more than {MOST_DAMAGED:.0%} of {total})" if count > 1 else ""
        raise ValueError(f"{reasons[0]}{advice}{more}")


def _balanced_sample(files: Sequence[Labelled], limit: int) -> list[Labelled]:
    """Draw at most `limit` files at random, from every class in turn; they keep their order."""
    drawn: Counter[int] = Counter()

    def turn(i: int) -> int:
        drawn[files[i][1]] += 1
        return drawn[files[i][1]]

    order = torch.randperm(len(files), generator=generator(0, "sample")).tolist()
    chosen = sorted(order, key=turn)[:limit]  # the first of every class, then the second ones, ...
    return [files[i] for i in sorted(chosen)]
