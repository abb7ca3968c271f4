"""Fill the marked tables of Markdown files from results files, with the commands that made them.

    python tools/tables.py docs/results.md docs/full-size.md

A table stands between `<!-- table: KIND results/FILE.json -->` and `<!-- end -->`; kinds are those of `TABLES`.
"""

import re
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from marval.evaluate.report import lines_of, notes_of, quality_table
from marval.evaluate.results import Results, Row, Setting, by_setting, on_one_machine, read_results
from marval.io.files import write_text

MARK = re.compile(r"<!-- table: (\S+) (\S+) -->(.*?)<!-- end -->", re.DOTALL)


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *lines))


def recorded(file: Path) -> Results:
    """Return the rows of a results file, where what the former bench timed, tokens alone, is timing as well."""
    results = read_results(file)
    tokens = [{"decoded": False, **row} for row in results.pop("bench", [])]
    timing = [{"decoded": True, **row} for row in results.get("timing", [])] + tokens
    return {**results, "timing": timing} if timing else results


def quality(results: Results) -> str:
    """Return quality by model and K, times where they were measured with it, and what the figures mean."""
    rows, times = results["quality"], [row for row in results.get("timing", []) if row["decoded"]]
    header, lines = quality_table(rows)
    notes = notes_of(rows)
    if any("diversity" in row and row.get("metrics", 1) < 2 for row in rows):
        notes.append("diversity by metrics 1 is of the first 200 images of a class; today's metrics are 2.")
    if times:
        precisions = " or ".join(sorted({Setting.of(row).precision for row in rows}))
        notes.append(
            f"The images of the figures were drawn in {precisions}; times of another precision are marked. Times "
            "include decoding."
        )
    for batch in sorted({row["batch"] for row in times}):
        header.append(f"ms / image, batch {batch}")
        for line, group in zip(lines, lines_of(rows), strict=True):
            line.append(milliseconds(times, group[0], batch))
    return "\n\n".join([markdown(header, lines), " ".join(notes)]).rstrip()


def milliseconds(times: Sequence[Row], row: Row, batch: int) -> str:
    """Format the time of a row's setting in the precision of its images; another precision is marked."""
    wanted = Setting.of(row)
    here = [time for time in times if time["batch"] == batch and str(Setting.of(time)) == str(wanted)]
    if not here:
        return ""
    time = min(here, key=lambda time: Setting.of(time).precision != wanted.precision)
    precision = Setting.of(time).precision
    return f"{time['seconds_per_image'] * 1000:.2f}" + (f" ({precision})" if precision != wanted.precision else "")


def speed(results: Results) -> str:
    """Return each model's Fréchet distance over the teacher's at the same K, and its speed-ups.

    Only distances of equal numbers of images in one precision, and times of one machine in one precision, make ratios.
    A teacher counts as it was measured first, where it was measured at several T and w.
    """
    rows, timing = results["quality"], on_one_machine(results.get("timing", []))
    teacher, first = lines_of(rows)[0][0]["model"], {row["model"]: Setting.of(row).curve for row in reversed(rows)}
    fd: dict[tuple[Any, ...], float] = {}
    for group in by_setting(row for row in rows if Setting.of(row).curve == first[row["model"]] and "fd" in row):
        key = (*(group[0].get(name) for name in ("model", "iterations", "samples")), Setting.of(group[0]).precision)
        fd.setdefault(key, statistics.mean(row["fd"] for row in group))
    usual = statistics.mode([Setting.of(row).precision for row in timing] or [""])
    seconds = {
        (row["model"], row["iterations"], row["batch"]): row["seconds_per_image"]
        for row in timing
        if Setting.of(row).curve == first.get(row["model"]) and Setting.of(row).precision == usual
    }
    batches = sorted({batch for _, _, batch in seconds})

    def speed_up(model: str, k: int, batch: int) -> str:
        slow, fast = seconds.get((teacher, k, batch)), seconds.get((model, k, batch))
        return f"{slow / fast:.0f}x" if slow and fast else ""

    header = ["model", "K", "samples", f"FD / {teacher}'s", *(f"speed-up, batch {batch}" for batch in batches)]
    lines = [
        [model, str(k), str(samples), f"{value / fd[same]:.3f}", *(speed_up(model, k, batch) for batch in batches)]
        for (model, k, samples, precision), value in fd.items()
        if model != teacher and (same := (teacher, k, samples, precision)) in fd
    ]
    return markdown(header, lines)


def bench(results: Results) -> str:
    """Return seconds per image, operations, and speed-up over the teacher at the same K and batch size."""
    lines, rows = [], results["timing"]
    context = ["of it the context network"] if all("context_seconds" in row for row in rows) else []
    header = ["model", "K", "batch", "s / image", *context, "GFLOP / image", "of the machine's peak", "speed-up"]
    header += ["by arithmetic alone"]
    for row in rows:
        cells = [row["model"], str(row["iterations"]), str(row["batch"]), f"{row['seconds_per_image']:.1f}"]
        cells += [f"{row['context_seconds'] / row['seconds_per_image']:.0%}"] if context else []
        peak = f"{row['fraction_of_peak']:.0%}" if "fraction_of_peak" in row else ""
        cells += [f"{row['gflops_per_image']:,.0f}", peak]
        same = [r for r in rows if r["teacher"] and all(r[n] == row[n] for n in ("iterations", "batch"))]
        same = [r for r in same if Setting.of(r).precision == Setting.of(row).precision]
        ratios = ["", ""]
        if same and not row["teacher"]:
            ratios = [f"{same[0][name] / row[name]:.1f}x" for name in ("seconds_per_image", "gflops_per_image")]
        lines.append(cells + ratios)
    return markdown(header, lines)


def rewards(results: Results) -> str:
    """Return mean rewards over class-name prompts, over all images of a model at one K."""
    groups = by_setting(results["rewards"])
    names = list(dict.fromkeys(name for rows in groups for row in rows for name in row["rewards"]))

    def cell(rows: list[Row], name: str) -> str:
        parts = [row["rewards"][name] for row in rows if name in row["rewards"]]
        if not parts:
            return ""
        error = sum(part["standard_error"] ** 2 for part in parts) ** 0.5 / len(parts)
        return f"{statistics.mean(part['mean'] for part in parts):.4f} ± {error:.4f}"

    lines = []
    for rows in groups:
        images, seeds = (str(sum(row[name] for row in rows)) for name in ("samples", "seeds"))
        cells = [rows[0]["model"], str(rows[0]["iterations"]), images, str(rows[0]["prompts"]), seeds]
        lines.append(cells + [cell(rows, name) for name in names])
    table = markdown(["model", "K", "images", "prompts", "seeds", *names], lines)
    return f"{table}\n\n± is one standard error of the mean, over the images."


def plan(results: Results) -> str:
    """Return the plan of full-size runs, a column for each preset."""
    rows = [{"updates": row.get("steps"), **row} for row in results["plan"]]  # its older name
    distill, tune = ([row for row in rows if (row["stage"] == "distill") == first] for first in (True, False))
    memory = [f"{name}_gib" for name in ("weights", "optimiser", "gathered")]

    def work(row: Row) -> str:
        return f"{row['pflop_per_step']:.2f}; {row['days']:.1f}"

    of = "PFLOP an update of {batch:,} images; days for {updates:,} updates"
    fit = f"images at a time in {distill[0]['gpu_gib']:.0f} GiB, with `--checkpoint-blocks`"
    lines: list[tuple[str, list[Row], Callable[[Row], str]]] = [
        ("distil: weights, optimiser, gathered layers (GiB a GPU)", distill,
         lambda row: f"{sum(row[name] for name in memory):.2f}"),
        ("activations of an image, kept / with `--checkpoint-blocks` (MiB)", distill,
         lambda row: f"{row['kept_image_mib']:.0f} / {row['recomputed_image_mib']:.0f}"),
        (fit, distill, lambda row: str(row["recomputed_images"])),
        (of.format(**distill[0]), distill, work),
        ("tune: " + of.format(**tune[0]), tune, work),
    ]  # fmt: skip
    header = ["", *(row["preset"] for row in distill)]
    return markdown(header, [[label, *map(cell, stage)] for label, stage, cell in lines])


TABLES: dict[str, tuple[Callable[[Results], str], tuple[str, ...]]] = {  # and the parts that each is made of
    "quality": (quality, ("quality", "timing")),
    "speed": (speed, ("quality", "timing")),
    "bench": (bench, ("timing",)),
    "rewards": (rewards, ("rewards",)),
    "plan": (plan, ("plan",)),
}


def made_by(results: Results, parts: tuple[str, ...]) -> str:
    """Return the commands that made the rows of some parts, and at which commit."""
    lines = [
        f"- {part}: `{row['made']['command']}` at commit {row['made']['commit'][:7]}"
        for part, rows in results.items()
        for row in rows
        if part in parts
    ]
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
        (table, parts), results = TABLES[kind], recorded(root / name)
        return f"<!-- table: {kind} {name} -->\n{table(results)}\n\n{made_by(results, parts)}\n<!-- end -->"

    return MARK.sub(filled, text)


if __name__ == "__main__":
    for document in map(Path, sys.argv[1:]):
        write_text(document, fill(document.read_text(), Path.cwd()))
        print(f"{document}: filled")
