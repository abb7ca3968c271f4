"""Quality: figures of models' images, one row for each (model, K, seed), written as JSON after every row."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from marval.evaluate.draw import (
    PLAN,
    SEEDS,
    Drawing,
    Images,
    Labels,
    check_finite,
    check_folder,
    claim_folder,
    draw_shards,
    write_npz,
)
from marval.evaluate.judge import Columns, Judge
from marval.evaluate.metrics import METRICS
from marval.evaluate.models import Models, runs_of
from marval.evaluate.results import Row, Setting, check_rows, figures_of, merge_results, read_results, version_of
from marval.evaluate.speed import flops_per_image
from marval.io.files import check_output
from marval.runtime.distributed import Workers
from marval.runtime.provenance import made_by

Report = Callable[[str], None]
Score = Callable[[Images, Labels], Columns]


@dataclass(frozen=True)
class Quality:
    """Which images are measured, and where they are kept."""

    iterations: tuple[int, ...] = ()  # K; each model's own when empty
    samples: int = 10_000
    seeds: tuple[int, ...] = (0,)  # a row for each
    autocast: bool = False  # draw in bf16
    batch_size: int | None = None  # images drawn at a time, which changes none of them
    keep_images: Path | None = None  # a folder that all processes see
    npz: bool = False  # write the kept images as one file in ADM's format too

    def __post_init__(self) -> None:
        if not 2 <= self.samples <= SEEDS:  # more would have the next seed's noise
            raise ValueError(f"--samples {self.samples}: expected 2 to {SEEDS:,}; for more add seeds")
        if self.npz and self.keep_images is None:
            raise ValueError("--npz: say where with --keep-images DIR")


@dataclass(frozen=True)
class Job:
    """One evaluation: images to draw, and the settings that identify their row."""

    drawing: Drawing
    key: Row
    folder: Path | None  # keeps the images
    npz: bool

    @property
    def plan(self) -> Row:
        """Describe the images of the folder."""
        return {**self.key, "shard": self.drawing.shard}

    def columns(self, score: Score, workers: Workers, report: Report) -> Columns:
        """Draw the images, score each, and gather the scores in order on the main process (elsewhere {}).

        Every process draws and scores its own shards.

        Raises:
            ValueError: a score is not finite; the image's seed and class are named.
        """
        drawing, parts = self.drawing, dict[int, Columns]()
        if self.folder is not None:
            claim_folder(self.folder, self.plan, workers)
        label = f"drawing {Setting.of(self.key)}, seed {drawing.seed}"
        for rows, images, labels in draw_shards(drawing, self.folder, workers, report, label):
            parts[rows.start] = score(images, labels)
            for name, values in parts[rows.start].items():
                check_finite(name, values, drawing.names(rows))
        workers.barrier()
        if self.npz and self.folder is not None and workers.main:
            report(f"{write_npz(drawing, self.folder)}")
        gathered = {start: part for own in workers.collect(parts) for start, part in own.items()}
        ordered = [gathered[start] for start in sorted(gathered)]
        return {name: torch.cat([part[name] for part in ordered]) for name in ordered[0]} if ordered else {}


def jobs_of(models: Models, settings: Quality) -> list[Job]:
    """Make a job for every model, K and seed.

    Raises:
        ValueError: a K that a model has not, or two models share a name.
    """
    jobs = []
    for pipeline, run in runs_of(models, settings.iterations, settings.autocast):
        for seed in dict.fromkeys(settings.seeds):
            k, key = run["iterations"], run | {"samples": settings.samples, "seed": seed}
            drawing = Drawing(pipeline, settings.samples, k, seed, settings.autocast, settings.batch_size)
            folder = None if settings.keep_images is None else settings.keep_images / folder_name(key)
            jobs.append(Job(drawing, key, folder, settings.npz))
    return jobs


def folder_name(key: Row) -> str:
    """The name of the folder that a row's images are kept in."""
    draw = key["draw"]
    chain = f"-T{draw['diffusion_steps']}-w{draw['guidance']:g}" if key["teacher"] else ""
    return f"{key['model'] or 'model'}-K{key['iterations']}{chain}-seed{key['seed']}-{key['samples']}"


def check_jobs(jobs: list[Job], about: Row, part: str, out: Path) -> None:
    """Check, before anything is drawn, that rows and images can be kept.

    Raises:
        ValueError: `out` or a folder cannot be written, or holds others.
    """
    check_output(out, folder=False)
    check_rows([job.key | about for job in jobs], read_results(out), part, out)
    for job in jobs:
        if job.folder is not None:
            check_output(job.folder / PLAN, folder=False)
            check_folder(job.folder, job.plan)


def measure_quality(
    models: Models,
    judge: Judge,
    settings: Quality,
    out: Path,
    workers: Workers | None = None,
    report: Report = print,
) -> list[Row]:
    """Measure the figures of every model at every K and seed, and keep them in `out` after each row.

    Rows that `out` holds already are not measured again, unless by another version of the metrics.

    Raises:
        ValueError: models draw other classes, an image or figure is not finite, or what `jobs_of`, `check_jobs` and
            the judge raise.
    """
    workers = workers or Workers()
    check_alike(models)
    jobs, rows = jobs_of(models, settings), read_results(out).get("quality", [])
    if workers.main:  # it alone knows the real images
        check_jobs(jobs, judge.about, "quality", out)
        judge.check_count(settings.samples)
    done = workers.agree([any(complete(row, job.key, judge) for row in rows) for job in jobs])
    bias: dict[str, float] = {}
    if not all(done):
        judge.check_images(models[0][1])
        if workers.main and (warning := judge.warning(settings.samples)) is not None:
            bias = {"fid_bias" if judge.real is None else "fd_bias": warning[1]}
            report(f"warning: {warning[0]}")
    for job, measured in zip(jobs, done, strict=True):
        if measured:
            if job.folder is not None:  # the images may be wanted still
                job.columns(lambda *_: {}, workers, report)
            continue
        began = time.monotonic()
        columns = job.columns(judge.columns, workers, report)
        if workers.main:
            figures = judge.figures_of(columns)
            if math.isnan(figures["diversity"]):
                report(f"{job.key['model']}: no diversity, which needs two images of a class: raise --samples")
                del figures["diversity"]
            row = {**job.key, "metrics": METRICS, **figures, **bias}
            line = "  ".join(f"{name} {value:.4g}" for name, value in figures_of(row).items())
            row["gflops_per_image"] = flops_per_image(job.drawing.pipeline.config, job.drawing.iterations) / 1e9
            row |= {**judge.about, "made": made_by(job.drawing.pipeline.device, workers.count)}
            merge_results(out, "quality", [row])
            report(f"{Setting.of(row)}, seed {row['seed']}: {line}  ({time.monotonic() - began:.0f} s)")
    workers.barrier()
    return read_results(out).get("quality", [])


def check_alike(models: Models) -> None:
    """Check that models draw the same classes in pictures of one form, so that one judge serves them all."""
    configs = [pipeline.config for _, pipeline in models]
    forms = [(c.class_names, c.space.image_size, c.space.channels) for c in configs]
    for config, form in zip(configs, forms, strict=True):
        if form != forms[0]:
            names = f"{config.name} and {configs[0].name}"
            raise ValueError(f"{names} draw other classes or another form of pictures: measure them apart")


def holds(row: Row, key: Row) -> bool:
    """Tell whether a row was measured at `key`, by today's metrics."""
    return version_of(row) == METRICS and all(row.get(name) == value for name, value in key.items())


def complete(row: Row, key: Row, judge: Judge) -> bool:
    """Tell whether a row has every figure that the judge gives at `key`, by today's metrics."""
    wanted: dict[str, object] = {"fd": judge.real, "accuracy": judge.classifier, "fid": judge.reference}
    wanted[f"{judge.network.prefix}_kid"] = judge.sample
    return holds(row, key) and all(name in row for name, source in wanted.items() if source is not None)
