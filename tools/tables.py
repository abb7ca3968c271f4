"""Fill the marked tables of Markdown files from results files, with the commands that made them.

    python tools/tables.py README.md docs/results.md docs/full-size.md

A table stands between `<!-- table: KIND results/FILE.json ... -->` and `<!-- end -->`; kinds are those of `TABLES`.
"""

import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from marval.cli.options import run_script
from marval.evaluate.report import lines_of, title_of
from marval.evaluate.results import Results, Row, Setting, on_one_machine, read_results
from marval.io.files import write_text

MARK = re.compile(r"<!-- table: (\S+) ([^>]+) -->.*?<!-- end -->", re.DOTALL)
FIGURES = {  # of the first space of features: title and format
    "efficientnet_recall": ("recall", ".2f"),
    "diversity": ("diversity", ".1f"),
    "accuracy": ("held-out accuracy", ".3f"),
    "gflops_per_image": ("GFLOP / image", ".1f"),
}
BRIEF_K = 4, 16
GROUPS = {"seen": "seen pairs", "held_out": "held-out pairs"}  # of concept and style, by examples/emoji/score.py
TOLD = "concept", "style", "both"


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *lines))


def recorded(*files: Path) -> Results:
    """Return the rows of results files, where what the former bench timed is timing as well."""
    results: Results = {}
    for file in files:
        for part, rows in read_results(file).items():
            results.setdefault("timing" if part == "bench" else part, []).extend(rows)
    return results


def models(results: Results, figures: Sequence[str] = tuple(FIGURES)) -> str:
    """Return Fréchet distances in every space of features, other figures in the first one, and times, by model and K.

    Beside a time stands how many times as fast that is as the first line's model, a teacher where there is one.
    """
    spaces: dict[str, list[Row]] = {}
    for row in results["quality"]:
        spaces.setdefault(title_of("fd", [row]).partition(" (")[0], []).append(row)
    seconds = {
        (str(Setting.of(row)), row["batch"]): row["seconds_per_image"]
        for row in on_one_machine(results.get("timing", []))
    }
    batches = sorted({batch for _, batch in seconds})
    groups = lines_of(next(iter(spaces.values())))

    def time(rows: list[Row], batch: int) -> str:
        slow, fast = (seconds.get((str(Setting.of(some[0])), batch)) for some in (groups[0], rows))
        ratio = f" ({slow / fast:.0f}x)" if slow and fast and rows is not groups[0] else ""
        return f"{1000 * fast:.3g}{ratio}" if fast else ""

    header = ["model", "K", *spaces, *(FIGURES[name][0] for name in figures)]
    header += [f"ms / image, batch {batch}" for batch in batches]
    lines = []
    for rows in groups:
        alike = [[row for row in space if Setting.of(row) == Setting.of(rows[0])] for space in spaces.values()]
        cells = [rows[0]["model"], str(rows[0]["iterations"]), *(mean(some, "fd", ".3g") for some in alike)]
        cells += [mean(rows, name, FIGURES[name][1]) for name in figures]
        lines.append(cells + [time(rows, batch) for batch in batches])
    return markdown(header, lines)


def mean(rows: Sequence[Row], name: str, form: str) -> str:
    """Format a figure's mean over the rows that have it."""
    values = [row[name] for row in rows if name in row]
    return format(statistics.mean(values), form) if values else ""


def brief(results: Results) -> str:
    """Return of `models` the distances and the times at batch 1, at two K."""
    kept = {part: [row for row in rows if row["iterations"] in BRIEF_K] for part, rows in results.items()}
    kept["timing"] = [row for row in kept.get("timing", []) if row["batch"] == 1]
    return models(kept, figures=())


def pairs(results: Results) -> str:
    """Return what a judge tells right of pictures of pairs of concept and style, and how far they are from drawings."""
    header = ["pictures", "K", *(f"{group}: {', '.join(TOLD)}" for group in GROUPS.values())]
    header += [f"{group}: distance from the own, the nearest drawing" for group in GROUPS.values()]
    lines = []
    for row in results["pairs"]:
        told = [" / ".join(f"{row[f'{group}_{name}']:.0%}" for name in TOLD) for group in GROUPS]
        far = [" / ".join(f"{row[f'{group}_{name}_distance']:.3f}" for name in ("own", "nearest")) for group in GROUPS]
        lines.append([row["model"], str(row["iterations"] or ""), *told, *far])
    return markdown(header, lines)


def bench(results: Results) -> str:
    """Return seconds per image, operations, and speed-up over the teacher at the same K and batch size."""
    lines, rows = [], results["timing"]
    context = ["share of the context network"] if all("context_seconds" in row for row in rows) else []
    header = ["model", "K", "batch", "s / image", *context, "GFLOP / image", "share of the machine's peak", "speed-up"]
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
    "models": (models, ("quality", "timing")),
    "brief": (brief, ()),  # its commands stand beside the other one
    "pairs": (pairs, ("pairs",)),
    "bench": (bench, ("timing",)),
    "plan": (plan, ("plan",)),
}


def made_by(results: Results, parts: tuple[str, ...]) -> str:
    """Return the commands that made the rows of some parts, and at which commit."""
    lines = [
        f"- {part}: `{row['made']['command']}` at commit {row['made']['commit'][:7]}"
        for part in parts
        for row in results.get(part, [])
    ]
    return "\n".join(["\n\nMade by", "", *dict.fromkeys(lines)]) if lines else ""


def fill(text: str, root: Path) -> str:
    """Return the document with every marked table made anew from the results under `root`.

    Raises:
        ValueError: an unknown kind of table, or a results file that is missing.
    """

    def filled(match: re.Match[str]) -> str:
        kind, names = match[1], match[2].split()
        if kind not in TABLES:
            raise ValueError(f"unknown table {kind}: expected one of {', '.join(TABLES)}")
        for name in names:
            if not (root / name).is_file():
                raise ValueError(f"{name} is not there: make it with --out {name}")
        (table, parts), results = TABLES[kind], recorded(*(root / name for name in names))
        return f"<!-- table: {kind} {match[2]} -->\n{table(results)}{made_by(results, parts)}\n<!-- end -->"

    return MARK.sub(filled, text)


def main(documents: tuple[Path, ...]) -> None:
    """Fill the tables of documents from the results files that they name.

    Args:
        documents: Markdown files.
    """
    for document in documents:
        write_text(document, fill(document.read_text(), Path.cwd()))
        print(f"{document}: filled")


if __name__ == "__main__":
    run_script(main)
