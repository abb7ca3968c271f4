"""Quality against time: the settings that have both, the best within a budget, and the plot."""

import statistics
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marval.evaluate.report import precision_of, title_of
from marval.evaluate.results import Results, Row, by_setting, curve_of, named, on_one_machine, version_of, who
from marval.io.files import atomic_path


@dataclass(frozen=True)
class Point:
    """A setting that somebody can run: its time per image, and its quality as the mean over seeds."""

    model: str
    teacher: bool
    iterations: int
    curve: str  # model and, for a teacher, T and w: what K varies along
    label: str  # the same with K
    seconds: float
    distance: float  # Fréchet distance: FID, where the quality is measured against ADM's reference
    measure: str  # the distance's name
    samples: int


def points_of(
    results: Results,
    batch: int,
    *,
    models: Collection[str] = (),
    samples: int | None = None,
    mixed: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> list[Point]:
    """The settings whose quality and whose time at a batch size were both measured, on the newest time's machine.

    A point's time is that of the same weights in the same precision, decoding included. Distances of unequal numbers
    of samples do not compare: all points have the number and precision that most settings have (of equals, the larger).

    Args:
        models: names; all of them when empty.
        samples: of the quality; the number that most settings have when None.
        mixed: take times of another precision, or without decoding, where there are no others: as older results have.
        report: told what is left out and why.
    """
    timed, left_out = on_one_machine([row for row in results.get("timing", []) if row["batch"] == batch])
    groups: dict[tuple[Any, ...], list[Point]] = {}
    untimed: list[str] = []
    for rows in by_setting(results.get("quality", [])):
        row = rows[0]
        distance = "fd" if "fd" in row else "fid"
        if samples not in (None, row["samples"]) or (models and row["model"] not in models) or distance not in row:
            continue
        times = [t for t in timed if _same_setting(t, row)]
        runnable = [t for t in times if _runs_as(t, row)] or (times if mixed else [])
        if not runnable:
            untimed += [named(row)] if times else []
            continue
        point = Point(
            row["model"], row["teacher"], row["iterations"], curve_of(row), named(row),
            runnable[0]["seconds_per_image"], statistics.mean(r[distance] for r in rows), title_of(distance, rows),
            row["samples"],
        )  # fmt: skip
        groups.setdefault((row["samples"], precision_of(row), distance, version_of(row)), []).append(point)
    chosen = max(groups.items(), key=lambda item: (len(item[1]), item[0][0]), default=(None, []))[1]
    others = sum(map(len, groups.values())) - len(chosen)
    if left_out:
        report(left_out)
    if untimed:
        report(f"left out, timed in another precision, compiled or without decoding: {', '.join(untimed)}")
    if others:
        report(f"left out, with other numbers of samples, precision or metrics than most: {others} settings")
    return sorted(chosen, key=lambda point: (not point.teacher, point.curve, point.iterations))


def _same_setting(timed: Row, row: Row) -> bool:
    weights = {one["sha256"] for one in (timed, row) if "sha256" in one}
    return len(weights) < 2 and who(timed) == who(row) and timed["iterations"] == row["iterations"]


def _runs_as(timed: Row, row: Row) -> bool:
    """Tell whether a time was measured on the model, weights and precision of a row of quality."""
    return precision_of(timed) == precision_of(row) and timed["decoded"] and not timed.get("compiled")


def best_within(points: Sequence[Point], seconds: float) -> str:
    """Name, in a sentence, the setting with the smallest Fréchet distance that takes at most `seconds` an image.

    Raises:
        ValueError: there are no points.
    """
    if not points:
        raise ValueError("no setting has both a distance and a time: nothing to choose from")
    within = [point for point in points if point.seconds <= seconds]
    if not within:
        fastest = min(points, key=lambda point: point.seconds)
        return f"none draws an image in {seconds:g} s: the fastest is {fastest.label}, {fastest.seconds:.4g} s"
    best = min(within, key=lambda point: point.distance)
    return (
        f"best within {seconds:g} s an image: {best.label}: {best.measure} {best.distance:.2f} in {best.seconds:.4g} s"
    )


def verdicts(points: Sequence[Point]) -> list[str]:
    """List for every student the teachers' points that it does not beat in both time and distance at once."""
    teachers, lines = [point for point in points if point.teacher], []
    for name in dict.fromkeys(point.model for point in points if not point.teacher):
        students = [point for point in points if point.model == name]
        unbeaten = [
            t.label for t in teachers if not any(s.seconds < t.seconds and s.distance < t.distance for s in students)
        ]
        if unbeaten:
            lines.append(f"{name} does not beat {', '.join(unbeaten)}")
        elif teachers:
            lines.append(f"{name} is faster and closer than each of the teachers' {len(teachers)} points")
    return lines


def need_matplotlib() -> Any:
    """matplotlib's figure class, without a display.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("plots need matplotlib: pip install matplotlib") from error
    return Figure


def plot_curve(points: Sequence[Point], file: Path, batch: int) -> None:
    """Draw quality against time per image as MARVAL's figure 1 does: a point for each (model, K, T), K beside it.

    Teachers are dashed. Left and below is better.

    Raises:
        ValueError: there are no points.
    """
    if not points:
        raise ValueError("no setting has both a distance and a time in one precision: nothing to plot")
    figure = need_matplotlib()(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(point.curve for point in points):
        curve = [point for point in points if point.curve == name]
        style = {"linestyle": "--", "marker": "s"} if curve[0].teacher else {"linestyle": "-", "marker": "o"}
        axes.plot([p.seconds * 1000 for p in curve], [p.distance for p in curve], label=name, markersize=5, **style)
        for p in curve:
            place = (p.seconds * 1000, p.distance)
            axes.annotate(f"K={p.iterations}", place, (4, 4), textcoords="offset points", fontsize=7)
    distance = f"{points[0].measure} ({points[0].samples:,} samples)"
    axes.set(xscale="log", xlabel=f"ms per image, batch {batch}", ylabel=distance)
    for kind in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        kind(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "125" else "")  # 1, 2, 5, 10, 20, ... in plain numbers
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    with atomic_path(file) as partial:
        figure.savefig(partial, format="png", dpi=120)
