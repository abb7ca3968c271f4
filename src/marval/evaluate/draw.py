"""Drawn images: class-balanced labels, a seed for each image, rounded bytes; shard by shard, or kept in a folder.

Image i of an evaluation with seed s has class `i mod classes` and seed `1,000,000 s + i`. Every process draws whole
shards, so that the set is the same, to the bit, on 1 process or on 64. A folder of images has `plan.json` (what is
drawn) and `shard-00000.safetensors` and so on, each written whole, so that a killed run resumes.
"""

import json
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, Shaped, UInt8
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from marval.io.files import atomic_path, write_tensors, write_text
from marval.pipeline import Pipeline
from marval.runtime.distributed import Workers
from marval.runtime.progress import progress

PLAN = "plan.json"
SHARD = 250  # images
DRAWN = {"pixels": 250, "latents": 50}  # images that are drawn, and decoded, at a time
SEEDS = 1_000_000  # between an evaluation's seed and the next one's

Images = UInt8[Tensor, "n c h w"]
Labels = Int[Tensor, " n"]


@dataclass(frozen=True)
class Drawing:
    """The images of one evaluation: the model that draws them, their number, K and seed."""

    pipeline: Pipeline
    count: int
    iterations: int
    seed: int = 0
    autocast: bool = False
    batch_size: int | None = None  # images drawn at a time, which changes none of them
    shard: int = SHARD

    @property
    def shards(self) -> list[range]:
        """The numbers of the images in every shard."""
        return [range(start, min(start + self.shard, self.count)) for start in range(0, self.count, self.shard)]

    def labels(self, rows: range) -> Labels:
        """The classes of some images, in turn."""
        return torch.tensor([i % len(self.pipeline.config.class_names) for i in rows])

    def names(self, rows: range) -> list[str]:
        """Seed and class of some images, as messages say them."""
        names = self.pipeline.config.class_names
        return [f"seed {self.seed * SEEDS + i}, class {names[i % len(names)]}" for i in rows]

    def draw(self, rows: range, advance: Callable[[int], None] = lambda count: None) -> Images:
        """Draw some images, as rounded bytes.

        Args:
            advance: called after every batch with its number of images.

        Raises:
            ValueError: an image is not finite; its seed and class are named.
        """
        pipeline, parts = self.pipeline, []
        size = self.batch_size or DRAWN[pipeline.config.space.kind]
        with torch.autocast(pipeline.device.type, torch.bfloat16, enabled=self.autocast):
            for some in (rows[start : start + size] for start in range(0, len(rows), size)):
                seeds = [self.seed * SEEDS + i for i in some]
                images = pipeline.sample(
                    self.labels(some).tolist(), seed=seeds, iterations=self.iterations, batch_size=size
                )
                parts.append((images * 255).round().byte())
                advance(len(some))
        return torch.cat(parts)


def check_finite(what: str, values: Shaped[Tensor, "n *rest"], names: Sequence[str]) -> None:
    """Refuse values that are not finite: as bytes they would be black, and they would spoil every mean."""
    bad = ~values.isfinite().flatten(1).all(dim=1) if values.ndim > 1 else ~values.isfinite()
    if bad.any():
        raise ValueError(
            f"{what} of {names[int(bad.int().argmax())]} is not finite ({int(bad.sum())} of {len(bad)} are not): the "
            "model's weights are broken, or the precision is too low"
        )


def draw_bytes(
    pipeline: Pipeline, count: int, iterations: int, seed: int, workers: Workers | None = None
) -> tuple[Images, Labels]:
    """Draw `count` class-balanced images as rounded bytes, with their labels; all `workers` share and get them."""
    workers, drawing = workers or Workers(), Drawing(pipeline, count, iterations, seed)
    (own,) = workers.parts(count)
    return workers.gather(drawing.draw(range(count)[own]), count), drawing.labels(range(count))


def draw_shards(
    drawing: Drawing,
    folder: Path | None = None,
    workers: Workers | None = None,
    report: Callable[[str], None] = print,
    label: str = "drawing images",
) -> Iterator[tuple[range, Images, Labels]]:
    """Draw this process's shards, and yield the numbers, images and labels of each.

    Args:
        folder: keeps them (see `claim_folder`); what is there is read, not drawn. All processes must see it.
    """
    workers, shards = workers or Workers(), drawing.shards
    files = [None if folder is None else shard_file(folder, number) for number in range(len(shards))]
    there = [file is not None and file.is_file() for file in files]
    order = workers.agree(sorted(range(len(files)), key=there.__getitem__))  # what is missing is shared out evenly
    own = order[workers.rank :: workers.count]
    with progress(sum(len(shards[number]) for number in own), label, quiet=not workers.main) as advance:
        for number in own:
            file, rows, labels = files[number], shards[number], drawing.labels(shards[number])
            if file is not None and file.is_file():
                advance(len(rows))
                yield rows, read_shard(file, len(rows)), labels
                continue
            images = drawing.draw(rows, advance)
            if file is not None:
                write_tensors(file, {"images": images, "labels": labels}, {"first": str(rows.start)})
                if workers.main:
                    report(f"{file.parent.name}: {rows.stop} of {drawing.count} images")
            yield rows, images, labels


def shard_file(folder: Path, number: int) -> Path:
    """Name the file of a shard."""
    return folder / f"shard-{number:05d}.safetensors"


def read_shard(file: Path, count: int) -> Images:
    """Read a shard's images."""
    try:
        images = load_file(file)["images"]
        if len(images) != count:
            raise ValueError(f"{len(images)} images, expected {count}")
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{file} is damaged ({error}): remove it and run the same command again") from None
    return images


def claim_folder(folder: Path, plan: dict[str, Any], workers: Workers) -> None:
    """Write the plan of a folder that `check_folder` takes."""
    if workers.main:
        check_folder(folder, plan)
        write_text(folder / PLAN, json.dumps(plan, indent=1) + "\n")
    workers.barrier()


def check_folder(folder: Path, plan: dict[str, Any]) -> None:
    """Check that a folder is new, empty or of the same plan; of another, the first difference is named."""
    file = folder / PLAN
    try:
        before = json.loads(file.read_text())
        if not isinstance(before, dict):
            raise ValueError("no plan in it")
    except FileNotFoundError:
        if any(not path.name.startswith(f".{PLAN}.") for path in folder.glob("*")):  # a killed command leaves those
            raise ValueError(f"{folder} holds files but no {PLAN}: choose another --keep-images") from None
        return
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is damaged ({error}): choose another --keep-images") from None
    for name, value in json.loads(json.dumps(plan)).items():
        if before.get(name) != value:
            raise ValueError(
                f"{folder} holds images of {name} {before.get(name)!r}, expected {value!r}: choose another "
                "--keep-images"
            )


def write_npz(drawing: Drawing, folder: Path) -> Path:
    """Write `images.npz` in ADM's format: `arr_0`, (N, H, W, 3), bytes; grey is repeated. `arr_1`: the labels.

    Shard by shard: 50,000 images of 256 x 256 need not fit in memory. A file that is there is kept.
    """
    target = folder / "images.npz"
    if target.is_file():
        return target
    for partial in folder.glob(f".{target.name}.*"):  # of a run that was killed
        partial.unlink()
    shape = read_shard(shard_file(folder, 0), len(drawing.shards[0])).shape
    header = {"descr": "|u1", "fortran_order": False, "shape": (drawing.count, *shape[-2:], 3)}
    with atomic_path(target) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as stream:
            np.lib.format.write_array_header_1_0(stream, header)
            for number, rows in enumerate(drawing.shards):
                images = read_shard(shard_file(folder, number), len(rows)).expand(-1, 3, -1, -1)
                stream.write(images.permute(0, 2, 3, 1).contiguous().numpy().tobytes())
        with archive.open("arr_1.npy", "w") as stream:
            np.lib.format.write_array(stream, drawing.labels(range(drawing.count)).numpy())
    return target
