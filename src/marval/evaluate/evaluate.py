"""`marval evaluate`: figures of one or more models, one row per (model, K, seed), written as JSON after every row."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from marval.evaluate.fidelity import Columns
from marval.evaluate.images import (
    DrawnImages,
    Keep,
    balanced_labels,
    claim_folder,
    draw_shards,
    write_npz,
    write_pngs,
)
from marval.evaluate.judge import Judge
from marval.evaluate.results import (
    Models,
    Row,
    check_measure,
    describe,
    measured_rows,
    model_hashes,
    named,
    read_results,
    replace_times,
    write_results,
)
from marval.evaluate.timing import Job, in_turns
from marval.flops import model_flops
from marval.parallel import Workers
from marval.pipeline import Pipeline
from marval.provenance import made_by
from marval.sampling import draw_counts


def flops_per_image(pipeline: Pipeline, iterations: int) -> int:
    """Floating-point operations (2 per multiply-add) of matrix products and attention for one image."""
    return model_flops(pipeline.config, draw_counts(pipeline.config.mar.num_tokens, iterations)).total


@dataclass(frozen=True)
class KeepImages:
    """Where drawn images are kept, and in which form besides shards."""

    folder: Path
    form: Keep = "shards"

    def claim(self, key: Row, workers: Workers) -> DrawnImages:
        """The folder of a row's images (see `claim_folder`)."""
        draw = key["draw"]
        chain = f"-T{draw['steps']}-w{draw['guidance']:g}" if key["teacher"] else ""
        name = f"{key['model'] or 'model'}-K{key['iterations']}{chain}-seed{key['seed']}-{key['samples']}"
        return claim_folder(self.folder / name, key, key["samples"], workers=workers)

    def export(self, drawn: DrawnImages, workers: Workers, report: Callable[[str], None]) -> None:
        """Write the other form, once every process has drawn its share."""
        workers.barrier()
        if self.form == "png":
            write_pngs(drawn, workers)
        if self.form == "npz" and workers.main:
            report(f"{write_npz(drawn)}")


@dataclass(frozen=True)
class Evaluation:
    """A model, and at which K and with which images it is judged (`key`): what a row of figures is of."""

    pipeline: Pipeline
    key: Row

    def columns(
        self,
        judge: Callable[[UInt8[Tensor, "n c h w"], Int[Tensor, " n"]], Columns],
        keep: KeepImages | None,
        workers: Workers,
        report: Callable[[str], None],
    ) -> Columns:
        """What `judge` says of every image, in order; every process draws and judges its own. Empty but on the main."""
        key, parts = self.key, dict[int, Columns]()
        into = None if keep is None else keep.claim(key, workers)
        for rows, images, labels in draw_shards(
            self.pipeline, key["samples"], key["iterations"], key["seed"], autocast=key["autocast"], into=into,
            workers=workers, report=report,
        ):  # fmt: skip
            parts[rows.start] = judge(images, labels)
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
) -> list[Evaluation]:
    """Every model at every K (its own default when none is given) with every seed.

    Raises:
        ValueError: a K that a model has not, or fewer than 2 samples.
    """
    if samples < 2:
        raise ValueError(f"--samples {samples}: expected at least 2")
    return [
        Evaluation(pipeline, {
            **describe(pipeline), "sha256": digest, "iterations": k, "samples": samples, "seed": seed,
            "autocast": autocast,
        })
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
    return tuple(dict.fromkeys(iterations)) or (pipeline.config.iterations,)


def evaluate(
    models: Models,
    judge: Judge,
    *,
    iterations: Sequence[int],
    samples: int,
    out: Path,
    seeds: Sequence[int] = (0,),
    autocast: bool = False,
    keep: KeepImages | None = None,
    workers: Workers | None = None,
    report: Callable[[str], None] = print,
) -> list[Row]:
    """Figures of every model at every K and seed, kept in `out` after each row; rows there already are not redone.

    Raises:
        ValueError: two models share a name or draw other classes, `out` holds figures of other weights under the same
            name, on other features or against other data, or what `evaluations_of` raises.
    """
    workers = workers or Workers()
    check_alike([pipeline for _, pipeline in models])
    rows: list[Row] = read_results(out).get("quality", {}).get("rows", [])
    hashes = model_hashes(models, measured_rows(out), out)
    if workers.main:  # it alone knows the real images
        check_measure(judge.about, rows, out)
    evaluations = evaluations_of(models, hashes, iterations=iterations, samples=samples, seeds=seeds, autocast=autocast)
    # The main process's file decides: others may see an older one.
    measured = workers.agree([any(complete(row, evaluation.key, judge) for row in rows) for evaluation in evaluations])
    bias: float | None = None
    if workers.main and not all(measured):
        if judge.sample is not None:
            judge.sample()  # real images that are missing are missed before anything is drawn
        if (warning := judge.warning(samples)) is not None:
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
            figures = {name: value for name, value in judge.figures_of(columns).items() if not math.isnan(value)}
            if bias is not None:
                figures["fid_bias" if judge.real is None else "fd_bias"] = bias
            rows = [row for row in rows if not is_row_of(row, key)]  # one without today's figures
            row = {**key, **figures, "gflops_per_image": flops_per_image(evaluation.pipeline, key["iterations"]) / 1e9}
            rows.append({**row, **judge.about, "made": made_by(evaluation.pipeline.device, workers.count)})
            write_results(out, "quality", rows, key["seed"])
            shown = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
            report(f"{named(row)}, seed {key['seed']}: {shown}  ({time.monotonic() - began:.0f} s)")
    workers.barrier()
    return rows


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
    """Whether a row holds all figures of `key` that the judge gives."""
    wanted = {"kid": judge.sample, "accuracy": judge.classifier, "fid": judge.reference}
    return is_row_of(row, key) and all(name in row for name, asked in wanted.items() if asked is not None)


def time_models(
    models: Models,
    *,
    iterations: Sequence[int],
    batches: Sequence[int],
    repeats: int,
    out: Path,
    report: Callable[[str], None] = print,
) -> list[Row]:
    """Seconds per image of every model at every K and batch size, in turns; they replace those at the same setting.

    Raises:
        ValueError: two models share a name, or `out` holds figures of other weights under one.
    """
    every: list[Row] = []
    settings = [
        (pipeline, digest, k)
        for (_, pipeline), digest in zip(models, model_hashes(models, measured_rows(out), out), strict=True)
        for k in iterations_of(pipeline, iterations)
    ]

    def drawing(pipeline: Pipeline, k: int, batch: int) -> Job:
        labels = balanced_labels(batch, len(pipeline.config.class_names))
        return lambda: pipeline.sample(labels, iterations=k, batch_size=batch)

    for batch in dict.fromkeys(batches):
        rows: list[Row] = []
        jobs = [drawing(pipeline, k, batch) for pipeline, _, k in settings]
        measured = in_turns(jobs, repeats, models[0][1].device)
        for (pipeline, digest, k), seconds in zip(settings, measured, strict=True):
            times = [one / batch for one in seconds]
            median = statistics.median(times)
            row = {**describe(pipeline), "sha256": digest, "iterations": k, "batch": batch}
            row |= {"seconds_per_image": median, "fastest": min(times), "slowest": max(times), "repeats": repeats}
            rows.append({**row, "made": made_by(pipeline.device)})
            report(f"{named(row)}, batch {batch}: {median * 1000:.2f} ms/image")
        replace_times(out, "timing", rows)
        every += rows
    return every
