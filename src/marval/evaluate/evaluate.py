"""Quality and rewards of models' images: one row for each (model, K, seed), written as JSON after every row."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from marval.evaluate.draw import (
    SEEDS,
    Drawing,
    Images,
    Labels,
    check_folder,
    claim_folder,
    draw_bytes,
    draw_shards,
    write_npz,
)
from marval.evaluate.features import FEWEST, METRICS
from marval.evaluate.judge import Columns, Judge, RewardJudge
from marval.evaluate.models import Models, runs_of
from marval.evaluate.results import Row, Setting, check_rows, dials_of, figures_of, merge_results, read_results
from marval.evaluate.speed import flops_per_image
from marval.io.files import check_output
from marval.pipeline import Pipeline
from marval.runtime.distributed import Workers
from marval.runtime.provenance import made_by


@dataclass(frozen=True)
class Quality:
    """Which images are measured, and where they are kept."""

    iterations: tuple[int, ...] = ()  # K; each model's own when empty
    samples: int = 10_000
    seeds: tuple[int, ...] = (0,)  # a row for each
    batch_size: int | None = None  # images drawn at a time, which changes none of them
    keep_images: Path | None = None  # a folder that all processes see
    npz: bool = False  # write the kept images as one file in ADM's format too

    def __post_init__(self) -> None:
        if not FEWEST <= self.samples <= SEEDS:  # more would have the next seed's noise
            raise ValueError(f"--samples {self.samples}: expected {FEWEST} to {SEEDS:,}; for more add seeds")
        if self.npz and self.keep_images is None:
            raise ValueError("--npz: say where with --keep-images DIR")


def drawings_of(models: Models, settings: Quality) -> list[Drawing]:
    """The images to draw, of every model, K and seed, with the settings that identify their rows."""
    drawings = []
    for pipeline, run in runs_of(models, settings.iterations):
        for seed in dict.fromkeys(settings.seeds):
            folder, k = None, run["iterations"]
            if settings.keep_images is not None:
                draw = "".join(f"-{dial}{value}" for dial, value in dials_of(run["draw"]).items() if value)
                name = f"{run['model'] or 'model'}-K{k}{draw}-seed{seed}-{settings.samples}"
                folder = settings.keep_images / name
            key = run | {"samples": settings.samples, "seed": seed}
            drawings.append(Drawing(pipeline, settings.samples, k, seed, settings.batch_size, folder, key))
    return drawings


def columns_of(drawing: Drawing, score: Callable[[Images, Labels], Columns], workers: Workers) -> Columns:
    """Draw images, score each, and gather the scores in order on the main process (elsewhere {}).

    Every process draws and scores its own shards.
    """
    claim_folder(drawing, workers)
    label = f"drawing {Setting.of(drawing.key)}, seed {drawing.seed}"
    parts = {rows.start: score(images, labels) for rows, images, labels in draw_shards(drawing, workers, label)}
    workers.barrier()
    gathered = {start: part for own in workers.collect(parts) for start, part in own.items()}
    ordered = [gathered[start] for start in sorted(gathered)]
    return {name: torch.cat([part[name] for part in ordered]) for name in ordered[0]} if ordered else {}


def measure(
    models: Models, judge: Judge | RewardJudge, settings: Quality, out: Path, workers: Workers | None = None
) -> list[Row]:
    """Measure the judge's figures of every model at every K and seed, and keep them in `out` after each row.

    Rows that `out` holds already are not measured again, unless by another version of the metrics.

    Raises:
        ValueError: models draw other classes, an image or figure is not finite, `out` or a folder of images cannot be
            written or holds others, or what the judge raises.
    """
    workers = workers or Workers()
    check_alike(models)
    drawings = drawings_of(models, settings)
    if workers.main:  # it alone knows the real images
        check_output(out, folder=False)
        check_rows([drawing.key | judge.about for drawing in drawings], read_results(out), judge.part, out)
        for drawing in drawings:
            check_folder(drawing)
    before = read_results(out).get(judge.part, [])
    done = workers.agree([row_of(drawing, judge, before) for drawing in drawings])
    if None in done:  # a judge that cannot is found before anything is drawn
        space = models[0][1].config.space
        judge.columns(torch.zeros(1, space.channels, *space.image_size, dtype=torch.uint8), torch.tensor([0]))
    for drawing, row in zip(drawings, done, strict=True):
        began, columns = time.monotonic(), Columns()
        if row is None or drawing.folder is not None:  # images of a row that is there may be wanted still
            columns = columns_of(drawing, judge.columns if row is None else lambda *_: {}, workers)
        if not workers.main:
            continue
        if settings.npz and drawing.folder is not None:
            print(write_npz(drawing, drawing.folder))
        if row is None:
            row = {**drawing.key, "metrics": METRICS, **judge.figures_of(columns)}
            row["gflops_per_image"] = flops_per_image(drawing.pipeline.config, drawing.iterations) / 1e9
            row |= {**judge.about, "made": made_by(drawing.pipeline.device, workers.count)}
            merge_results(out, judge.part, [row])
        errors = {name: f" ± {score['standard_error']:.2g}" for name, score in row.get("rewards", {}).items()}
        figures = "  ".join(f"{name} {value:.4g}{errors.get(name, '')}" for name, value in figures_of(row).items())
        print(f"{Setting.of(row)}, seed {row['seed']}: {figures}  ({time.monotonic() - began:.0f} s)")
    workers.barrier()
    return read_results(out).get(judge.part, [])


def check_alike(models: Models) -> None:
    """Check that models draw the same classes in pictures of one form, so that one judge serves them all."""
    first, *others = (pipeline.config for _, pipeline in models)
    for config in others:
        a, b = ((c.class_names, c.styles, c.space.image_size, c.space.channels) for c in (first, config))
        if a != b:
            names = f"{config.name} and {first.name}"
            raise ValueError(f"{names} draw other classes or another form of pictures: measure them apart")


def row_of(drawing: Drawing, judge: Judge | RewardJudge, rows: list[Row]) -> Row | None:
    """Find the row of a drawing among those that were measured already, by today's metrics."""
    key = {"metrics": METRICS, **drawing.key}
    same = [row for row in rows if all(row.get(name) == value for name, value in key.items())]
    return next((row for row in same if judge.measured(row)), None)


def probe(
    judge: Judge, count: int, iterations: int, workers: Workers | None = None, held_out: RewardJudge | None = None
) -> Callable[[Pipeline], dict[str, float]]:
    """Make the small evaluation that training watches: all of the judge's figures, and `held_out`'s mean reward.

    All processes draw the same images each time; the main one judges them and tells the others.
    """
    workers = workers or Workers()

    def watch(pipeline: Pipeline) -> dict[str, float]:
        images, labels = draw_bytes(pipeline, count, iterations, seed=0, workers=workers)
        figures: dict[str, float] = {}
        if workers.main:
            figures = judge.figures(images, labels)
            if held_out is not None:
                (values,) = held_out.columns(images, labels).values()
                figures["held_out"] = float(values.mean())
        return workers.agree(figures)

    return watch
