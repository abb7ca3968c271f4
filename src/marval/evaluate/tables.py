"""Tables of results files, on the console and in Markdown."""

import statistics
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from marval.evaluate.features import FEATURES
from marval.evaluate.metrics import METRICS, changed_between
from marval.evaluate.results import (
    Row,
    by_setting,
    markdown,
    mean_distances,
    on_one_machine,
    read_results,
    setting,
    standard_error,
    times_by_batch,
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
    chains = {(r["model"], r["draw"].get("steps"), r["draw"].get("guidance")) for r in quality}
    several = len(chains) > len({model for model, _, _ in chains})
    header = ["model", "K", *(("T", "w") if several else ()), "samples", *columns.values()]
    header += [f"ms / image, batch {b}" for b in batches]
    models = models_of(quality)
    rows = []
    for group in sorted(by_setting(quality).values(), key=lambda group: _place(group[0], models)):
        row, draw = group[0], group[0]["draw"]
        chain = [str(draw.get("steps", "")), f"{draw['guidance']:g}" if "guidance" in draw else ""] if several else []
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
    chain = -draw.get("steps", 0), draw.get("guidance", 0)
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


def markdown_table(file: Path) -> str:
    """The table of a results file in Markdown, as wide as a page shows it, and what it means."""
    without = [name for name in COLUMNS if name.endswith(("density", "coverage"))]
    return "\n".join([markdown(*table_of(file, without)), "", " ".join(notes_of(file))]).rstrip()


def speedup_table(file: Path) -> str:
    """Every other model against the teacher in Markdown: FD ratio and speed-ups at the same K.

    Only distances of equal numbers of images in one precision, and times of one machine in one precision, make ratios.
    """
    results = read_results(file)
    quality = results["quality"]["rows"]
    teacher = models_of(quality)[0]
    fd = mean_distances(quality)
    timing = times_by_batch(results)
    batches = sorted({batch for _, _, batch in timing})

    def speed_up(model: str, k: int, batch: int) -> str:
        slow, fast = timing.get((teacher, k, batch)), timing.get((model, k, batch))
        return f"{slow['seconds_per_image'] / fast['seconds_per_image']:.0f}x" if slow and fast else ""

    header = ["model", "K", "samples", f"FD / {teacher}'s", *(f"speed-up, batch {b}" for b in batches)]
    lines = []
    for (model, k, samples, autocast), value in fd.items():
        if model != teacher and (teacher, k, samples, autocast) in fd:
            speed = [speed_up(model, k, batch) for batch in batches]
            lines.append([model, str(k), str(samples), f"{value / fd[teacher, k, samples, autocast]:.3f}", *speed])
    left_out = on_one_machine(results.get("timing", {}).get("rows", []))[1]
    return "\n".join([markdown(header, lines), *(["", left_out] if left_out else [])])


def bench_table(file: Path) -> str:
    """A bench's rows in Markdown, by batch size: seconds per image, operations, and speed-up over the teacher."""
    rows = read_results(file)["bench"]["rows"]
    header = ["model", "K", "batch", "s / image", "of it the context network", "GFLOP / image"]
    header += ["of the machine's peak", "speed-up", "by arithmetic alone"]
    lines = []
    for row in rows:
        seconds = row["seconds_per_image"]
        cells = [row["model"], str(row["iterations"]), str(row["batch"]), f"{seconds:.1f}"]
        cells += [f"{row['context_seconds'] / seconds:.0%}", f"{row['gflops_per_image']:,.0f}"]
        cells += [f"{row['fraction_of_peak']:.0%}"]
        cells += [f"{row[name]:.1f}x" if name in row else "" for name in ("speed_up", "speed_up_by_flops")]
        lines.append(cells)
    return markdown(header, lines)


def rewards_table(file: Path) -> str:
    """Rewards over class-name prompts in Markdown: mean ± its standard error, over all images of a model at one K."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in read_results(file).get("rewards", {}).get("rows", []):
        groups.setdefault((*setting(row), row.get("prompt"), version_of(row)), []).append(row)
    names = list(dict.fromkeys(name for rows in groups.values() for row in rows for name in row["rewards"]))
    header, lines = ["model", "K", "images", "prompts", "seeds", *names], []
    for rows in groups.values():
        images = str(sum(row["samples"] for row in rows))
        seeds = str(sum(row["seeds"] for row in rows))
        cells = [rows[0]["model"], str(rows[0]["iterations"]), images, str(rows[0]["prompts"]), seeds]
        for name in names:
            found = [row["rewards"][name] for row in rows if name in row["rewards"]]
            if not found:
                cells.append("")
                continue
            error = sum(part["standard_error"] ** 2 for part in found) ** 0.5 / len(found)
            cells.append(f"{statistics.mean(part['mean'] for part in found):.4f} ± {error:.4f}")
        lines.append(cells)
    return f"{markdown(header, lines)}\n\n± is one standard error of the mean, over the images."


def plan_table(file: Path) -> str:
    """The plan of full-size runs in Markdown, a column for each preset."""
    stages: dict[str, list[Row]] = {}
    for row in read_results(file)["plan"]["rows"]:
        stages.setdefault(row["stage"], []).append(row)
    distill, tune = stages["distill"], stages["finetune"]
    names = ("weights", "gradients", "optimiser", "gathered")

    def line(label: str, stage: list[Row], cell: Callable[[Row], str]) -> list[str]:
        return [label, *(cell(row) for row in stage)]

    def work(row: Row) -> str:
        return f"{row['pflop_per_step']:.2f}; {row['days']:.1f}"

    of = "PFLOP a step of {batch:,} images; days for {steps:,} steps"
    return markdown(
        ["", *(row["preset"] for row in distill)],
        [
            line(
                "distil: weights, gradients, optimiser, gathered layers (GiB a GPU)", distill,
                lambda row: f"{sum(row[f'{name}_gib'] for name in names):.2f}",
            ),
            line(
                "activations of an image, kept / with `--checkpoint-blocks` (MiB)", distill,
                lambda row: f"{row['kept_image_mib']:.0f} / {row['recomputed_image_mib']:.0f}",
            ),
            line(
                f"images at a time in {distill[0]['gpu_gib']:.0f} GiB, with `--checkpoint-blocks`", distill,
                lambda row: str(row["recomputed_images"]),
            ),
            line(of.format(**distill[0]), distill, work),
            line("tune: " + of.format(**tune[0]), tune, work),
        ],
    )  # fmt: skip
