"""Results as people read them: tables, what the figures mean, the best setting within a budget, the plot."""

import statistics
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from marval.evaluate.features import FEATURES
from marval.evaluate.metrics import METRICS, REDEFINED
from marval.evaluate.results import (
    Results,
    Row,
    Setting,
    by_setting,
    on_one_machine,
    read_results,
    standard_error,
    version_of,
)
from marval.io.files import atomic_path

WIDTH = 200  # characters, where no terminal says how many
COLUMNS = {  # figure: title and format
    "fd": ("FD-EfficientNet", ".2f"),
    "fid": ("FID", ".3f"),
    "inception_score": ("IS", ".2f"),
    "sfid": ("sFID", ".3f"),
    "inception_precision": ("Inception precision", ".3f"),
    "inception_recall": ("Inception recall", ".3f"),
    "accuracy": ("held-out accuracy", ".4f"),
    "log_probability": ("held-out log-probability", ".4f"),
    "diversity": ("diversity", ".3f"),
    "inception_kid": ("Inception KID", ".5f"),
    "efficientnet_kid": ("KID-EfficientNet", ".3f"),
    "efficientnet_precision": ("precision-EfficientNet", ".3f"),
    "efficientnet_recall": ("recall-EfficientNet", ".3f"),
    "own_kid": ("KID on own features", ".3f"),
    "own_precision": ("precision on own features", ".3f"),
    "own_recall": ("recall on own features", ".3f"),
    "gflops_per_image": ("GFLOP / image", ".2f"),
}
Cells = tuple[list[str], list[list[str]]]  # header and rows


# Tables


def title_of(name: str, rows: Iterable[Row]) -> str:
    """A figure's name in tables and plots; a distance on the user's own features says so."""
    other = sorted({row["features"] for row in rows if row.get("features", FEATURES) not in (FEATURES, "")})
    return f"FD on {', '.join(other)}" if name == "fd" and other else COLUMNS[name][0]


def models_of(rows: Sequence[Row]) -> list[str]:
    """The models' names: teachers first, else in the order in which they were first measured."""
    return list(dict.fromkeys(row["model"] for row in sorted(rows, key=lambda row: not row.get("teacher"))))


def quality_table(quality: Sequence[Row], timing: Sequence[Row] = ()) -> Cells:
    """Quality by model and K (of several seeds, mean and standard error), and the times of `timing` beside it.

    T and w have columns where a teacher was measured at several, and so has the order.
    """
    names = [name for name in COLUMNS if any(name in row for row in quality)]
    times, _ = on_one_machine(timing)
    batches = sorted({row["batch"] for row in times})
    models = models_of(quality)
    several = len({Setting.of(row).curve for row in quality}) > len(models)
    orders = len({(row["model"], row.get("order")) for row in quality}) > len(models)
    header = ["model", "K", *(["order"] if orders else []), *(("T", "w") if several else ()), "samples"]
    header += [title_of(name, quality) for name in names]
    header += [f"ms / image, batch {batch}" for batch in batches]

    def place(rows: list[Row]) -> tuple[Any, ...]:
        s = Setting.of(rows[0])
        return models.index(s.model), -(s.diffusion_steps or 0), s.guidance or 0, s.iterations, s.samples

    lines = []
    for rows in sorted(by_setting(quality), key=place):
        row = rows[0]
        cells = [row["model"], str(row["iterations"]), *([str(row.get("order"))] if orders else [])]
        cells += [*(_chain(row) if several else ()), str(row["samples"])]
        cells += [_cell([row[name] for row in rows if name in row], name) for name in names]
        lines.append(cells + [_milliseconds(times, row, batch) for batch in batches])
    return header, lines


def _chain(row: Row) -> tuple[str, str]:
    steps, guidance = (row["draw"].get(name) for name in ("diffusion_steps", "guidance"))
    return str(steps or ""), "" if guidance is None else f"{guidance:g}"


def _cell(values: list[float], name: str) -> str:
    if not values:
        return ""
    mean, error = (format(value, COLUMNS[name][1]) for value in standard_error(values))
    return f"{mean} ± {error}" if len(values) > 1 and name != "gflops_per_image" else mean


def _milliseconds(times: Sequence[Row], row: Row, batch: int) -> str:
    """Format the time in the precision of the row's images; a time in the other precision says so."""
    setting = Setting.of(row)
    here = [time for time in times if time["batch"] == batch and str(Setting.of(time)) == str(setting)]
    for time in sorted(here, key=lambda time: Setting.of(time).autocast != setting.autocast):
        precision = Setting.of(time).precision
        mark = "" if precision == setting.precision else f" ({precision})"
        return f"{time['seconds_per_image'] * 1000:.2f}{mark}"
    return ""


def speed_table(timing: Sequence[Row]) -> Cells:
    """For every (model, T, w, K): latency at the smallest batch, and throughput at the best."""
    times, _ = on_one_machine(timing)
    settings: dict[Any, list[Row]] = {}
    for row in times:
        settings.setdefault((str(Setting.of(row)), bool(row.get("autocast"))), []).append(row)
    header = ["model", "K", "T", "w", "precision", "ms / image (batch)", "images / s (batch)", "GFLOP / image"]
    header += ["of the machine's peak", "MiB"]
    lines = []
    for rows in settings.values():
        alone, best = min(rows, key=lambda row: row["batch"]), min(rows, key=lambda row: row["seconds_per_image"])
        lines.append([
            alone["model"], str(alone["iterations"]), *_chain(alone), Setting.of(alone).precision,
            f"{alone['seconds_per_image'] * 1000:.4g} ({alone['batch']})",
            f"{1 / best['seconds_per_image']:.4g} ({best['batch']})",
            f"{best['gflops_per_image']:.4g}" if "gflops_per_image" in best else "",
            f"{best['fraction_of_peak']:.0%}" if "fraction_of_peak" in best else "",
            f"{best['memory_bytes'] / 2**20:.4g}" if "memory_bytes" in best else "",
        ])  # fmt: skip
    keep = [i for i in range(len(header)) if any(line[i] for line in lines)]
    return [header[i] for i in keep], [[line[i] for i in keep] for line in lines]


def notes_of(results: Results) -> list[str]:
    """Say what the tables of results mean: their ±, features and precision, and what is left out."""
    quality, timing = results.get("quality", []), results.get("timing", [])
    notes = []
    seeds = sorted({len(rows) for rows in by_setting(quality)} - {1})
    if seeds:
        counts = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
        notes.append(f"± is one standard error of the mean, over {counts} seeds of the images (not of trainings).")
    if any(name.startswith("efficientnet_") or name == "fd" for row in quality for name in row):
        notes.append(
            "Distances, KID, precision and recall on EfficientNet-Lite0's or own features are not the published "
            "figures of these names, which are on Inception's: they compare with each other only."
        )
    if any("diversity" in row and version_of(row) < REDEFINED["diversity"] for row in quality):
        notes.append(f"diversity by metrics 1 is of the first 200 images of a class; today's metrics are {METRICS}.")
    if timing and quality:
        precisions = sorted({Setting.of(row).precision for row in quality})
        notes.append(
            f"The images of the figures were drawn in {' or '.join(precisions)}; times of another precision are "
            "marked. Times include decoding."
        )
    notes += [note for note in (on_one_machine(timing)[1],) if note]
    if any("fid" in row for row in quality):
        notes.append("FID, IS and sFID have not been checked against published values (see --reference in --help).")
    return notes


def print_results(out: Path) -> None:
    """Print the tables of a results file."""
    results = read_results(out)
    quality, timing = results.get("quality", []), results.get("timing", [])
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    for title, (header, lines) in (("quality", quality_table(quality)), ("speed", speed_table(timing))):
        if lines:
            table = Table(*header, title=f"{out}: {title}")
            for line in lines:
                table.add_row(*line)
            console.print(table)
    for note in notes_of(results):
        console.print(note, markup=False, highlight=False)


# Quality against time


@dataclass(frozen=True)
class Point:
    """A setting that somebody can run: its time per image, and its quality as the mean over seeds."""

    setting: Setting
    teacher: bool
    seconds: float
    distance: float  # Fréchet distance: FID, where the quality is measured against ADM's reference
    measure: str  # the distance's name


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
        row, setting = rows[0], Setting.of(rows[0])
        distance = "fd" if "fd" in row else "fid"
        if samples not in (None, row["samples"]) or (models and row["model"] not in models) or distance not in row:
            continue
        times = [t for t in timed if str(Setting.of(t)) == str(setting) and _same_weights(t, row)]
        runnable = [t for t in times if _runs_as(t, row)] or (times if mixed else [])
        if runnable:
            mean, title = statistics.mean(r[distance] for r in rows), title_of(distance, rows)
            point = Point(setting, row["teacher"], runnable[0]["seconds_per_image"], mean, title)
            groups.setdefault((row["samples"], setting.autocast, distance, version_of(row)), []).append(point)
        elif times:
            untimed.append(str(setting))
    chosen = max(groups.items(), key=lambda item: (len(item[1]), item[0][0]), default=(None, []))[1]
    others = sum(map(len, groups.values())) - len(chosen)
    if left_out:
        report(left_out)
    if untimed:
        report(f"left out, timed in another precision, compiled or without decoding: {', '.join(untimed)}")
    if others:
        report(f"left out, with other numbers of samples, precision or metrics than most: {others} settings")
    return sorted(chosen, key=lambda point: (not point.teacher, point.setting.curve, point.setting.iterations))


def _same_weights(timed: Row, row: Row) -> bool:
    return len({one["sha256"] for one in (timed, row) if "sha256" in one}) < 2


def _runs_as(timed: Row, row: Row) -> bool:
    """Tell whether a time is of the precision of a row of quality, and of whole pictures."""
    same = bool(timed.get("autocast")) == bool(row.get("autocast"))
    return same and timed["decoded"] and not timed.get("compiled")


def best_within(points: Sequence[Point], seconds: float) -> str:
    """Name, in a sentence, the setting with the smallest Fréchet distance that takes at most `seconds` an image."""
    if not points:
        raise ValueError("no setting has both a distance and a time: nothing to choose from")
    within = [point for point in points if point.seconds <= seconds]
    if not within:
        fast = min(points, key=lambda point: point.seconds)
        return f"none draws an image in {seconds:g} s: the fastest is {fast.setting}, {fast.seconds:.4g} s"
    best = min(within, key=lambda point: point.distance)
    found = f"{best.measure} {best.distance:.2f} in {best.seconds:.4g} s"
    return f"best within {seconds:g} s an image: {best.setting}: {found}"


def need_matplotlib() -> Any:
    """matplotlib's figure class, without a display."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("plots need matplotlib: pip install matplotlib") from error
    return Figure


def plot_curve(points: Sequence[Point], file: Path, batch: int) -> None:
    """Draw quality against time per image as MARVAL's figure 1 does: a point for each (model, K, T), K beside it.

    Teachers are dashed. Left and below is better.
    """
    if not points:
        raise ValueError("no setting has both a distance and a time in one precision: nothing to plot")
    figure = need_matplotlib()(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(point.setting.curve for point in points):
        curve = [point for point in points if point.setting.curve == name]
        style = {"linestyle": "--", "marker": "s"} if curve[0].teacher else {"linestyle": "-", "marker": "o"}
        axes.plot([p.seconds * 1000 for p in curve], [p.distance for p in curve], label=name, markersize=5, **style)
        for p in curve:
            place = (p.seconds * 1000, p.distance)
            axes.annotate(f"K={p.setting.iterations}", place, (4, 4), textcoords="offset points", fontsize=7)
    distance = f"{points[0].measure} ({points[0].setting.samples:,} samples)"
    axes.set(xscale="log", xlabel=f"ms per image, batch {batch}", ylabel=distance)
    for kind in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        kind(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "125" else "")  # 1, 2, 5, 10, 20, ... in plain numbers
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    with atomic_path(file) as partial:
        figure.savefig(partial, format="png", dpi=120)
