"""Tables of results files, on the console and in Markdown."""

import statistics
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from marval.evaluate.features import FEATURES
from marval.evaluate.results import (
    Row,
    by_setting,
    markdown,
    mean_distances,
    read_results,
    setting,
    times_by_batch,
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
    "kid": ("KID", "{:.3f}"),
    "inception_kid": ("Inception KID", "{:.5f}"),
    "precision": ("precision", "{:.3f}"),
    "recall": ("recall", "{:.3f}"),
    "density": ("density", "{:.3f}"),
    "coverage": ("coverage", "{:.3f}"),
    "gflops_per_image": ("GFLOP / image", "{:.2f}"),
}


def table_of(file: Path, without: Collection[str] = ()) -> tuple[list[str], list[list[str]]]:
    """Header and rows: quality (of several seeds, mean and half their range), and time per image at each batch size.

    T and w have columns where a teacher was measured at several; `without` names figures that are left out.
    """
    results = read_results(file)
    timing = results.get("timing", {}).get("rows", [])
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
    spread = (max(values) - min(values)) / 2
    mean = form.format(statistics.mean(values))
    return f"{mean} ± {form.format(spread)}" if len(values) > 1 and name != "gflops_per_image" else mean


def _milliseconds(timing: list[dict[str, Any]], row: dict[str, Any], batch: int) -> str:
    for other in timing:
        if all(other[name] == row[name] for name in ("model", "draw", "iterations")) and other["batch"] == batch:
            return f"{other['seconds_per_image'] * 1000:.2f}"
    return ""


def print_table(file: Path) -> None:
    """The table of a results file on the console."""
    header, rows = table_of(file)
    table = Table(*header, title=str(file))
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else WIDTH).print(table)


def markdown_table(file: Path) -> str:
    """The table of a results file in Markdown, as wide as a page shows it."""
    return markdown(*table_of(file, without=("density", "coverage")))


def speedup_table(file: Path) -> str:
    """Every other model against the teacher in Markdown: FD ratio and speed-ups at the same K."""
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
    for (model, k, samples), value in fd.items():
        if model != teacher and (teacher, k, samples) in fd:
            speed = [speed_up(model, k, batch) for batch in batches]
            lines.append([model, str(k), str(samples), f"{value / fd[teacher, k, samples]:.3f}", *speed])
    return markdown(header, lines)


def bench_table(file: Path) -> str:
    """A bench's rows in Markdown, by batch size: seconds per image, operations, and speed-up over the teacher."""
    rows = read_results(file)["bench"]["rows"]
    header = ["model", "K", "batch", "s / image", "of it the context network", "GFLOP / image"]
    header += ["of the machine's peak", "speed-up", "by arithmetic alone"]
    lines = []
    for row in rows:
        seconds = row["seconds_per_image"]
        cells = [row["model"], str(row["iterations"]), str(row["batch"]), f"{seconds:.1f}"]
        cells += [f"{min(1.0, row['context_seconds'] / seconds):.0%}", f"{row['gflops_per_image']:,.0f}"]
        cells += [f"{row['fraction_of_peak']:.0%}"]
        cells += [f"{row[name]:.1f}x" if name in row else "" for name in ("speed_up", "speed_up_by_flops")]
        lines.append(cells)
    return markdown(header, lines)


def rewards_table(file: Path) -> str:
    """Rewards over class-name prompts in Markdown: mean and standard error over all images of a model at one K."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in read_results(file).get("rewards", {}).get("rows", []):
        groups.setdefault((*setting(row), row["prompt"]), []).append(row)
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
    return markdown(header, lines)


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
