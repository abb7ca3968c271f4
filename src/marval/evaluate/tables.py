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
    for row in results.get("quality", {}).get("rows", []):
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


def fill_markdown(document: Path, root: Path) -> bool:
    """Fill every `<!-- results: FILE -->` ... `<!-- end -->` of a document with FILE's table; True if it changed."""
    text = document.read_text()
    filled = re.sub(
        r"<!-- results: (\S+) -->.*?<!-- end -->",
        lambda m: f"<!-- results: {m[1]} -->\n{markdown_table(root / m[1])}\n<!-- end -->",
        text,
        flags=re.DOTALL,
    )
    if filled != text:
        write_text(document, filled)
    return filled != text


if __name__ == "__main__":  # python -m marval.evaluate.tables README.md ...
    import sys

    for name in sys.argv[1:]:
        print(f"{name}: {'filled' if fill_markdown(Path(name), Path.cwd()) else 'unchanged'}")
