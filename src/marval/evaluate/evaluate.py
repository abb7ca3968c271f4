"""`marval evaluate`: figures of one or more models, one row per (model, K, seed), written as JSON after every row."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from marval.evaluate.fidelity import Columns
from marval.evaluate.flops import model_flops
from marval.evaluate.images import (
    PLAN,
    SEEDS,
    DrawnImages,
    Keep,
    check_finite,
    check_plan,
    claim_folder,
    draw_shards,
    write_npz,
    write_pngs,
)
from marval.evaluate.judge import Judge
from marval.evaluate.metrics import METRICS
from marval.evaluate.results import (
    Models,
    Row,
    check_measure,
    describe,
    figures_of,
    measured_rows,
    merge_results,
    model_hashes,
    named,
    read_results,
    version_of,
)
from marval.evaluate.timing import drawing, in_turns, timed_row
from marval.io.files import check_output
from marval.pipeline import Pipeline
from marval.runtime.distributed import Workers
from marval.runtime.provenance import made_by
from marval.sampling import draw_counts


def flops_per_image(pipeline: Pipeline, iterations: int) -> int:
    """Floating-point operations (2 per multiply-add) of matrix products and attention for one image."""
    return model_flops(pipeline.config, draw_counts(pipeline.config.mar.num_tokens, iterations)).total


@dataclass(frozen=True)
class KeepImages:
    """Where drawn images are kept, and in which form besides shards."""

    folder: Path
    form: Keep = "shards"

    def place(self, key: Row) -> Path:
        """The folder of a row's images."""
        draw = key["draw"]
        chain = f"-T{draw['diffusion_steps']}-w{draw['guidance']:g}" if key["teacher"] else ""
        name = f"{key['model'] or 'model'}-K{key['iterations']}{chain}-seed{key['seed']}-{key['samples']}"
        return self.folder / name

    def claim(self, key: Row, workers: Workers) -> DrawnImages:
        """The folder of a row's images (see `claim_folder`)."""
        return claim_folder(self.place(key), key, key["samples"], workers=workers)

    def export(self, drawn: DrawnImages, workers: Workers, report: Callable[[str], None]) -> None:
        """Write the other form, once every process has drawn its share."""
        workers.barrier()
        if self.form == "png":
            write_pngs(drawn, workers)
        if self.form == "npz" and workers.main:
            report(f"{write_npz(drawn)}")


@dataclass(frozen=True)
class Evaluation:
    """One evaluation: a model, and the settings that identify its row (`key`)."""

    pipeline: Pipeline
    key: Row
    batch_size: int | None = None  # images drawn at a time, which changes none of them

    def columns(
        self,
        judge: Callable[[UInt8[Tensor, "n c h w"], Int[Tensor, " n"]], Columns],
        keep: KeepImages | None,
        workers: Workers,
        report: Callable[[str], None],
    ) -> Columns:
        """Draw the images, score each with `judge`, and gather the scores in order on the main process (elsewhere {}).

        Every process draws and judges its own shards.

        Raises:
            ValueError: a score that is not finite; the image's seed and class are named.
        """
        key, parts = self.key, dict[int, Columns]()
        into = None if keep is None else keep.claim(key, workers)
        for rows, images, labels in draw_shards(
            self.pipeline, key["samples"], key["iterations"], key["seed"], autocast=key["autocast"], into=into,
            workers=workers, report=report, batch_size=self.batch_size,
            label=f"drawing {named(key)}, seed {key['seed']}",
        ):  # fmt: skip
            parts[rows.start] = judge(images, labels)
            names = self.pipeline.config.class_names
            seeds = [key["seed"] * SEEDS + i for i in rows]
            whose = [f"seed {s}, class {names[c]}" for s, c in zip(seeds, labels.tolist(), strict=True)]
            for name, values in parts[rows.start].items():
                check_finite(name, values, whose)
        if keep is not None and into is not None:
            keep.export(into, workers, report)
        found = {start: part for own in workers.collect(parts) for start, part in own.items()}
        ordered = [found[start] for start in sorted(found)]
        return {name: torch.cat([part[name] for part in ordered]) for name in ordered[0]} if ordered else {}


def evaluations_of(
    models: Models,
    hashes: Sequence[str],
    *,
    iterations: Sequence[int],
    samples: int,
    seeds: Sequence[int],
    autocast: bool,
    batch_size: int | None = None,
) -> list[Evaluation]:
    """Every model at every K (its own default when none is given) with every seed.

    Raises:
        ValueError: a K that a model has not, a batch of none, or too few or too many samples.
    """
    if not 2 <= samples <= SEEDS:  # more would have the next seed's noise
        raise ValueError(f"--samples {samples}: expected at least 2 and at most {SEEDS:,}; for more add seeds")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"--batch-size {batch_size}: expected at least 1")
    return [
        Evaluation(pipeline, {
            **describe(pipeline), "sha256": digest, "iterations": k, "samples": samples, "seed": seed,
            "autocast": autocast,
        }, batch_size)
        for (_, pipeline), digest in zip(models, hashes, strict=True)
        for k in iterations_of(pipeline, iterations)
        for seed in dict.fromkeys(seeds)
    ]  # fmt: skip


def iterations_of(pipeline: Pipeline, iterations: Sequence[int]) -> tuple[int, ...]:
    """The numbers K that are asked for, each once, or the model's default.

    Raises:
        ValueError: a K that the model has not.
    """
    tokens = pipeline.config.mar.num_tokens
    for k in iterations:
        if not 1 <= k <= tokens:
            raise ValueError(f"--iterations {k}: expected 1 to {tokens} for {pipeline.config.name}")
    return tuple(dict.fromkeys(iterations)) or (pipeline.default_iterations,)


def evaluate(
    models: Models,
    judge: Judge,
    *,
    iterations: Sequence[int],
    samples: int,
    out: Path,
    seeds: Sequence[int] = (0,),
    autocast: bool = False,
    batch_size: int | None = None,
    keep: KeepImages | None = None,
    workers: Workers | None = None,
    report: Callable[[str], None] = print,
) -> list[Row]:
    """Figures of every model at every K and seed, kept in `out` after each row.

    Rows that `out` holds already are not measured again, but for those of another version of the metrics.

    Raises:
        ValueError: two models share a name or draw other classes, `out` cannot be written or holds figures of other
            weights under the same name, on other features or against other data; what `evaluations_of` raises; or an
            image or figure is not finite.
    """
    workers = workers or Workers()
    check_alike([pipeline for _, pipeline in models])
    rows: list[Row] = read_results(out).get("quality", {}).get("rows", [])
    hashes = model_hashes(models, measured_rows(out), out)
    evaluations = evaluations_of(
        models, hashes, iterations=iterations, samples=samples, seeds=seeds, autocast=autocast, batch_size=batch_size
    )
    if workers.main:  # it alone knows the real images, and its file decides: others may see an older one
        check_places(evaluations, out, keep)
        judge.check_count(samples)
        check_measure(judge.about, rows, out)
    measured = workers.agree([any(complete(row, evaluation.key, judge) for row in rows) for evaluation in evaluations])
    bias: float | None = None
    if not all(measured):
        try_judge(judge, models[0][1])
        if workers.main and (warning := judge.warning(samples)) is not None:
            bias = warning[1]
            report(f"warning: {warning[0]}")
    for evaluation, done in zip(evaluations, measured, strict=True):
        key = evaluation.key
        if done:
            if keep is not None:
                evaluation.columns(lambda *_: {}, keep, workers, report)
            continue
        began = time.monotonic()
        columns = evaluation.columns(judge.columns, keep, workers, report)
        if workers.main:
            row = {**key, "metrics": METRICS, **figures_of_row(judge, columns, evaluation.pipeline.config.name, report)}
            if bias is not None:
                row["fid_bias" if judge.real is None else "fd_bias"] = bias
            shown = "  ".join(f"{name} {value:.4g}" for name, value in figures_of(row).items())
            row["gflops_per_image"] = flops_per_image(evaluation.pipeline, key["iterations"]) / 1e9
            row |= {**judge.about, "made": made_by(evaluation.pipeline.device, workers.count)}
            merge_results(out, "quality", [row], key["seed"])
            report(f"{named(row)}, seed {key['seed']}: {shown}  ({time.monotonic() - began:.0f} s)")
    workers.barrier()
    return read_results(out).get("quality", {}).get("rows", [])


def check_places(evaluations: Sequence[Evaluation], out: Path, keep: KeepImages | None) -> None:
    """Refuse what cannot be written, before anything is drawn.

    Raises:
        ValueError: `out` cannot be written, or a folder for images cannot or holds others.
    """
    check_output(out, folder=False)
    if keep is not None:
        check_output(keep.folder / PLAN, folder=False)
        for evaluation in evaluations:
            check_plan(keep.place(evaluation.key), evaluation.key)


def try_judge(judge: Judge, pipeline: Pipeline) -> None:
    """Judge two blank pictures such as a model draws: what cannot be judged is known before anything is drawn.

    Raises:
        ValueError: the real images are missing or too few, or the judge's networks do not take the pictures.
    """
    if judge.sample is not None:
        judge.sample()
    space = pipeline.config.space
    blank = torch.zeros(2, getattr(space, "channels", 3), *space.image_size, dtype=torch.uint8)
    judge.columns(blank, torch.zeros(2, dtype=torch.long))


def figures_of_row(judge: Judge, columns: Columns, name: str, report: Callable[[str], None]) -> dict[str, float]:
    """The judge's figures; a diversity that is not defined is left out, and said so.

    Raises:
        ValueError: any other figure is not finite.
    """
    figures = judge.figures_of(columns)
    if math.isnan(figures["diversity"]):
        report(f"{name}: no diversity, which needs two images of a class: raise --samples")
        del figures["diversity"]
    return figures


def check_alike(pipelines: Sequence[Pipeline]) -> None:
    """Models draw pictures of one form in the same classes, so that one judge serves them all.

    Raises:
        ValueError: they do not.
    """
    forms = [
        (p.config.class_names, p.config.space.image_size, getattr(p.config.space, "channels", 3)) for p in pipelines
    ]
    for pipeline, form in zip(pipelines, forms, strict=True):
        if form != forms[0]:
            raise ValueError(
                f"{pipeline.config.name} and {pipelines[0].config.name} draw other classes or another form of "
                "pictures: measure them apart"
            )


def is_row_of(row: Row, key: Row) -> bool:
    """Whether a row holds the figures of `key`."""
    return all(row.get(name) == value for name, value in key.items())


def complete(row: Row, key: Row, judge: Judge) -> bool:
    """Whether a row holds all figures of `key` that the judge gives, by today's metrics."""
    prefix = getattr(judge.network, "prefix", "own")
    wanted = {
        "fd": judge.real, f"{prefix}_kid": judge.sample, "accuracy": judge.classifier, "fid": judge.reference,
    }  # fmt: skip
    there = all(name in row for name, asked in wanted.items() if asked is not None)
    return there and is_row_of(row, key) and version_of(row) == METRICS


def time_models(
    models: Models,
    *,
    iterations: Sequence[int],
    batches: Sequence[int],
    repeats: int,
    out: Path,
    autocast: bool = False,
    report: Callable[[str], None] = print,
) -> list[Row]:
    """Seconds per image of every model at every K and batch size, in turns; they replace those at the same setting.

    Times are of what `Pipeline.sample` does, decoding included, in the precision that is asked for.

    Raises:
        ValueError: two models share a name, or `out` holds figures of other weights under one.
    """
    every: list[Row] = []
    settings = [
        (pipeline, digest, k)
        for (_, pipeline), digest in zip(models, model_hashes(models, measured_rows(out), out), strict=True)
        for k in iterations_of(pipeline, iterations)
    ]
    for batch in dict.fromkeys(batches):
        jobs = [drawing(pipeline, k, batch, autocast=autocast) for pipeline, _, k in settings]
        rows = []
        for (pipeline, digest, k), seconds in zip(settings, in_turns(jobs, repeats, models[0][1].device), strict=True):
            rows.append({**timed_row(pipeline, k, batch, seconds, autocast=autocast), "sha256": digest})
            report(f"{named(rows[-1])}, batch {batch}: {rows[-1]['seconds_per_image'] * 1000:.2f} ms/image")
        merge_results(out, "timing", rows)
        every += rows
    return every
