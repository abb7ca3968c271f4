"""Quality: figures of models' images, one row for each (model, K, seed), written as JSON after every row."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from marval.evaluate.draw import (
    PLAN,
    SEEDS,
    Drawing,
    Format,
    Images,
    Labels,
    check_finite,
    check_folder,
    claim_folder,
    draw_shards,
    iterations_of,
    write_npz,
    write_pngs,
)
from marval.evaluate.judge import Columns, Judge
from marval.evaluate.metrics import METRICS
from marval.evaluate.results import (
    Models,
    Row,
    check_measure,
    describe,
    figures_of,
    merge_results,
    model_hashes,
    named,
    read_results,
    version_of,
)
from marval.evaluate.speed import flops_per_image
from marval.io.files import check_output
from marval.pipeline import Pipeline
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
    image_format: Format = "shards"  # png and npz come beside the shards

    def __post_init__(self) -> None:
        if not 2 <= self.samples <= SEEDS:  # more would have the next seed's noise
            raise ValueError(f"--samples {self.samples}: expected 2 to {SEEDS:,}; for more add seeds")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"--batch-size {self.batch_size}: expected at least 1")
        if self.image_format != "shards" and self.keep_images is None:
            raise ValueError(f"--image-format {self.image_format}: say where with --keep-images DIR")


@dataclass(frozen=True)
class Job:
    """One evaluation: images to draw, and the settings that identify their row."""

    drawing: Drawing
    key: Row
    folder: Path | None  # keeps the images
    image_format: Format

    @property
    def plan(self) -> Row:
        """Describe the images of the folder."""
        return {**self.key, "shard": self.drawing.shard}

    def check(self) -> None:
        """Check that the images can be kept.

        Raises:
            ValueError: the folder cannot be written, or holds others.
        """
        if self.folder is not None:
            check_output(self.folder / PLAN, folder=False)
            check_folder(self.folder, self.plan)

    def columns(self, score: Score, workers: Workers, report: Report) -> Columns:
        """Draw the images, score each, and gather the scores in order on the main process (elsewhere {}).

        Every process draws and scores its own shards.

        Raises:
            ValueError: a score is not finite; the image's seed and class are named.
        """
        drawing, parts = self.drawing, dict[int, Columns]()
        if self.folder is not None:
            claim_folder(self.folder, self.plan, workers)
        label = f"drawing {named(self.key)}, seed {drawing.seed}"
        for rows, images, labels in draw_shards(drawing, self.folder, workers, report, label):
            parts[rows.start] = score(images, labels)
            for name, values in parts[rows.start].items():
                check_finite(name, values, drawing.names(rows))
        if self.folder is not None:
            self._export(self.folder, workers, report)
        gathered = {start: part for own in workers.collect(parts) for start, part in own.items()}
        ordered = [gathered[start] for start in sorted(gathered)]
        return {name: torch.cat([part[name] for part in ordered]) for name in ordered[0]} if ordered else {}

    def _export(self, folder: Path, workers: Workers, report: Report) -> None:
        workers.barrier()
        if self.image_format == "png":
            write_pngs(self.drawing, folder, workers)
        if self.image_format == "npz" and workers.main:
            report(f"{write_npz(self.drawing, folder)}")


def jobs_of(models: Models, settings: Quality, out: Path) -> list[Job]:
    """Make a job for every model, K and seed.

    Raises:
        ValueError: a K that a model has not, two models share a name, or `out` holds figures of other weights under
            one.
    """
    jobs = []
    for (_, pipeline), digest in zip(models, model_hashes(models, out), strict=True):
        for k in iterations_of(pipeline, settings.iterations):
            for seed in dict.fromkeys(settings.seeds):
                drawing = Drawing(pipeline, settings.samples, k, seed, settings.autocast, settings.batch_size)
                key = {**describe(pipeline), "sha256": digest, "iterations": k, "samples": settings.samples}
                key |= {"seed": seed, "autocast": settings.autocast}
                folder = None if settings.keep_images is None else settings.keep_images / folder_name(key)
                jobs.append(Job(drawing, key, folder, settings.image_format))
    return jobs


def folder_name(key: Row) -> str:
    """The name of the folder that a row's images are kept in."""
    draw = key["draw"]
    chain = f"-T{draw['diffusion_steps']}-w{draw['guidance']:g}" if key["teacher"] else ""
    return f"{key['model'] or 'model'}-K{key['iterations']}{chain}-seed{key['seed']}-{key['samples']}"


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
        ValueError: models draw other classes, `out` cannot be written or was measured otherwise, what `jobs_of` and
            the judge raise, or an image or figure is not finite.
    """
    workers = workers or Workers()
    check_alike([pipeline for _, pipeline in models])
    jobs, rows = jobs_of(models, settings, out), read_results(out).get("quality", [])
    if workers.main:  # it alone knows the real images
        check_output(out, folder=False)
        for job in jobs:
            job.check()
        judge.check_count(settings.samples)
        check_measure(judge.about, rows, out)
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
            row = {**job.key, "metrics": METRICS, **defined_figures(judge, columns, job, report), **bias}
            line = "  ".join(f"{name} {value:.4g}" for name, value in figures_of(row).items())
            row["gflops_per_image"] = flops_per_image(job.drawing.pipeline.config, job.drawing.iterations) / 1e9
            row |= {**judge.about, "made": made_by(job.drawing.pipeline.device, workers.count)}
            merge_results(out, "quality", [row])
            report(f"{named(row)}, seed {row['seed']}: {line}  ({time.monotonic() - began:.0f} s)")
    workers.barrier()
    return read_results(out).get("quality", [])


def defined_figures(judge: Judge, columns: Columns, job: Job, report: Report) -> dict[str, float]:
    """Compute the judge's figures; leave out a diversity that is not defined, with a message."""
    figures = judge.figures_of(columns)
    if math.isnan(figures["diversity"]):
        report(f"{job.key['model']}: no diversity, which needs two images of a class: raise --samples")
        del figures["diversity"]
    return figures


def check_alike(pipelines: Sequence[Pipeline]) -> None:
    """Check that models draw the same classes in pictures of one form, so that one judge serves them all.

    Raises:
        ValueError: they do not.
    """

    def form(pipeline: Pipeline) -> tuple[object, ...]:
        space = pipeline.config.space
        return pipeline.config.class_names, space.image_size, getattr(space, "channels", 3)

    for pipeline in pipelines:
        if form(pipeline) != form(pipelines[0]):
            raise ValueError(
                f"{pipeline.config.name} and {pipelines[0].config.name} draw other classes or another form of "
                "pictures: measure them apart"
            )


def holds(row: Row, key: Row) -> bool:
    """Tell whether a row was measured at `key`, by today's metrics."""
    return version_of(row) == METRICS and all(row.get(name) == value for name, value in key.items())


def complete(row: Row, key: Row, judge: Judge) -> bool:
    """Tell whether a row has every figure that the judge gives at `key`, by today's metrics."""
    wanted: dict[str, object] = {"fd": judge.real, f"{judge.prefix}_kid": judge.sample, "accuracy": judge.classifier}
    wanted["fid"] = judge.reference
    return holds(row, key) and all(name in row for name, source in wanted.items() if source is not None)
