"""The verbs that measure: evaluate and compare."""

import contextlib
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast, get_args

from marval.cli.arguments import usable_device
from marval.config import Checked, Count, Order, Positive, Size, Template, Whole
from marval.presets import TuneConfig

if TYPE_CHECKING:
    from marval.evaluate.evaluate import KeepImages
    from marval.evaluate.results import Models
    from marval.runtime.distributed import Workers

REAL_SAMPLE = 10_000  # real images that KID, precision and recall are measured on


@dataclass(frozen=True)
class Measured(Checked):
    """what to measure"""

    samples: Whole = 10_000  # images for the figures of quality; 0: none
    seed: tuple[int, ...] = (0,)  # of the samples; several: a row for each, and their spread
    batches: tuple[Count, ...] = (1, 64)  # batch sizes to time, all models in turns; nothing behind it: no timing
    repeats: Whole = 5  # timed rounds after one that warms up; 0: only that one, for runs of many minutes
    budget: Positive | None = None  # seconds an image (at the first batch size): name the best setting within them
    rewards: str | None = None  # measure these instead, over all classes, as "clip,image-reward"; nothing is timed
    prompt: Template = TuneConfig().prompt  # of --rewards; {} is the class's name


@dataclass(frozen=True)
class Sampling(Checked):
    """how to draw (each model's own way when left out)"""

    iterations: tuple[int, ...] = ()  # the numbers K of AR iterations
    diffusion_steps: tuple[int, ...] = ()  # T of the teachers' chains, one or several
    guidance: tuple[float, ...] = ()  # w of the teachers, one or several; 1 is none
    temperature: float | None = None  # of the teachers' chains
    order: Order | None = None  # in which tokens are drawn
    autocast: bool = False  # draw in bf16, for the figures and for the times
    batch_size: Count | None = None  # images drawn at a time for the figures (250, or 50 of latents); it changes none


@dataclass(frozen=True)
class Against(Checked):
    """what to compare with"""

    data: str | None = None  # the real images; the first model's when left out
    judge: Path | None = None  # the held-out classifier (marval train classifier); bundled for Fashion-MNIST
    features: str | None = None  # file.py:function in EfficientNet's place: byte images (B, C, H, W) to (B, F)
    reference: Path | None = None  # a file in the real images' place: ADM's .npz (FID, IS, sFID), or statistics


@dataclass(frozen=True)
class Results(Checked):
    """output"""

    out: Path = Path("results/evaluate.json")  # rows that it holds are not measured again; commands may share it
    plot: Path | None = None  # a picture of quality against time per image (needs matplotlib)
    keep_images: Path | None = None  # a folder that keeps the images; a run that was killed goes on there
    image_format: Literal["shards", "png", "npz"] = "shards"  # of them: also PNG files, or one .npz in ADM's format
    device: str = "auto"  # auto, cpu, cuda, ...


def evaluate(
    models: tuple[str, ...] = (), *, measured: Measured, sampling: Sampling, against: Against, results: Results
) -> None:
    """Measure models: quality (Fréchet distance, precision, recall, held-out accuracy) and speed (time, FLOPs).

    marval evaluate fashion-teacher fashion-student --iterations 4 8 16 --samples 2000 --seed 0 1 2
    marval evaluate imagenet256-base --samples 0 --iterations 16 --batches 1

    Distances, precision and recall are on EfficientNet's features (or --features) and named so: they are not the
    published figures, and compare with each other only, at equal numbers of samples. After a ± comes one standard
    error of the mean, over the seeds, or for rewards over the images.

    Args:
        models: bundled models, models' or runs' folders; imagenet256-base, -large, -huge: a full-size teacher and its
            student with random weights (only with --samples 0)
    """
    check_request(models, measured, against, results)
    with measuring_workers(results.device) as workers:
        sizes = full_sizes(models)
        if sizes:
            if workers.main:
                measure_full_size(sizes, measured, sampling, results.out, str(workers.device))
            return
        loaded = models_to_measure(models, sampling, workers)
        if measured.rewards is not None:
            measure_rewards(loaded, measured, sampling, results, workers)
            return
        if measured.samples:
            measure_quality(loaded, measured, sampling, against, results, workers)
        if workers.main:
            if measured.batches:
                measure_speed(loaded, measured, sampling, results.out)
            show(loaded, measured, results)


def full_sizes(models: tuple[str, ...]) -> list[Size]:
    """The sizes of those models that are full-size ones with random weights."""
    sizes = [name.removeprefix("imagenet256-") for name in models if name.startswith("imagenet256-")]
    return [cast(Size, size) for size in sizes if size in get_args(Size)]


def check_request(models: tuple[str, ...], measured: Measured, against: Against, results: Results) -> None:
    """Refuse what cannot be measured, or written, before models are loaded.

    Raises:
        ValueError: settings that do not go together, a file that cannot be written, or one that holds other things.
    """
    from marval.evaluate.plots import need_matplotlib
    from marval.evaluate.results import read_results
    from marval.io.files import check_output

    others = [f"--{name}" for name, value in vars(against).items() if value is not None]
    if measured.rewards is not None and others:
        raise ValueError(f"{', '.join(others)}: not with --rewards, which are measured instead; run them apart")
    if not models:
        raise ValueError("name at least one model, for example fashion-student")
    sizes = full_sizes(models)
    if sizes and (len(sizes) < len(models) or measured.samples):
        raise ValueError(f"imagenet256-{sizes[0]} has random weights: time it by itself, with --samples 0")
    if results.image_format != "shards" and results.keep_images is None:
        raise ValueError(f"--image-format {results.image_format}: say where with --keep-images DIR")
    if (measured.budget or results.plot) and not measured.batches:
        raise ValueError("--budget and --plot need times: name a batch size with --batches")
    if not measured.samples and not measured.batches:
        raise ValueError("--samples 0 without --batches: there is nothing to measure")
    check_output(results.out, folder=False)
    read_results(results.out)
    if results.plot is not None:
        check_output(results.plot, folder=False)
        need_matplotlib()


@contextlib.contextmanager
def measuring_workers(device: str) -> Iterator["Workers"]:
    """The processes that draw; SIGTERM ends them at once, as there is nothing to save: finished rows are whole."""
    from marval.runtime.distributed import start_workers

    with start_workers(usable_device(device)) as workers:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        yield workers


def models_to_measure(models: tuple[str, ...], sampling: Sampling, workers: "Workers") -> "Models":
    """The models, a teacher once for each T and w."""
    from marval.evaluate.inputs import load_models

    return load_models(
        models, str(workers.device), diffusion_steps=sampling.diffusion_steps, guidance=sampling.guidance,
        temperature=sampling.temperature, order=sampling.order,
    )  # fmt: skip


def measure_quality(
    models: "Models", measured: Measured, sampling: Sampling, against: Against, results: Results, workers: "Workers"
) -> None:
    """Draw images of every model and write their figures."""
    from marval.evaluate.evaluate import evaluate
    from marval.evaluate.inputs import judge_for

    judge = judge_for(
        models[0][1], against.data, against.judge, workers, features=against.features, reference=against.reference,
        sample=REAL_SAMPLE,
    )  # fmt: skip
    evaluate(
        models, judge, iterations=sampling.iterations, samples=measured.samples, out=results.out, seeds=measured.seed,
        autocast=sampling.autocast, batch_size=sampling.batch_size, keep=kept_images(results), workers=workers,
    )  # fmt: skip


def measure_rewards(
    models: "Models", measured: Measured, sampling: Sampling, results: Results, workers: "Workers"
) -> None:
    """Draw images of every model and write their rewards."""
    from marval.evaluate.rewards import evaluate_rewards
    from marval.rewards import find_reward

    names = [name.strip() for name in (measured.rewards or "").split(",")]
    evaluate_rewards(
        models, {name: find_reward(name, device=workers.device) for name in names}, prompt=measured.prompt,
        iterations=sampling.iterations, samples=measured.samples, out=results.out, seeds=measured.seed,
        autocast=sampling.autocast, batch_size=sampling.batch_size, keep=kept_images(results), workers=workers,
    )  # fmt: skip


def kept_images(results: Results) -> "KeepImages | None":
    """Where the images are kept, if they are."""
    from marval.evaluate.evaluate import KeepImages

    return None if results.keep_images is None else KeepImages(results.keep_images, results.image_format)


def measure_speed(models: "Models", measured: Measured, sampling: Sampling, out: Path) -> None:
    """Time every model, in turns."""
    from marval.evaluate.evaluate import time_models

    time_models(
        models, iterations=sampling.iterations, batches=measured.batches, repeats=measured.repeats, out=out,
        autocast=sampling.autocast,
    )  # fmt: skip


def measure_full_size(sizes: list[Size], measured: Measured, sampling: Sampling, out: Path, device: str) -> None:
    """Time full-size teachers and students with random weights."""
    from marval.evaluate.bench import bench, random_pair

    steps = next(iter(sampling.diffusion_steps), None)
    pipelines = [
        pipeline.with_chain(diffusion_steps=steps) if pipeline.config.draw.kind == "chain" else pipeline
        for size in sizes
        for pipeline in random_pair(size, device)
    ]
    bench(
        pipelines, iterations=sampling.iterations, batches=measured.batches, repeats=measured.repeats, out=out,
        autocast=sampling.autocast,
    )  # fmt: skip


def show(models: "Models", measured: Measured, results: Results) -> None:
    """The table of what was measured; the best setting within the budget, and the plot."""
    from marval.evaluate.pareto import best_within, points_of, verdicts
    from marval.evaluate.plots import draw_pareto
    from marval.evaluate.tables import print_table

    print_table(results.out)
    if not (measured.samples and measured.batches):
        return
    batch, names = measured.batches[0], {pipeline.config.name for _, pipeline in models}
    points = points_of(results.out, part="timing", batch=batch, samples=measured.samples, only=names, report=print)
    for line in verdicts(points):
        print(line)
    if measured.budget is not None:
        print(best_within(points, measured.budget))
    if results.plot is not None:
        draw_pareto(points, results.plot, batch)
        print(results.plot)


def compare(first: Path, second: Path) -> None:
    """Say what differs between two results files, and whether a difference is more than chance over seeds makes.

    marval compare results/fashion-sweep.json results/mine.json
    marval compare student.json tuned.json

    Where each file holds one model (of a teacher at one T and w), they are compared whoever they are: a teacher and a
    student, say. Measure three seeds or more (--seed 0 1 2): of one in each file nothing can be said. Seeds are of the
    drawn images: what another training would give, they do not tell.

    Args:
        first: a results file of marval evaluate
        second: another
    """
    from rich.console import Console
    from rich.table import Table

    from marval.evaluate.compare import compare as compared

    lines, rows = compared(first, second)
    for line in summarized(lines):
        print(line)
    differ = [row for row in rows if row.verdict == "a difference"]
    table = Table("setting", "figure", str(first), str(second), "change", "by chance, up to", title="Differences")
    for row in differ:
        change = f"{row.second - row.first:+.4g}"
        table.add_row(row.setting, row.figure, f"{row.first:.6g}", f"{row.second:.6g}", change, f"{row.chance:.4g}")
    if differ:
        Console(width=None if sys.stdout.isatty() else 140).print(table)
    for verdict, count in Counter(row.verdict for row in rows if row not in differ).items():
        print(f"{count} of {len(rows)} figures: {verdict}")
    print("Chance: 95 % of Student's t-test over seeds (paired where both have the same), over images or over rounds.")


def summarized(lines: list[str]) -> list[str]:
    """Lines on what made two files differ; of settings that one file alone has, the number."""
    alone = Counter(line.partition(":")[0] for line in lines if line.startswith("only in "))
    others = [line for line in lines if not line.startswith("only in ")]
    return [*others, *(f"{where}: {count} settings" for where, count in alone.items())]
