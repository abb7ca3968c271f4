"""The verbs that measure: evaluate and compare."""

import signal
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from marval.checks import Checked
from marval.cli.arguments import usable_device
from marval.config import Count, Dtype, Order, Positive, Template, Whole
from marval.presets import TuneConfig

if TYPE_CHECKING:
    from marval.evaluate.models import Models


@dataclass(frozen=True)
class Measured(Checked):
    """what to measure"""

    samples: Whole = 10_000  # images for the figures of quality; 0: none
    seed: tuple[int, ...] = (0,)  # of the samples; several: a row for each, and their spread
    batches: tuple[Count, ...] = (1, 64)  # batch sizes to time (imagenet256-*: 1); nothing after it: none
    repeats: Whole = 5  # timed rounds after one that warms up; 0: only that one, for runs of many minutes
    budget: Positive | None = None  # seconds an image (at the first batch size): name the best setting within them
    rewards: str | None = None  # measure these instead, over all classes, as "clip,image-reward"; nothing is timed
    prompt: Template = TuneConfig().prompt  # of --rewards, of a class: {} is its name


@dataclass(frozen=True)
class Sampling(Checked):
    """how to draw (each model's own way when left out)"""

    iterations: tuple[int, ...] = ()  # the numbers K of AR iterations
    diffusion_steps: tuple[int, ...] = ()  # T of the teachers' chains, one or several
    guidance: tuple[float, ...] = ()  # w of teachers, and of students that take it, one or several; 1 is none
    temperature: tuple[float, ...] = ()  # of teachers' chains' noise, and of what students start from, one or several
    order: Order | None = None  # in which tokens are drawn
    dtype: Dtype = "float32"  # of the weights
    compile: bool = False  # compile the networks' blocks: on a GPU, for many pictures
    batch_size: Count | None = None  # images drawn at a time for the figures (250, or 50 of latents); it changes none


@dataclass(frozen=True)
class Against(Checked):
    """what to compare with"""

    data: str | None = None  # the real images; the first model's when left out
    judge: Path | None = None  # the held-out classifier (marval train classifier); bundled for Fashion-MNIST
    features: str | None = None  # in EfficientNet's place: pixels, classifier:FILE, or file.py:function of bytes
    reference: Path | None = None  # ADM's .npz in the real images' place: FID, IS, sFID


@dataclass(frozen=True)
class Results(Checked):
    """output"""

    out: Path = Path("results/evaluate.json")  # rows that it holds are not measured again; commands may share it
    plot: Path | None = None  # a picture of quality against time per image (needs matplotlib)
    keep_images: Path | None = None  # a folder that keeps the images; a run that was killed goes on there
    npz: bool = False  # write them as one .npz file in ADM's format too
    device: str = "auto"  # auto, cpu, cuda or cuda:N


def evaluate(
    models: tuple[str, ...] = (), *, measured: Measured, sampling: Sampling, against: Against, results: Results
) -> None:
    """Measure the quality and the speed of models.

    marval evaluate fashion-teacher fashion-student --iterations 4 8 16 --samples 2000 --seed 0 1 2
    marval evaluate imagenet256-base --samples 0 --iterations 16 --batches 1

    Quality: Fréchet distance, precision, recall, held-out accuracy, diversity. Speed: time, FLOPs, on a GPU memory.
    Distances, precision and recall are on EfficientNet's features (or --features) and named so: they are not the
    published figures, and compare with each other only, at equal numbers of samples. After a ± comes one standard
    error of the mean, over the seeds, or for rewards over the images.

    Args:
        models: bundled models, models' or runs' folders; imagenet256-base, -large, -huge: a full-size teacher and its
            student with random weights (only with --samples 0)
    """
    check_request(models, measured, against, results)
    from marval.evaluate.draw import check_folder
    from marval.evaluate.evaluate import Quality, check_alike, drawings_of, measure
    from marval.evaluate.features import MOST
    from marval.evaluate.judge import RewardJudge, make_judge
    from marval.evaluate.models import FULL_SIZES, load_models
    from marval.evaluate.speed import measure_speed
    from marval.rewards import find_reward
    from marval.runtime.distributed import start_workers

    images = results.keep_images, results.npz
    samples, out = measured.samples or Measured().samples, results.out  # without any, times alone are measured
    quality = Quality(sampling.iterations, samples, measured.seed, sampling.batch_size, *images)
    with start_workers(usable_device(results.device)) as workers:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # ends it at once: finished rows are whole, so nothing is lost
        loaded = load_models(
            models, str(workers.device), diffusion_steps=sampling.diffusion_steps, guidance=sampling.guidance,
            temperature=sampling.temperature, order=sampling.order, dtype=sampling.dtype, compile=sampling.compile,
        )  # fmt: skip
        check_alike(loaded)  # this and the next before real images are read
        for drawing in drawings_of(loaded, quality) if workers.main else ():
            check_folder(drawing)
        if measured.rewards is not None:
            names = [name.strip() for name in measured.rewards.split(",")]
            rewards = {name: find_reward(name, device=workers.device) for name in names}
            config = loaded[0][1].config
            measure(loaded, RewardJudge(rewards, measured.prompt, config, workers.device), quality, out, workers)
            return
        if measured.samples:
            judge = make_judge(
                loaded[0][1], against.data, against.judge, workers, features=against.features,
                reference=against.reference, sample=MOST,
            )  # fmt: skip
            measure(loaded, judge, quality, out, workers)
        if workers.main and measured.batches:
            few = (
                FULL_SIZES.keys() & set(models) and measured.batches == Measured().batches
            )  # 64 images of full size: an hour
            measure_speed(
                loaded, out, iterations=sampling.iterations, batches=(1,) if few else measured.batches,
                repeats=measured.repeats,
            )  # fmt: skip
        if workers.main:
            show(loaded, measured, sampling, results)


def check_request(models: tuple[str, ...], measured: Measured, against: Against, results: Results) -> None:
    """Refuse what cannot be measured, or written, before models are loaded."""
    from marval.evaluate.models import FULL_SIZES
    from marval.evaluate.report import need_matplotlib
    from marval.evaluate.results import read_results
    from marval.io.files import check_output

    others = [f"--{name}" for name, value in vars(against).items() if value is not None]
    if measured.rewards is not None and others:
        raise ValueError(f"{', '.join(others)}: cannot be combined with --rewards: run two commands")
    if not models:
        raise ValueError("name at least one model, for example fashion-student")
    if measured.samples and (full := FULL_SIZES.keys() & set(models)):
        raise ValueError(f"{', '.join(sorted(full))}: random weights have no quality: time them with --samples 0")
    if (measured.budget or results.plot) and not (measured.samples and measured.batches):
        raise ValueError("--budget and --plot need times and figures: name a batch size with --batches, and --samples")
    if not measured.samples and (measured.rewards is not None or not measured.batches):
        raise ValueError("--samples 0 without --batches, or with --rewards: there is nothing to measure")
    check_output(results.out, folder=False)
    read_results(results.out)
    if results.plot is not None:
        check_output(results.plot, folder=False)
        need_matplotlib()


def show(models: "Models", measured: Measured, sampling: Sampling, results: Results) -> None:
    """Print the tables of the results, the best of the measured settings within the budget, and the plot's file."""
    from marval.evaluate.report import best_within, plot_curve, points_of, print_results
    from marval.evaluate.results import Setting, read_results

    print_results(results.out)
    if measured.budget is None and results.plot is None:
        return
    parts, names, batch = (
        read_results(results.out),
        {pipeline.config.name for _, pipeline in models},
        measured.batches[0],
    )
    rows = [row for row in parts["quality"] if row["model"] in names and row["samples"] == measured.samples]
    same = [row for row in rows if Setting.of(row).dtype == sampling.dtype]
    points = points_of(same, parts["timing"], batch)
    if measured.budget is not None:
        print(best_within(points, measured.budget))
    if results.plot is not None:
        plot_curve(points, results.plot, batch)
        print(results.plot)


def compare(first: Path, second: Path) -> None:
    """Say what differs between two results files by more than chance makes.

    marval compare results/before.json results/mine.json
    marval compare student.json tuned.json

    Where each file holds one model (of a teacher at one T and w), they are compared whoever they are: a teacher and a
    student, say. Measure three seeds or more (--seed 0 1 2): of one in each file nothing can be said. Seeds are of the
    drawn images: what another training would give, they do not tell.

    Args:
        first: a results file of marval evaluate
        second: another
    """
    from marval.evaluate.compare import compare as differences_between
    from marval.evaluate.report import print_table

    lines, figures = differences_between(first, second)
    counts = Counter(figure.verdict for figure in figures)
    rows = []
    for one in figures:
        if one.verdict == "a difference":
            values = f"{one.first:.6g}", f"{one.second:.6g}", f"{one.second - one.first:+.4g}", f"± {one.chance:.2g}"
            rows.append((one.setting, one.figure, *values, one.counts))
    if rows:
        print_table("", ("setting", "figure", "first", "second", "change", "by chance", "counts"), rows)
    print(f"{len(rows)} of {len(figures)} figures differ by more than chance makes (95 % intervals: 1 in 20 may)")
    for verdict, count in counts.items():
        if verdict != "a difference":
            print(f"{count} of {len(figures)} figures: {verdict}")
    print("\n".join(lines))
