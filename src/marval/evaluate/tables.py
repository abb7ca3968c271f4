"""Tables from results files: on the console, and between the marks of a Markdown file."""

import re
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from marval.evaluate.evaluate import read_results
from marval.io.files import write_text

COLUMNS = {
    "fd": ("FD-EfficientNet", "{:.2f}"),
    "accuracy": ("held-out accuracy", "{:.4f}"),
    "log_probability": ("held-out log-probability", "{:.4f}"),
    "diversity": ("diversity", "{:.3f}"),
    "gflops_per_image": ("GFLOP / image", "{:.2f}"),
}


def table_of(file: Path) -> tuple[list[str], list[list[str]]]:
    """Header and rows: quality and, where it was measured, time per image at each batch size."""
    results = read_results(file)
    timing = results.get("timing", {}).get("rows", [])
    batches = sorted({row["batch"] for row in timing})
    header = [
        "model",
        "K",
        "samples",
        *(title for title, _ in COLUMNS.values()),
        *(f"ms / image, batch {b}" for b in batches),
    ]
    rows = []
    quality = results.get("quality", {}).get("rows", [])
    models = list(dict.fromkeys(row["model"] for row in quality))  # in the order in which they were first measured
    for row in sorted(quality, key=lambda row: (models.index(row["model"]), row["iterations"], row["samples"])):
        cells = [row["model"], str(row["iterations"]), str(row["samples"])]
        cells += [form.format(row[name]) if name in row else "" for name, (_, form) in COLUMNS.items()]
        cells += [_milliseconds(timing, row, batch) for batch in batches]
        rows.append(cells)
    return header, rows


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
    Console().print(table)


def markdown_table(file: Path) -> str:
    """The table of a results file in Markdown."""
    header, rows = table_of(file)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def speedup_table(file: Path) -> str:
    """Every other model against the first (the teacher) in Markdown: FD ratio and speed-ups at the same K.

    The last lines name each model's smallest K whose FD is not above the first model's at K = 16 with as many
    samples, and the speed-up there: the same quality.
    """
    results = read_results(file)
    quality, timing = results["quality"]["rows"], results["timing"]["rows"]
    teacher = quality[0]["model"]
    fd: dict[tuple[str, int, int], float] = {(r["model"], r["iterations"], r["samples"]): r["fd"] for r in quality}
    seconds = {(r["model"], r["iterations"], r["batch"]): r["seconds_per_image"] for r in timing}
    batches = sorted({r["batch"] for r in timing})
    lines = [["model", "K", "samples", f"FD / {teacher}'s", *(f"speed-up, batch {b}" for b in batches)]]
    lines.append(["---"] * len(lines[0]))
    for (model, k, samples), value in fd.items():
        if model != teacher and (teacher, k, samples) in fd:
            speed = [f"{seconds[teacher, k, b] / seconds[model, k, b]:.0f}x" for b in batches]
            lines.append([model, str(k), str(samples), f"{value / fd[teacher, k, samples]:.3f}", *speed])
    notes = []
    reference = 16
    for model in dict.fromkeys(m for m, _, _ in fd if m != teacher):
        enough = [
            (k, samples)
            for (m, k, samples), value in sorted(fd.items(), key=lambda item: item[0][1])
            if m == model and (teacher, reference, samples) in fd and value <= fd[teacher, reference, samples]
        ]
        if enough:
            k, samples = enough[0]
            speed = [f"{seconds[teacher, reference, b] / seconds[model, k, b]:.0f}x at batch {b}" for b in batches]
            notes.append(
                f"{model} reaches the FD of {teacher} at K = {reference} with K = {k} ({samples} samples): "
                + ", ".join(speed)
                + "."
            )
        else:
            notes.append(f"{model} does not reach the FD of {teacher} at K = {reference} at any K measured.")
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n\n" + "\n".join(notes)


def rewards_table(file: Path) -> str:
    """Rewards over class-name prompts in Markdown: mean and standard error, one row for each model and K."""
    rows = read_results(file).get("rewards", {}).get("rows", [])
    names = list(dict.fromkeys(name for row in rows for name in row["rewards"]))
    lines = [["model", "K", "images", "prompts", "seeds", *names]]
    lines.append(["---"] * len(lines[0]))
    for row in rows:
        cells = [row["model"], *(str(row[key]) for key in ("iterations", "samples", "prompts", "seeds"))]
        for name in names:
            found = row["rewards"].get(name)
            cells.append("" if found is None else f"{found['mean']:.4f} ± {found['standard_error']:.4f}")
        lines.append(cells)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def fill_markdown(document: Path, root: Path) -> bool:
    """Fill every `<!-- results: FILE -->` (or `speed:`, `rewards:`) up to `<!-- end -->`; True if that changed it."""
    text = document.read_text()
    makers = {"results": markdown_table, "speed": speedup_table, "rewards": rewards_table}

    def table(match: re.Match[str]) -> str:
        kind, name = match[1], match[2]
        if not (root / name).is_file():
            raise ValueError(f"{document} shows {name}, which is not there: write it with marval evaluate --out {name}")
        return f"<!-- {kind}: {name} -->\n{makers[kind](root / name)}\n<!-- end -->"

    filled = re.sub(r"<!-- (results|speed|rewards): (\S+) -->.*?<!-- end -->", table, text, flags=re.DOTALL)
    if filled != text:
        write_text(document, filled)
    return filled != text


if __name__ == "__main__":  # python -m marval.evaluate.tables README.md ...
    import sys

    for name in sys.argv[1:]:
        print(f"{name}: {'filled' if fill_markdown(Path(name), Path.cwd()) else 'unchanged'}")
