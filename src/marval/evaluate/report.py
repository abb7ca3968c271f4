"""Results as people read them: tables, what the figures mean, the best setting within a budget, the plot."""

import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from marval.evaluate.features import FEATURES
from marval.evaluate.results import (
    DIALS,
    Row,
    Setting,
    by_setting,
    dials_of,
    on_one_machine,
    read_results,
    standard_error,
)
from marval.io.files import atomic_path

WIDTH = 200  # characters, where no terminal says how many
SPACES = {
    "efficientnet": "-EfficientNet", "own": " on own features", "classifier": " on a classifier's",
    "pixels": " on pixels",
}  # fmt: skip
SAMPLED = {
    f"{space}_{figure.lower()}": (f"{figure}{where}", ".3f")
    for space, where in SPACES.items()
    for figure in ("KID", "precision", "recall")
}
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
    **SAMPLED,
    "gflops_per_image": ("GFLOP / image", ".2f"),
}
Cells = tuple[list[str], list[list[str]]]  # header and rows


# Tables


def title_of(name: str, rows: Iterable[Row]) -> str:
    """A figure's name in tables and plots; a distance on the user's own features says so."""
    other = sorted({row["features"] for row in rows if row.get("features", FEATURES) not in (FEATURES, "")})
    return f"FD on {', '.join(other)}" if name == "fd" and other else COLUMNS[name][0]


def lines_of(quality: Sequence[Row]) -> list[list[Row]]:
    """The rows of each line of a table: teachers first, else models as they were measured; by falling T, w, K."""
    models = list(dict.fromkeys(row["model"] for row in sorted(quality, key=lambda row: not row.get("teacher"))))

    def place(rows: list[Row]) -> tuple[Any, ...]:
        row, draw = rows[0], rows[0]["draw"]
        chain = -(draw.get("diffusion_steps") or 0), draw.get("guidance") or 0, draw.get("temperature", 1)
        return models.index(row["model"]), *chain, row["iterations"], row["samples"]

    return sorted(by_setting(quality), key=place)


def quality_table(quality: Sequence[Row]) -> Cells:
    """Quality by model and K: of several seeds, mean and standard error.

    What a model was measured at several of has a column: T, w, temperature, the order.
    """
    names = [name for name in COLUMNS if any(name in row for row in quality)]
    models = len({row["model"] for row in quality})
    chains = len({Setting.of(row).curve for row in quality}) > models
    orders = len({(row["model"], row.get("order")) for row in quality}) > models
    groups = lines_of(quality)
    dials = [dial for dial in DIALS if chains and any(dials_of(rows[0]["draw"])[dial] for rows in groups)]
    header = ["model", "K", *(["order"] if orders else []), *dials, "samples"]
    lines = []
    for rows in groups:
        row = rows[0]
        cells = [row["model"], str(row["iterations"]), *([str(row.get("order"))] if orders else [])]
        cells += [*(dials_of(row["draw"])[dial] for dial in dials), str(row["samples"])]
        lines.append(cells + [_cell([row[name] for row in rows if name in row], name) for name in names])
    return header + [title_of(name, quality) for name in names], lines


def _cell(values: list[float], name: str) -> str:
    if not values:
        return ""
    mean, error = (format(value, COLUMNS[name][1]) for value in standard_error(values))
    return f"{mean} ± {error}" if len(values) > 1 and name != "gflops_per_image" else mean


def speed_table(timing: Sequence[Row]) -> Cells:
    """For every (model, T, w, K): latency at the smallest batch, and throughput at the best."""
    settings: dict[Setting, list[Row]] = {}
    for row in on_one_machine(timing):
        settings.setdefault(replace(Setting.of(row), batch=None), []).append(row)
    header = ["model", "K", *DIALS, "precision", "ms / image (batch)", "images / s (batch)", "GFLOP / image"]
    header += ["decoding (part of it)", "MiB"]
    lines = []
    for rows in settings.values():
        alone, best = min(rows, key=lambda row: row["batch"]), min(rows, key=lambda row: row["seconds_per_image"])
        lines.append([
            alone["model"], str(alone["iterations"]), *dials_of(alone["draw"]).values(), Setting.of(alone).precision,
            f"{alone['seconds_per_image'] * 1000:.4g} ({alone['batch']})",
            f"{1 / best['seconds_per_image']:.4g} ({best['batch']})",
            f"{best['gflops_per_image']:.4g}" if "gflops_per_image" in best else "",
            f"{best['decoding_seconds_per_image'] / best['seconds_per_image']:.0%}"
            if "decoding_seconds_per_image" in best else "",
            f"{best['memory_bytes'] / 2**20:.4g}" if "memory_bytes" in best else "",
        ])  # fmt: skip
    filled = [i for i in range(len(header)) if any(line[i] for line in lines)]
    return [header[i] for i in filled], [[line[i] for i in filled] for line in lines]


def notes_of(quality: Sequence[Row]) -> list[str]:
    """Say what a table of quality means: its ±, and which figures compare with published ones."""
    notes, seeds = [], sorted({len(rows) for rows in by_setting(quality)} - {1})
    if seeds:
        counts = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
        notes.append(f"± is one standard error of the mean, over {counts} seeds of the images (not of trainings).")
    if any(name == "fd" or name in SAMPLED for row in quality for name in row):
        notes.append(
            "Distances, KID, precision and recall on such features are not the published figures of these names, which "
            "are on Inception's: they compare with each other only."
        )
    if any("fid" in row for row in quality):
        notes.append("FID, IS and sFID have not been checked against published values (see --reference in --help).")
    return notes


def print_results(out: Path) -> None:
    """Print the tables of a results file."""
    results = read_results(out)
    quality, timing = results.get("quality", []), results.get("timing", [])
    for title, (header, lines) in (("quality", quality_table(quality)), ("speed", speed_table(timing))):
        if lines:
            print_table(f"{out}: {title}", header, lines)
    notes = notes_of(quality)
    if others := len(timing) - len(on_one_machine(timing)):
        notes.append(f"Left out: {others} times of another machine or number of threads than the newest.")
    for note in notes:
        terminal().print(note, markup=False, highlight=False)


def terminal() -> Console:
    """Where results are printed: as wide as the terminal, or `WIDTH` where there is none."""
    return Console(width=None if sys.stdout.isatty() else WIDTH)


def print_table(title: str, header: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """Print a table whose titles are folded where the terminal is narrow, and whose cells never are."""
    console = terminal()
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    table = Table(title=title or None, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name, width in zip(header, widths, strict=True):
        table.add_column(name, overflow="fold", min_width=width)
    for line in lines:
        table.add_row(*line)
    console.print(table, width=max(console.width, sum(widths) + 2 * len(widths)), crop=False, no_wrap=True)


# Quality against time


@dataclass(frozen=True)
class Point:
    """A setting that somebody can run: its time per image, and its quality as the mean over seeds."""

    setting: Setting
    teacher: bool
    seconds: float
    distance: float
    measure: str  # the distance's name


def points_of(quality: Sequence[Row], timing: Sequence[Row], batch: int) -> list[Point]:
    """Join Fréchet distances, of one number of samples, and times at a batch size, on the newest time's machine."""
    times = [row for row in on_one_machine(timing) if row["batch"] == batch]
    seconds = {replace(Setting.of(row), batch=None): row["seconds_per_image"] for row in times}
    points = []
    for rows in lines_of(quality):
        setting, name = Setting.of(rows[0]), "fd" if "fd" in rows[0] else "fid"
        time = seconds.get(replace(setting, samples=None))
        if time is not None and name in rows[0]:
            distance = statistics.mean(row[name] for row in rows)
            points.append(Point(setting, rows[0]["teacher"], time, distance, title_of(name, rows)))
    return points


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
        raise ValueError("no setting has both a distance and a time: nothing to plot")
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
