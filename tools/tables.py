"""Fill the marked tables of Markdown files from results files, with the commands that made them.

    python tools/tables.py docs/results.md docs/full-size.md

A table stands between `<!-- table: KIND results/FILE.json -->` and `<!-- end -->`; kinds are those of `TABLES`.
"""

import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from marval.evaluate.results import (
    Row,
    by_setting,
    markdown,
    on_one_machine,
    read_results,
    setting,
    version_of,
)
from marval.evaluate.tables import COLUMNS, models_of, notes_of, table_of
from marval.io.files import write_text

MARK = re.compile(r"<!-- table: (\S+) (\S+) -->(.*?)<!-- end -->", re.DOTALL)


def quality(file: Path) -> str:
    """Return quality by model and K, times where they were measured, and what the figures mean."""
    without = [name for name in COLUMNS if name.endswith(("density", "coverage"))]
    return "\n\n".join([markdown(*table_of(file, without)), " ".join(notes_of(file))]).rstrip()


def speed(file: Path) -> str:
    """Return each model's Fréchet distance over the teacher's at the same K, and its speed-ups.

    Only distances of equal numbers of images in one precision, and times of one machine in one precision, make ratios.
    A teacher counts as it was measured first, where it was measured at several T and w.
    """
    results = read_results(file)
    rows, (timing, left_out) = results["quality"]["rows"], on_one_machine(results.get("timing", {}).get("rows", []))
    teacher, draws = models_of(rows)[0], {row["model"]: row["draw"] for row in reversed(rows)}
    fd: dict[tuple[str, int, int, bool], float] = {}
    for group in by_setting(row for row in rows if row["draw"] == draws[row["model"]] and "fd" in row).values():
        key = (group[0]["model"], group[0]["iterations"], group[0]["samples"], bool(group[0].get("autocast")))
        fd.setdefault(key, statistics.mean(row["fd"] for row in group))
    precision = statistics.mode([bool(row.get("autocast")) for row in timing] or [False])
    seconds = {
        (row["model"], row["iterations"], row["batch"]): row["seconds_per_image"]
        for row in timing
        if row["draw"] == draws.get(row["model"]) and bool(row.get("autocast")) == precision
    }
    batches = sorted({batch for _, _, batch in seconds})

    def speed_up(model: str, k: int, batch: int) -> str:
        slow, fast = seconds.get((teacher, k, batch)), seconds.get((model, k, batch))
        return f"{slow / fast:.0f}x" if slow and fast else ""

    header = ["model", "K", "samples", f"FD / {teacher}'s", *(f"speed-up, batch {b}" for b in batches)]
    lines = [
        [model, str(k), str(samples), f"{value / fd[same]:.3f}", *(speed_up(model, k, batch) for batch in batches)]
        for (model, k, samples, autocast), value in fd.items()
        if model != teacher and (same := (teacher, k, samples, autocast)) in fd
    ]
    return "\n\n".join([markdown(header, lines), *([left_out] if left_out else [])])


def bench(file: Path) -> str:
    """Return seconds per image, operations, and speed-up over the teacher."""
    header = ["model", "K", "batch", "s / image", "of it the context network", "GFLOP / image"]
    header += ["of the machine's peak", "speed-up", "by arithmetic alone"]
    lines = []
    for row in read_results(file)["bench"]["rows"]:
        seconds = row["seconds_per_image"]
        cells = [row["model"], str(row["iterations"]), str(row["batch"]), f"{seconds:.1f}"]
        cells += [f"{row['context_seconds'] / seconds:.0%}", f"{row['gflops_per_image']:,.0f}"]
        cells += [f"{row['fraction_of_peak']:.0%}"]
        lines.append(cells + [f"{row[n]:.1f}x" if n in row else "" for n in ("speed_up", "speed_up_by_flops")])
    return markdown(header, lines)


def rewards(file: Path) -> str:
    """Return mean rewards over class-name prompts, over all images of a model at one K."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in read_results(file).get("rewards", {}).get("rows", []):
        groups.setdefault((*setting(row), row.get("prompt"), version_of(row)), []).append(row)
    names = list(dict.fromkeys(name for rows in groups.values() for row in rows for name in row["rewards"]))

    def cell(rows: list[Row], name: str) -> str:
        found = [row["rewards"][name] for row in rows if name in row["rewards"]]
        if not found:
            return ""
        error = sum(part["standard_error"] ** 2 for part in found) ** 0.5 / len(found)
        return f"{statistics.mean(part['mean'] for part in found):.4f} ± {error:.4f}"

    lines = []
    for rows in groups.values():
        images, seeds = (str(sum(row[name] for row in rows)) for name in ("samples", "seeds"))
        cells = [rows[0]["model"], str(rows[0]["iterations"]), images, str(rows[0]["prompts"]), seeds]
        lines.append(cells + [cell(rows, name) for name in names])
    table = markdown(["model", "K", "images", "prompts", "seeds", *names], lines)
    return f"{table}\n\n± is one standard error of the mean, over the images."


def plan(file: Path) -> str:
    """Return the plan of full-size runs, a column for each preset."""
    rows = read_results(file)["plan"]["rows"]
    distill, tune = ([row for row in rows if row["stage"] in stage] for stage in (("distill",), ("tune", "finetune")))
    memory = [f"{name}_gib" for name in ("weights", "gradients", "optimiser", "gathered")]

    def work(row: Row) -> str:
        return f"{row['pflop_per_step']:.2f}; {row['days']:.1f}"

    of = "PFLOP a step of {batch:,} images; days for {steps:,} steps"
    fit = f"images at a time in {distill[0]['gpu_gib']:.0f} GiB, with `--checkpoint-blocks`"
    lines: list[tuple[str, list[Row], Callable[[Row], str]]] = [
        ("distil: weights, gradients, optimiser, gathered layers (GiB a GPU)", distill,
         lambda row: f"{sum(row[name] for name in memory):.2f}"),
        ("activations of an image, kept / with `--checkpoint-blocks` (MiB)", distill,
         lambda row: f"{row['kept_image_mib']:.0f} / {row['recomputed_image_mib']:.0f}"),
        (fit, distill, lambda row: str(row["recomputed_images"])),
        (of.format(**distill[0]), distill, work),
        ("tune: " + of.format(**tune[0]), tune, work),
    ]  # fmt: skip
    header = ["", *(row["preset"] for row in distill)]
    return markdown(header, [[label, *map(cell, stage)] for label, stage, cell in lines])


TABLES = {  # and the parts of the results file that each is made of
    "quality": (quality, ("quality", "timing")),
    "speed": (speed, ("quality", "timing")),
    "bench": (bench, ("bench",)),
    "rewards": (rewards, ("rewards",)),
    "plan": (plan, ("plan",)),
}


def made_by(file: Path, parts: tuple[str, ...]) -> str:
    """Return the commands that made a results file's parts, and at which commit, from its own provenance."""
    lines = []
    for name, part in read_results(file).items():
        for row in part["rows"] if name in parts else ():
            made = {**part, **row.get("made", {})}
            lines.append(f"- {name}: `{made['command']}` at commit {made['commit'][:7]}")
    return "\n".join(["Made by", "", *dict.fromkeys(lines)])


def fill(text: str, root: Path) -> str:
    """Return the document with every marked table made anew from the results under `root`.

    Raises:
        ValueError: an unknown kind of table, or a results file that is missing.
    """

    def filled(match: re.Match[str]) -> str:
        kind, name = match[1], match[2]
        if kind not in TABLES:
            raise ValueError(f"unknown table {kind}: expected one of {', '.join(TABLES)}")
        if not (root / name).is_file():
            raise ValueError(f"{name} is not there: make it with --out {name}")
        table, parts = TABLES[kind]
        return f"<!-- table: {kind} {name} -->\n{table(root / name)}\n\n{made_by(root / name, parts)}\n<!-- end -->"

    return MARK.sub(filled, text)


if __name__ == "__main__":
    for document in map(Path, sys.argv[1:]):
        write_text(document, fill(document.read_text(), Path.cwd()))
        print(f"{document}: filled")
