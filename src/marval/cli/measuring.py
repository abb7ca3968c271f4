"""The verbs that measure: evaluate, bench, sweep and compare."""

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast, get_args

from tyro.conf import Positional

from marval.cli.arguments import judge_for, load_models, usable_device
from marval.config import Size
from marval.presets import TuneConfig

if TYPE_CHECKING:
    from marval.runtime.distributed import Workers

REAL_SAMPLE = 10_000  # real images that KID, precision and recall are measured on


@contextlib.contextmanager
def measuring_workers(device: str) -> Iterator["Workers"]:
    """The processes that draw; SIGTERM ends them at once: finished shards and rows are whole, there is nothing to save.

    Times are the main one's.
    """
    from marval.runtime.distributed import start_workers

    with start_workers(usable_device(device)) as workers:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        yield workers


def check_results(out: Path, plot: Path | None = None) -> None:
    """Refuse files that cannot be written, or hold something else, before models are loaded.

    Raises:
        ValueError: one of them cannot be written, or `out` is not a results file.
    """
    from marval.evaluate.plots import need_matplotlib
    from marval.evaluate.results import read_results
    from marval.io.files import check_output

    check_output(out, folder=False)
    read_results(out)
    if plot is not None:
        check_output(plot, folder=False)
        need_matplotlib()


def evaluate(
    models: Positional[tuple[str, ...]],
    *,
    iterations: tuple[int, ...] = (),
    samples: int = 10_000,
    batches: tuple[int, ...] = (1, 64),
    repeats: int = 5,
    diffusion_steps: tuple[int, ...] = (),
    guidance: tuple[float, ...] = (),
    data: str | None = None,
    judge: Path | None = None,
    features: str | None = None,
    reference: Path | None = None,
    rewards: str | None = None,
    prompt: str = TuneConfig().prompt,
    seed: tuple[int, ...] = (0,),
    autocast: bool = False,
    batch_size: int | None = None,
    images: Path | None = None,
    image_format: Literal["shards", "png", "npz"] = "shards",
    out: Path = Path("results/evaluate.json"),
    device: str = "auto",
) -> None:
    """Measure models: Frechet distance, precision and recall, held-out accuracy, time and FLOPs per image.

    marval evaluate fashion-teacher fashion-student --iterations 4 8 16 32 --samples 2000 --seed 0 1 2

    marval evaluate runs/marval-base --samples 50000 --images drawn --reference imagenet256.npz --batches

    Distance, KID, precision, recall, density and coverage are on EfficientNet's features (or --features) and named so:
    they are not the published figures, and compare with each other only, at equal numbers of samples. After a +- comes
    one standard error of the mean: over the seeds, or for rewards over the images.

    Args:
        models: bundled models' names, or models' or runs' folders.
        iterations: the numbers K of AR iterations; each model's default when left out.
        samples: images for the figures of quality (the real set's training split is the reference).
        batches: batch sizes to time at, interleaved over all models; none: no timing.
        repeats: timed rounds.
        diffusion_steps: T of the teachers' chains, one or several.
        guidance: w of the teachers, one or several; 1 is no guidance.
        data: the real images; those of the model when left out.
        judge: the held-out classifier; the bundled one for Fashion-MNIST when left out.
        features: file.py:function, byte images (B, C, H, W) to features (B, F), in EfficientNet's place.
        reference: a file in the real images' place: ADM's .npz (FID, IS, sFID, precision and recall by torch-fidelity;
            not yet checked: the published Inception weights have never been loaded here) or marval's statistics
            .safetensors.
        rewards: measure these instead, over the prompts of all classes: "clip,image-reward" (see docs/tuning.md);
            nothing is timed.
        prompt: what an image's prompt is, with {} for its class's name.
        seed: of the samples; several: a row for each, and their spread.
        autocast: draw in bf16, for the figures and for the times (the result says so).
        batch_size: images drawn at a time for the figures; 250, or 50 of latents, when left out. It changes no image.
        images: a folder that keeps the images, which all processes see; a run that was killed goes on there (without,
            it goes on after the last row that it ended).
        image_format: besides shards, png files or one npz in ADM's format (arr_0, and labels in arr_1).
        out: the JSON file; rows that it holds already are not drawn again, unless by other metrics. Several commands
            may share it.
        device: "auto", "cpu", "cuda", ...
    """
    unused = {"data": data, "judge": judge, "features": features, "reference": reference}
    if rewards is not None and (given := [f"--{name}" for name, value in unused.items() if value is not None]):
        raise ValueError(f"{', '.join(given)}: not with --rewards, which are measured instead; run them apart")
    if image_format != "shards" and images is None:
        raise ValueError(f"--image-format {image_format}: say where with --images DIR")
    if repeats < 1 or any(batch < 1 for batch in batches):
        raise ValueError(f"--repeats {repeats} --batches {batches}: expected at least 1 of each")
    check_results(out)
    from marval.evaluate.evaluate import KeepImages, time_models
    from marval.evaluate.evaluate import evaluate as run
    from marval.evaluate.rewards import evaluate_rewards
    from marval.evaluate.tables import print_table
    from marval.rewards import find_reward

    with measuring_workers(device) as workers:
        loaded = load_models(models, str(workers.device), diffusion_steps, guidance)
        keep = None if images is None else KeepImages(images, image_format)
        if rewards is not None:
            found = {name.strip(): find_reward(name.strip(), device=workers.device) for name in rewards.split(",")}
            evaluate_rewards(
                loaded, found, prompt=prompt, iterations=iterations, samples=samples, out=out, seeds=seed,
                autocast=autocast, batch_size=batch_size, keep=keep, workers=workers,
            )  # fmt: skip
            return
        judged = judge_for(
            loaded[0][1], data, judge, features=features, sample=REAL_SAMPLE, reference=reference, main=workers.main
        )
        run(
            loaded, judged, iterations=iterations, samples=samples, out=out, seeds=seed, autocast=autocast,
            batch_size=batch_size, keep=keep, workers=workers,
        )  # fmt: skip
        if batches and workers.main:
            time_models(
                loaded, iterations=iterations, batches=batches, repeats=repeats, out=out, autocast=autocast
            )  # fmt: skip
        if workers.main:
            print_table(out)


def bench(
    models: Positional[tuple[str, ...]],
    *,
    iterations: tuple[int, ...] = (),
    batches: tuple[int, ...] = (),
    diffusion_steps: tuple[int, ...] = (),
    guidance: tuple[float, ...] = (),
    repeats: int = 3,
    samples: int = 0,
    seed: tuple[int, ...] = (0,),
    batch_size: int | None = None,
    data: str | None = None,
    judge: Path | None = None,
    features: str | None = None,
    reference: Path | None = None,
    plot: Path | None = None,
    autocast: bool = False,
    compiled: bool = False,
    out: Path = Path("results/bench.json"),
    device: str = "auto",
) -> None:
    """Time models against the arithmetic that they need and the machine's peak.

    marval bench imagenet256-base

    marval bench fashion-teacher fashion-student --diffusion-steps 100 50 25 10 --samples 2000 --plot curve.png

    Args:
        models: models' names or folders, a teacher first; or imagenet256-base, -large, -huge: a full-size teacher and
            its student with random weights.
        iterations: the numbers K of AR iterations; each model's default when left out (64 at full size).
        batches: batch sizes; 1 and the best of each model when left out (at full size 1 and 4 on a CPU, 1 and the
            largest that fits elsewhere).
        diffusion_steps: T of the teachers' chains, one or several: fewer steps are the plain way to be faster.
        guidance: w of the teachers, one or several.
        repeats: timed rounds after one that warms up; 0: only that one, for runs of many minutes.
        samples: images of each (model, K, T, w) for the quality; 0: none is measured.
        seed: of those images; several: their mean.
        batch_size: images drawn at a time for the quality, as for marval evaluate.
        data: the real images; those of the first model when left out.
        judge: the held-out classifier; the bundled one for Fashion-MNIST when left out.
        features: file.py:function in EfficientNet's place, as for marval evaluate.
        reference: a file in the real images' place, as for marval evaluate: the curve is then of FID.
        plot: a picture of quality against time per image (needs `samples` in this or an earlier run, and `plots`).
        autocast: draw in bf16. A point of the curve has its quality and its time in one precision.
        compiled: use torch.compile.
        out: the JSON file.
        device: "auto", "cpu", "cuda", ...
    """
    from marval.evaluate.bench import bench as run
    from marval.evaluate.bench import largest_batch, random_pair
    from marval.evaluate.evaluate import evaluate as measure
    from marval.evaluate.evaluate import iterations_of
    from marval.evaluate.results import measured_rows, model_hashes
    from marval.evaluate.throughput import summary, worthwhile_batches

    if not models:
        raise ValueError("name at least one model, for example: marval bench fashion-teacher fashion-student")
    if repeats < 0 or samples < 0 or any(batch < 1 for batch in batches):
        raise ValueError(
            f"--repeats {repeats}, --samples {samples}, --batches {batches}: expected repeats and samples from 0 and "
            "batches from 1"
        )
    check_results(out, plot)
    sizes = [name.removeprefix("imagenet256-") for name in models]
    full_size = [size for name, size in zip(models, sizes, strict=True) if size != name and size in get_args(Size)]
    if full_size and (len(full_size) < len(models) or samples or guidance or len(diffusion_steps) > 1):
        raise ValueError("imagenet256-* have random weights: bench them alone, without --samples and --guidance")
    with measuring_workers(device) as workers:
        on = str(workers.device)
        loaded = [] if full_size else load_models(models, on, diffusion_steps, guidance)
        pipelines = [pipeline for _, pipeline in loaded]
        for size in full_size:
            for p in random_pair(cast(Size, size), on):
                pipelines.append(
                    p.with_chain(diffusion_steps=next(iter(diffusion_steps), None))
                    if p.config.draw.kind == "chain"
                    else p
                )
        hashes = model_hashes(loaded, measured_rows(out), out)  # before anything is measured
        smallest = [min(iterations_of(pipeline, iterations)) for pipeline in pipelines]
        if samples:
            judged = judge_for(pipelines[0], data, judge, features=features, reference=reference, main=workers.main)
            measure(
                loaded, judged, iterations=iterations, samples=samples, out=out, seeds=seed, autocast=autocast,
                batch_size=batch_size, workers=workers,
            )  # fmt: skip
        if not workers.main:
            return
        if not batches and full_size:
            batches = (1, 4) if on == "cpu" else (1, largest_batch(pipelines[0], smallest[0], autocast))
        batches = batches or worthwhile_batches(pipelines, smallest, autocast)
        rows = run(
            pipelines, iterations=iterations, batches=batches, repeats=repeats, out=out, hashes=hashes,
            autocast=autocast, compiled=compiled,
        )  # fmt: skip
        if loaded:
            print(summary(rows))
            show_curve(out, min(batches), plot)


def compare(first: Positional[Path], second: Positional[Path]) -> None:
    """Say what differs between two results files, and whether a difference is more than chance over seeds makes.

    marval compare results/fashion-sweep.json results/mine.json

    marval compare student.json tuned.json

    Quality, rewards, times and benches are compared. Where each file holds one model (of a teacher at one T and w),
    they are compared whoever they are: a teacher and a student, say.

    Measure three seeds or more (--seed 0 1 2): of one in each file nothing can be said. One against several will do,
    and takes a large difference.

    Args:
        first: a JSON file of marval evaluate, bench or sweep.
        second: another.
    """
    from marval.evaluate.compare import compare as run

    said, found = run(first, second)
    for line in said:
        print(line)
    for row in found:
        chance = "" if row.chance is None else f", chance makes up to {row.chance:.4g}"
        counts = "{} and {}".format(*row.counts)
        change = f"{row.first:.6g} -> {row.second:.6g} ({row.second - row.first:+.4g}{chance}; {counts} {row.what})"
        print(f"{row.setting}: {row.figure} {change}: {row.verdict}")
    print("Of figures that do not differ, chance makes 1 in 20 a difference. Seeds are of images: not of trainings.")
    print("Chance: 95 % of Student's t-test over seeds (paired where both files have the same), or over images.")


def sweep(
    model: Positional[str],
    *,
    iterations: tuple[int, ...] = (),
    guidance: tuple[float, ...] = (),
    diffusion_steps: tuple[int, ...] = (),
    samples: int = 1000,
    seed: tuple[int, ...] = (0,),
    budget: float | None = None,
    batch: int = 1,
    repeats: int = 3,
    batch_size: int | None = None,
    data: str | None = None,
    judge: Path | None = None,
    features: str | None = None,
    reference: Path | None = None,
    autocast: bool = False,
    plot: Path | None = None,
    out: Path = Path("results/sweep.json"),
    device: str = "auto",
) -> None:
    """Frechet distance and accuracy over K and, for a teacher, w; and the best setting for a time budget.

    marval sweep fashion-student --budget 0.03 --plot student.png

    marval sweep fashion-teacher --iterations 8 16 --guidance 1.5 3 4.5 --diffusion-steps 25 --samples 500

    Args:
        model: a bundled model's name, or a model's or run's folder.
        iterations: the numbers K of AR iterations; powers of two up to the number of tokens when left out.
        guidance: w of a teacher; its own when left out. A student has none: its guidance is baked in.
        diffusion_steps: T of a teacher; its own when left out.
        samples: images for each figure.
        seed: of the samples; several: their mean.
        budget: seconds per image; the best setting within it is named.
        batch: the batch size at which time is measured.
        repeats: timed rounds.
        batch_size: images drawn at a time for the figures, as for marval evaluate.
        data: the real images; those of the model when left out.
        judge: the held-out classifier; the bundled one for Fashion-MNIST when left out.
        features: file.py:function in EfficientNet's place, as for marval evaluate.
        reference: a file in the real images' place, as for marval evaluate.
        autocast: draw in bf16, for the figures and for the times.
        plot: a picture of the curves (needs the extra `plots`).
        out: the JSON file; rows that it holds already are not drawn again.
        device: "auto", "cpu", "cuda", ...
    """
    from marval.evaluate.evaluate import evaluate, time_models
    from marval.evaluate.pareto import best_within, points_of, sweep_table
    from marval.evaluate.plots import draw_sweep

    if batch < 1 or repeats < 1 or (budget is not None and budget <= 0):
        raise ValueError(f"--batch {batch} --repeats {repeats} --budget {budget}: expected at least 1, above 0")
    check_results(out, plot)
    with measuring_workers(device) as workers:
        loaded = load_models((model,), str(workers.device), diffusion_steps, guidance)
        tokens = loaded[0][1].config.mar.num_tokens
        iterations = iterations or tuple(2**i for i in range(tokens.bit_length()) if 2**i <= tokens)
        judged = judge_for(loaded[0][1], data, judge, features=features, reference=reference, main=workers.main)
        evaluate(
            loaded, judged, iterations=iterations, samples=samples, out=out, seeds=seed, autocast=autocast,
            batch_size=batch_size, workers=workers,
        )  # fmt: skip
        if not workers.main:
            return
        time_models(loaded, iterations=iterations, batches=(batch,), repeats=repeats, out=out, autocast=autocast)
        name = loaded[0][1].config.name
        points = points_of(out, part="timing", batch=batch, samples=samples, only={name}, report=print)
        print(sweep_table(points))
        if budget is not None:
            print(best_within(points, budget))
        if plot is not None:
            draw_sweep(points, plot, batch)
            print(plot)


def show_curve(out: Path, batch: int, plot: Path | None) -> None:
    """Say who beats whom in quality and time, where both were measured, and draw it.

    Raises:
        ValueError: a plot is wanted and nothing has both.
    """
    from marval.evaluate.pareto import points_of, verdicts
    from marval.evaluate.plots import draw_pareto

    points = points_of(out, part="bench", batch=batch, report=print)
    for line in verdicts(points):
        print(line)
    if plot is not None:
        if not points:
            raise ValueError(f"{out} has no quality to plot in this precision: measure it with --samples 2000, say")
        draw_pareto(points, plot, batch)
        print(plot)
