"""The verbs that work on measurements: compare and sweep."""

from pathlib import Path

from tyro.conf import Positional

from marval.cli.arguments import judge_for, load_models, usable_device


def compare(first: Positional[Path], second: Positional[Path]) -> None:
    """Say what differs between two results files, and whether a difference is more than chance over seeds makes.

    marval compare results/fashion-sweep.json results/mine.json

    marval compare student.json tuned.json

    Measure three seeds or more (--seed 0 1 2): of one in each file nothing can be said. One against several will do,
    and takes a large difference.

    Args:
        first: a JSON file of marval evaluate.
        second: another.
    """
    from marval.evaluate.compare import compare as run

    said, found = run(first, second)
    for line in said:
        print(line)
    for row in found:
        chance = "" if row.chance is None else f", chance ±{row.chance:.4g}"
        counts = "{} and {}".format(*row.counts)
        change = f"{row.first:.6g} -> {row.second:.6g} ({row.second - row.first:+.4g}{chance}; {counts} {row.what})"
        print(f"{row.setting}: {row.figure} {change}: {row.verdict}")
    print("Of figures that do not differ, chance makes 1 in 20 a difference. Seeds are of images: not of trainings.")


def sweep(
    model: Positional[str],
    *,
    iterations: tuple[int, ...] = (),
    guidance: tuple[float, ...] = (),
    steps: tuple[int, ...] = (),
    samples: int = 1000,
    seed: tuple[int, ...] = (0,),
    budget: float | None = None,
    batch: int = 1,
    repeats: int = 3,
    data: str | None = None,
    judge: Path | None = None,
    autocast: bool = False,
    plot: Path | None = None,
    out: Path = Path("results/sweep.json"),
    device: str = "auto",
) -> None:
    """Frechet distance and accuracy over K and, for a teacher, w; and the best setting for a time budget.

    marval sweep fashion-student --budget 0.03 --plot student.png

    marval sweep fashion-teacher --iterations 8 16 --guidance 1.5 3 4.5 --steps 25 --samples 500

    Args:
        model: a bundled model's name, or a model's or run's folder.
        iterations: the numbers K of AR iterations; powers of two up to the number of tokens when left out.
        guidance: w of a teacher; its own when left out. A student has none: its guidance is baked in.
        steps: T of a teacher; its own when left out.
        samples: images for each figure.
        seed: of the samples; several: their mean.
        budget: seconds per image; the best setting within it is named.
        batch: the batch size at which time is measured.
        repeats: timed rounds.
        data: the real images; those of the model when left out.
        judge: the held-out classifier; the bundled one for Fashion-MNIST when left out.
        autocast: draw the samples in bf16 (times are always float32).
        plot: a picture of the curves (needs the extra `plots`).
        out: the JSON file; rows that it holds already are not drawn again.
        device: "auto", "cpu", "cuda", "mps", ...
    """
    from marval.evaluate.evaluate import evaluate, time_models
    from marval.evaluate.pareto import best_within, points_of, sweep_table
    from marval.evaluate.plots import draw_sweep, need_matplotlib

    if samples < 1 or batch < 1 or repeats < 1 or (budget is not None and budget <= 0):
        raise ValueError(
            f"--samples {samples} --batch {batch} --repeats {repeats} --budget {budget}: expected at least 1, above 0"
        )
    if plot is not None:
        need_matplotlib()
    loaded = load_models((model,), usable_device(device), steps, guidance)
    tokens = loaded[0][1].config.mar.num_tokens
    iterations = iterations or tuple(2**i for i in range(tokens.bit_length()) if 2**i <= tokens)
    judged = judge_for(loaded[0][1], data, judge)
    evaluate(loaded, judged, iterations=iterations, samples=samples, out=out, seeds=seed, autocast=autocast)
    time_models(loaded, iterations=iterations, batches=(batch,), repeats=repeats, out=out)
    points = points_of(out, batch=batch, samples=samples, only={loaded[0][1].config.name})
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

    points = points_of(out, batch=batch)
    for line in verdicts(points):
        print(line)
    if plot is not None:
        if not points:
            raise ValueError(f"{out} has no quality to plot: measure it with --samples 2000, say")
        draw_pareto(points, plot, batch)
        print(plot)
