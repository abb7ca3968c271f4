"""Drawn images: class-balanced labels, a seed for each image, rounded bytes; shard by shard, or kept in a folder.

Image i of an evaluation with seed s has class `i mod classes` and seed `1,000,000 s + i`, whatever draws it. Every
process draws whole shards, so that the set is the same, to the bit, on 1 process or on 64. A folder of images has
`plan.json` (what is drawn) and `shard-00000.safetensors` and so on, each written whole, so that a killed run goes on.
"""

import json
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int, Shaped, UInt8
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from marval.io.files import atomic_path, write_tensors, write_text
from marval.io.images import save_picture
from marval.pipeline import Pipeline
from marval.runtime.distributed import Workers
from marval.runtime.progress import progress

PLAN = "plan.json"
SHARD = 250  # images
DRAWN = {"pixels": 250, "latents": 50}  # images that are drawn, and decoded, at a time
SEEDS = 1_000_000  # between an evaluation's seed and the next one's

Keep = Literal["shards", "png", "npz"]


def balanced_labels(count: int, classes: int) -> list[int]:
    """`count` labels that go through the classes in turn."""
    return [i % classes for i in range(count)]


def draw_rows(
    pipeline: Pipeline,
    rows: range,
    iterations: int,
    seed: int,
    batch_size: int | None = None,
    autocast: bool = False,
    advance: Callable[[int], None] = lambda count: None,
) -> UInt8[Tensor, "n c h w"]:
    """Some of the images of an evaluation, as rounded bytes.

    Args:
        batch_size: images drawn at a time; `DRAWN` says how many when None.
        advance: told of every batch how many images it has.

    Raises:
        ValueError: an image that is not finite; its seed and class are named.
    """
    batch_size = batch_size or DRAWN[pipeline.config.space.kind]
    names, parts = pipeline.config.class_names, []
    with torch.autocast(pipeline.device.type, torch.bfloat16, enabled=autocast):
        for some in (rows[start : start + batch_size] for start in range(0, len(rows), batch_size)):
            labels = [i % len(names) for i in some]
            seeds = [seed * SEEDS + i for i in some]
            images = pipeline.sample(labels, seed=seeds, iterations=iterations, batch_size=batch_size)
            check_finite(
                "the image", images, [f"seed {s}, class {names[c]}" for s, c in zip(seeds, labels, strict=True)]
            )
            parts.append((images * 255).round().byte())
            advance(len(some))
    return torch.cat(parts)


def check_finite(what: str, rows: Shaped[Tensor, "n *rest"], whose: Sequence[str]) -> None:
    """Refuse numbers that are not finite: rounded to bytes they would be black, and counted they would be dropped.

    Raises:
        ValueError: the first row with such a number is named.
    """
    bad = (~rows.isfinite()).flatten(1).any(dim=1) if rows.ndim > 1 else ~rows.isfinite()
    if bad.any():
        raise ValueError(
            f"{what} of {whose[int(bad.int().argmax())]} is not finite ({int(bad.sum())} of {len(bad)} are not): the "
            "model's weights are broken, or the precision is too low"
        )


def draw_bytes(
    pipeline: Pipeline,
    count: int,
    iterations: int,
    seed: int,
    batch_size: int | None = None,
    autocast: bool = False,
    workers: Workers | None = None,
) -> tuple[UInt8[Tensor, "n c h w"], Int[Tensor, " n"]]:
    """`count` class-balanced images as rounded bytes, and their labels; image i has seed `seed * 1_000_000 + i`.

    The `workers` share the images, and all of them get all.
    """
    workers = workers or Workers()
    (own,) = workers.parts(count)
    images = draw_rows(pipeline, range(count)[own], iterations, seed, batch_size, autocast)
    labels = balanced_labels(count, len(pipeline.config.class_names))
    return workers.gather(images, count), torch.tensor(labels)


def shards_of(count: int, shard: int = SHARD) -> list[range]:
    """The images of every shard."""
    return [range(start, min(start + shard, count)) for start in range(0, count, shard)]


@dataclass(frozen=True)
class DrawnImages:
    """The images of a folder, read shard by shard, as often as they are asked for."""

    folder: Path
    count: int
    shard: int = SHARD

    @property
    def shards(self) -> list[tuple[Path, range]]:
        """Every shard's file and the images in it."""
        return [
            (self.folder / f"shard-{number:05d}.safetensors", rows)
            for number, rows in enumerate(shards_of(self.count, self.shard))
        ]

    def __iter__(self) -> Iterator[tuple[UInt8[Tensor, "_ c h w"], Int[Tensor, " _"]]]:
        for file, rows in self.shards:
            yield read_shard(file, rows)


def read_shard(file: Path, rows: range) -> tuple[UInt8[Tensor, "n c h w"], Int[Tensor, " n"]]:
    """A shard's images and labels.

    Raises:
        ValueError: it is missing or damaged.
    """
    try:
        tensors = load_file(file)
        images, labels = tensors["images"], tensors["labels"]
        if len(images) != len(rows):
            raise ValueError(f"{len(images)} images, expected {len(rows)}")
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{file} is damaged ({error}): remove it and run the same command again") from None
    return images, labels


def draw_shards(
    pipeline: Pipeline,
    count: int,
    iterations: int,
    seed: int,
    *,
    autocast: bool = False,
    batch_size: int | None = None,
    shard: int = SHARD,
    into: DrawnImages | None = None,
    workers: Workers | None = None,
    report: Callable[[str], None] = print,
    label: str = "drawing images",
) -> Iterator[tuple[range, UInt8[Tensor, "_ c h w"], Int[Tensor, " _"]]]:
    """This process's shards of an evaluation, one by one: which images, the images, their labels.

    Args:
        into: a folder that keeps them; what is there is read, not drawn. All processes must see it.
    """
    workers = workers or Workers()
    if into is not None:
        files: Sequence[tuple[Path | None, range]] = into.shards
    else:
        files = [(None, rows) for rows in shards_of(count, shard)]
    kept = [file is not None and file.is_file() for file, _ in files]
    order = workers.agree(sorted(range(len(files)), key=kept.__getitem__))  # what is missing is shared out evenly
    own = order[workers.rank :: workers.count]
    with progress(sum(len(files[number][1]) for number in own), label, quiet=not workers.main) as advance:
        for number in own:
            file, rows = files[number]
            if file is not None and file.is_file():
                advance(len(rows))
                yield rows, *read_shard(file, rows)
                continue
            images = draw_rows(pipeline, rows, iterations, seed, batch_size, autocast, advance)
            labels = torch.tensor([i % len(pipeline.config.class_names) for i in rows])
            if file is not None:
                write_tensors(file, {"images": images, "labels": labels}, {"first": str(rows.start)})
                if workers.main:
                    report(f"{file.parent.name}: {rows.stop} of {count} images")
            yield rows, images, labels


def claim_folder(
    folder: Path, plan: dict[str, Any], count: int, *, shard: int = SHARD, workers: Workers | None = None
) -> DrawnImages:
    """A folder for the images of an evaluation, empty or with some of them; `plan` says whose they are.

    Raises:
        ValueError: the folder holds images of another plan, or files of somebody else.
    """
    check_plan(folder, plan, shard=shard, strangers=workers is None or workers.main)
    if workers is None or workers.main:
        write_text(folder / PLAN, json.dumps({**plan, "shard": shard}, indent=1) + "\n")
    return DrawnImages(folder, count, shard)


def check_plan(folder: Path, plan: dict[str, Any], *, shard: int = SHARD, strangers: bool = True) -> None:
    """A folder's images are those of `plan`, or there are none yet.

    Args:
        strangers: refuse a folder without a plan that holds other files, too: they would be taken for images.

    Raises:
        ValueError: they are not; the first difference is named.
    """
    file, plan = folder / PLAN, json.loads(json.dumps({**plan, "shard": shard}))
    try:
        found = json.loads(file.read_text())
        if not isinstance(found, dict):
            raise ValueError("no plan in it")
    except FileNotFoundError:
        left = f".{PLAN}."  # what a kill leaves of a plan
        if strangers and any(not path.name.startswith(left) for path in folder.glob("*")):
            raise ValueError(f"{folder} holds files but no {PLAN}: choose another --keep-images") from None
        return
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is damaged ({error}): choose another --keep-images") from None
    for name, value in plan.items():
        if found.get(name) != value:
            raise ValueError(
                f"{folder} holds images of {name} {found.get(name)!r}, expected {value!r}: choose another --keep-images"
            )


def write_pngs(drawn: DrawnImages, workers: Workers | None = None) -> Path:
    """Every image as `png/00000-CLASS.png` beside the shards; the processes share the work, what is there is kept."""
    workers, folder = workers or Workers(), drawn.folder / "png"
    for number, (file, rows) in enumerate(drawn.shards):
        if number % workers.count != workers.rank:
            continue
        images, labels = read_shard(file, rows)
        for i, image, label in zip(rows, images, labels.tolist(), strict=True):
            target = folder / f"{i:05d}-{label}.png"
            if not target.is_file():
                array = image.permute(1, 2, 0).numpy()
                save_picture(target, Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array))
    workers.barrier()
    return folder


def write_npz(drawn: DrawnImages) -> Path:
    """All images as `images.npz` in ADM's format: `arr_0`, (N, H, W, 3), bytes; grey is repeated. `arr_1`: the labels.

    Shard by shard: 50,000 images of 256 x 256 need not fit in memory. A file that is there is kept.
    """
    target = drawn.folder / "images.npz"
    if target.is_file():
        return target
    for partial in drawn.folder.glob(f".{target.name}.*"):  # of a run that was killed
        partial.unlink()
    first, _ = next(iter(drawn))
    shape = (drawn.count, *first.shape[-2:], 3)
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.uint8)), "fortran_order": False, "shape": shape}
    labels = []
    with atomic_path(target) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as stream:
            np.lib.format.write_array_header_1_0(stream, header)
            for images, own in drawn:
                stream.write(images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().numpy().tobytes())
                labels.append(own)
        with archive.open("arr_1.npy", "w") as stream:
            np.lib.format.write_array(stream, torch.cat(labels).numpy())
    return target
