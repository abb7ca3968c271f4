"""Drawn images: class-balanced labels, a seed for each image, rounded bytes; shard by shard, or kept in a folder.

Image i of an evaluation with seed s has class `i mod classes` and seed `1,000,000 s + i`. Every process draws whole
shards, so that the set is the same, to the bit, on 1 process or on 64. A folder of images has `plan.json` (what is
drawn) and `shard-00000.safetensors` and so on, each written whole, so that a killed run resumes.
"""

import json
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, UInt8
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from marval.classes import labels_in_turn
from marval.io.files import atomic_path, check_output, write_tensors, write_text
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
    batch_size: int | None = None  # images drawn at a time, which changes none of them
    folder: Path | None = None  # keeps them
    key: dict[str, Any] = field(default_factory=dict)  # what rows and the folder say of them
    shard: int = SHARD

    @property
    def shards(self) -> list[range]:
        """The numbers of the images in every shard."""
        return [range(start, min(start + self.shard, self.count)) for start in range(0, self.count, self.shard)]

    def shard_file(self, number: int) -> Path | None:
        """The file that keeps a shard."""
        return None if self.folder is None else self.folder / f"shard-{number:05d}.safetensors"

    def labels(self, rows: range) -> Labels:
        """The classes of some images, in turn; of known prompts so many that each has two images or more."""
        config = self.pipeline.config
        turns = max(1, self.count // 2) if config.encoder else config.mar.num_labels
        return torch.tensor(labels_in_turn([i % turns for i in rows], config))

    def draw(self, rows: range, advance: Callable[[int], None] = lambda count: None) -> Images:
        """Draw some images, as rounded bytes.

        Args:
            advance: called after every batch with its number of images.
        """
        pipeline, parts = self.pipeline, []
        size = self.batch_size or DRAWN[pipeline.config.space.kind]
        for some in (rows[start : start + size] for start in range(0, len(rows), size)):
            seeds = [self.seed * SEEDS + i for i in some]
            images = pipeline.sample(
                self.labels(some).tolist(), seed=seeds, iterations=self.iterations, batch_size=size
            )
            parts.append((images * 255).round().byte())
            advance(len(some))
        return torch.cat(parts)


def draw_bytes(
    pipeline: Pipeline, count: int, iterations: int, seed: int, workers: Workers | None = None
) -> tuple[Images, Labels]:
    """Draw `count` class-balanced images as rounded bytes, with their labels; all `workers` share and get them."""
    workers, drawing = workers or Workers(), Drawing(pipeline, count, iterations, seed)
    (own,) = workers.parts(count)
    return workers.gather(drawing.draw(range(count)[own])), drawing.labels(range(count))


def draw_shards(
    drawing: Drawing, workers: Workers | None = None, label: str = "drawing images"
) -> Iterator[tuple[range, Images, Labels]]:
    """Draw this process's shards, and yield the numbers, images and labels of each.

    A folder, which all processes see, keeps them: what is there is read, not drawn.
    """
    workers = workers or Workers()
    own = list(enumerate(drawing.shards))[workers.rank :: workers.count]
    with progress(sum(len(rows) for _, rows in own), label, quiet=not workers.main) as advance:
        for number, rows in own:
            file, labels = drawing.shard_file(number), drawing.labels(rows)
            if file is not None and file.is_file():
                images = read_shard(file, len(rows))
                advance(len(rows))
            else:
                images = drawing.draw(rows, advance)
                if file is not None:
                    write_tensors(file, {"images": images, "labels": labels}, {"first": str(rows.start)})
            yield rows, images, labels


def read_shard(file: Path, count: int) -> Images:
    """Read a shard's images."""
    try:
        images = load_file(file)["images"]
        if len(images) != count:
            raise ValueError(f"{len(images)} images, expected {count}")
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{file} is damaged ({error}): remove it and run the same command again") from None
    return images


def claim_folder(drawing: Drawing, workers: Workers) -> None:
    """Write what is drawn into the folder that `check_folder` takes."""
    if drawing.folder is not None and workers.main:
        check_folder(drawing)
        write_text(drawing.folder / PLAN, json.dumps(drawing.key, indent=1) + "\n")
    workers.barrier()


def check_folder(drawing: Drawing) -> None:
    """Check that a folder can be written, and is new, empty or of the same images; of others, a difference is named."""
    if drawing.folder is None:
        return
    file, other = drawing.folder / PLAN, "choose another --keep-images"
    check_output(file, folder=False)
    if not file.exists():
        if any(drawing.folder.glob("[!.]*")):  # a killed command leaves .plan.json.*
            raise ValueError(f"{drawing.folder} holds files but no {PLAN}: {other}")
        return
    try:
        before = dict(json.loads(file.read_text()))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is damaged ({error}): {other}") from None
    for name, value in json.loads(json.dumps(drawing.key)).items():
        if before.get(name) != value:
            raise ValueError(
                f"{drawing.folder} holds images of {name} {before.get(name)!r}, expected {value!r}: {other}"
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
    space = drawing.pipeline.config.space
    header = {"descr": "|u1", "fortran_order": False, "shape": (drawing.count, *space.image_size, 3)}
    with atomic_path(target) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as stream:
            np.lib.format.write_array_header_1_0(stream, header)
            for _, images, _ in draw_shards(drawing, label="writing images.npz"):
                stream.write(images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().numpy().tobytes())
        with archive.open("arr_1.npy", "w") as stream:
            np.lib.format.write_array(stream, drawing.labels(range(drawing.count)).numpy())
    return target
