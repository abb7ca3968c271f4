"""Results as tables: quality, speed, and what the figures mean."""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from marval.evaluate.features import FEATURES
from marval.evaluate.metrics import METRICS, changed_between
from marval.evaluate.results import (
    Results,
    Row,
    by_setting,
    on_one_machine,
    read_results,
    standard_error,
    version_of,
    who,
)

WIDTH = 200  # characters, where no terminal says how many
COLUMNS = {  # figure: title and format; density and coverage are in the file alone
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


def title_of(name: str, rows: Iterable[Row]) -> str:
    """A figure's name in tables and plots; a distance on the user's own features says so."""
    other = sorted({row["features"] for row in rows if row.get("features", FEATURES) not in (FEATURES, "")})
    return f"FD on {', '.join(other)}" if name == "fd" and other else COLUMNS[name][0]


def quality_table(quality: Sequence[Row], timing: Sequence[Row] = ()) -> Cells:
    """Quality by model and K (of several seeds, mean and standard error), and the times of `timing` beside it.

    T and w have columns where a teacher was measured at several, and so has the order.
    """
    names = [name for name in COLUMNS if any(name in row for row in quality)]
    times, _ = on_one_machine(timing)
    batches = sorted({row["batch"] for row in times})
    several = len({who(row) for row in quality}) > len({row["model"] for row in quality})
    orders = len({(row["model"], row.get("order")) for row in quality}) > len({row["model"] for row in quality})
    header = ["model", "K", *(["order"] if orders else []), *(("T", "w") if several else ()), "samples"]
    header += [title_of(name, quality) for name in names]
    header += [f"ms / image, batch {batch}" for batch in batches]
    models = models_of(quality)

    def place(rows: list[Row]) -> tuple[Any, ...]:
        model, steps, guidance = who(rows[0])
        return models.index(model), -(steps or 0), guidance or 0, rows[0]["iterations"], rows[0]["samples"]

    lines = []
    for rows in sorted(by_setting(quality), key=place):
        row = rows[0]
        cells = [row["model"], str(row["iterations"]), *([str(row.get("order"))] if orders else [])]
        cells += [*(_chain(row) if several else ()), str(row["samples"])]
        cells += [_cell([row[name] for row in rows if name in row], name) for name in names]
        lines.append(cells + [_milliseconds(times, row, batch) for batch in batches])
    return header, lines


def models_of(rows: Sequence[Row]) -> list[str]:
    """The models' names: teachers first, else in the order in which they were first measured."""
    return list(dict.fromkeys(row["model"] for row in sorted(rows, key=lambda row: not row.get("teacher"))))


def _chain(row: Row) -> tuple[str, str]:
    _, steps, guidance = who(row)
    return str(steps or ""), "" if guidance is None else f"{guidance:g}"


def _cell(values: list[float], name: str) -> str:
    if not values:
        return ""
    mean, error = (format(value, COLUMNS[name][1]) for value in standard_error(values))
    return f"{mean} ± {error}" if len(values) > 1 and name != "gflops_per_image" else mean


def _milliseconds(times: Sequence[Row], row: Row, batch: int) -> str:
    """Format the time in the precision of the row's images; a time in the other precision says so."""
    here = [t for t in times if who(t) == who(row) and t["iterations"] == row["iterations"] and t["batch"] == batch]
    for time in sorted(here, key=lambda time: precision_of(time) != precision_of(row)):
        mark = "" if precision_of(time) == precision_of(row) else f" ({precision_of(time)})"
        return f"{time['seconds_per_image'] * 1000:.2f}{mark}"
    return ""


def precision_of(row: Row) -> str:
    return "bf16" if row.get("autocast") else "float32"


def speed_table(timing: Sequence[Row]) -> Cells:
    """For every (model, T, w, K): latency at the smallest batch, and throughput at the best."""
    times, _ = on_one_machine(timing)
    settings: dict[Any, list[Row]] = {}
    for row in times:
        settings.setdefault((who(row), row["iterations"], precision_of(row)), []).append(row)
    header = ["model", "K", "T", "w", "precision", "ms / image (batch)", "images / s (batch)", "GFLOP / image"]
    header += ["of the machine's peak", "MiB"]
    lines = []
    for rows in settings.values():
        alone, best = min(rows, key=lambda row: row["batch"]), min(rows, key=lambda row: row["seconds_per_image"])
        lines.append([
            alone["model"], str(alone["iterations"]), *_chain(alone), precision_of(alone),
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
    for version in sorted({version_of(row) for row in quality} - {METRICS}):
        for name, before in changed_between(version, METRICS).items():
            if any(name in row for row in quality if version_of(row) == version):
                notes.append(f"{COLUMNS[name][0]} by metrics {version} is {before}; today's metrics are {METRICS}.")
    precisions = {precision_of(row) for row in quality}
    if timing and precisions:
        notes.append(
            f"The images of the figures were drawn in {' or '.join(sorted(precisions))}; times of another precision "
            "are marked. Times include decoding."
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
