"""The table of a results file on the console."""

import sys
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from marval.evaluate.features import FEATURES
from marval.evaluate.metrics import METRICS, changed_between
from marval.evaluate.results import (
    Row,
    by_setting,
    on_one_machine,
    read_results,
    standard_error,
    version_of,
)

WIDTH = 240  # characters, where no terminal says how many
COLUMNS = {
    "fd": ("FD-EfficientNet", "{:.2f}"),
    "fid": ("FID", "{:.3f}"),
    "inception_score": ("IS", "{:.2f}"),
    "sfid": ("sFID", "{:.3f}"),
    "inception_precision": ("Inception precision", "{:.3f}"),
    "inception_recall": ("Inception recall", "{:.3f}"),
    "accuracy": ("held-out accuracy", "{:.4f}"),
    "log_probability": ("held-out log-probability", "{:.4f}"),
    "diversity": ("diversity", "{:.3f}"),
    "inception_kid": ("Inception KID", "{:.5f}"),
    "efficientnet_kid": ("KID-EfficientNet", "{:.3f}"),
    "efficientnet_precision": ("precision-EfficientNet", "{:.3f}"),
    "efficientnet_recall": ("recall-EfficientNet", "{:.3f}"),
    "efficientnet_density": ("density-EfficientNet", "{:.3f}"),
    "efficientnet_coverage": ("coverage-EfficientNet", "{:.3f}"),
    "own_kid": ("KID on own features", "{:.3f}"),
    "own_precision": ("precision on own features", "{:.3f}"),
    "own_recall": ("recall on own features", "{:.3f}"),
    "own_density": ("density on own features", "{:.3f}"),
    "own_coverage": ("coverage on own features", "{:.3f}"),
    "gflops_per_image": ("GFLOP / image", "{:.2f}"),
}


def table_of(file: Path, without: Collection[str] = ()) -> tuple[list[str], list[list[str]]]:
    """Header and rows: quality (of several seeds, mean and standard error), and time per image at each batch size.

    T and w have columns where a teacher was measured at several; `without` names figures that are left out.
    """
    results = read_results(file)
    timing, _ = on_one_machine(results.get("timing", {}).get("rows", []))
    batches = sorted({row["batch"] for row in timing})
    quality = results.get("quality", {}).get("rows", [])
    measured = [name for name in COLUMNS if name not in without and any(name in row for row in quality)]
    columns = {name: title_of(name, quality) for name in measured}
    chains = {(r["model"], r["draw"].get("diffusion_steps"), r["draw"].get("guidance")) for r in quality}
    several = len(chains) > len({model for model, _, _ in chains})
    header = ["model", "K", *(("T", "w") if several else ()), "samples", *columns.values()]
    header += [f"ms / image, batch {b}" for b in batches]
    models = models_of(quality)
    rows = []
    for group in sorted(by_setting(quality).values(), key=lambda group: _place(group[0], models)):
        row, draw = group[0], group[0]["draw"]
        chain = (
            [str(draw.get("diffusion_steps", "")), f"{draw['guidance']:g}" if "guidance" in draw else ""]
            if several
            else []
        )
        cells = [row["model"], str(row["iterations"]), *chain, str(row["samples"])]
        cells += [_cell([r[name] for r in group if name in r], name) for name in columns]
        cells += [_milliseconds(timing, row, batch) for batch in batches]
        rows.append(cells)
    return header, rows


def title_of(name: str, rows: Iterable[Row]) -> str:
    """A figure's name in tables and plots; a distance on the user's own features says so."""
    other = sorted({row["features"] for row in rows if row.get("features", FEATURES) not in (FEATURES, "")})
    return f"FD on {', '.join(other)}" if name == "fd" and other else COLUMNS[name][0]


def models_of(rows: Sequence[Row]) -> list[str]:
    """The models' names: teachers first, else in the order in which they were first measured."""
    return list(dict.fromkeys(row["model"] for row in sorted(rows, key=lambda row: not row.get("teacher"))))


def _place(row: Row, models: list[str]) -> tuple[Any, ...]:
    draw = row["draw"]
    chain = -draw.get("diffusion_steps", 0), draw.get("guidance", 0)
    return models.index(row["model"]), *chain, row["iterations"], row["samples"]


def _cell(values: list[float], name: str) -> str:
    if not values:
        return ""
    form = COLUMNS[name][1]
    mean, error = (form.format(value) for value in standard_error(values))
    return f"{mean} ± {error}" if len(values) > 1 and name != "gflops_per_image" else mean


def _milliseconds(timing: list[Row], row: Row, batch: int) -> str:
    """The time at the precision of the row's images; one of the other precision says so."""
    here = [
        other
        for other in timing
        if all(other[name] == row[name] for name in ("model", "draw", "iterations")) and other["batch"] == batch
    ]
    for other in sorted(here, key=lambda other: _precision(other) != _precision(row)):
        mark = "" if _precision(other) == _precision(row) else f" ({_precision(other)})"
        return f"{other['seconds_per_image'] * 1000:.2f}{mark}"
    return ""


def _precision(row: Row) -> str:
    return "bf16" if row.get("autocast") else "float32"


def notes_of(file: Path) -> list[str]:
    """What the table of a results file means: its ±, its features, its precision, and what is left out."""
    results = read_results(file)
    quality, timing = (results.get(part, {}).get("rows", []) for part in ("quality", "timing"))
    notes = []
    seeds = sorted({len(group) for group in by_setting(quality).values()} - {1})
    if seeds:
        counts = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
        notes.append(f"± is one standard error of the mean, over {counts} seeds of the images (not of trainings).")
    if any(name.startswith("efficientnet_") or name == "fd" for row in quality for name in row):
        notes.append(
            "Distances, KID, precision, recall, density and coverage on EfficientNet-Lite0's or own features are not "
            "the published figures of these names, which are on Inception's: they compare with each other only."
        )
    for version in sorted({version_of(row) for row in quality} - {METRICS}):
        for name, before in changed_between(version, METRICS).items():
            if any(name in row for row in quality if version_of(row) == version):
                notes.append(f"{COLUMNS[name][0]} by metrics {version} is {before}; today's metrics are {METRICS}.")
    precisions = {_precision(row) for row in quality}
    if timing and precisions:
        notes.append(
            f"The images of the figures were drawn in {' or '.join(sorted(precisions))}; times of another precision "
            "are marked. Times include decoding."
        )
    notes += [note for note in (on_one_machine(timing)[1],) if note]
    if any("fid" in row for row in quality):
        notes.append("FID, IS and sFID have not been checked against published values (see --reference in --help).")
    return notes


def print_table(file: Path) -> None:
    """The table of a results file on the console."""
    header, rows = table_of(file)
    table = Table(*header, title=str(file))
    for row in rows:
        table.add_row(*row)
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    console.print(table)
    for note in notes_of(file):
        console.print(note, markup=False, highlight=False)
