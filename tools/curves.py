"""Draw figures of quality against K or w, one panel a figure and one line a model, from files of `marval evaluate`.

    python tools/curves.py iterations docs/study-fd.png results/study-fd.json results/study-fd-judge.json

Each file gives a panel with its Fréchet distance, so files may differ in the features; the first one gives the others.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from marval.cli.options import run_script
from marval.evaluate.report import need_matplotlib
from marval.evaluate.results import Row, read_results
from marval.io.files import atomic_path

Axis = Literal["iterations", "guidance"]
FIGURES = {"efficientnet_recall": "recall-EfficientNet", "diversity": "diversity", "accuracy": "held-out accuracy"}


def place(row: Row, axis: Axis) -> float:
    """Where a row stands on the axis: its K or its w."""
    return float(row["iterations"] if axis == "iterations" else row["draw"]["guidance"])


def lines(rows: Sequence[Row], axis: Axis, figure: str) -> dict[str, list[tuple[float, float]]]:
    """Points (K or w, mean over seeds) by model, from left to right; rows without the figure are left out."""
    found: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        if figure in row:
            found.setdefault(row["model"], {}).setdefault(place(row, axis), []).append(row[figure])
    return {name: sorted((x, statistics.mean(ys)) for x, ys in points.items()) for name, points in found.items()}


def main(axis: Axis, out: Path, files: tuple[Path, ...]) -> None:
    """Draw the curves.

    Args:
        axis: iterations (K) or guidance (w)
        out: the picture, a .png
        files: results of evaluate
    """
    parts = [read_results(file).get("quality", []) for file in files]
    if not all(parts):
        raise ValueError(f"{files[[bool(part) for part in parts].index(False)]} has no figures of quality")
    panels = [(f"FD on {rows[0]['features'].split(',')[0]}", lines(rows, axis, "fd")) for rows in parts]
    panels += [(title, lines(parts[0], axis, name)) for name, title in FIGURES.items() if name in parts[0][0]]
    figure = need_matplotlib()(figsize=(3.2 * len(panels), 3), layout="constrained")
    for axes, (title, drawn) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name, points in drawn.items():
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name)
        ticks = sorted({x for points in drawn.values() for x, _ in points})
        axes.set(title=title, xlabel={"iterations": "K", "guidance": "w"}[axis], xscale="log")
        axes.set_xticks(ticks, [f"{x:g}" for x in ticks], minor=False)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    with atomic_path(out) as partial:
        figure.savefig(partial, format="png", dpi=100)


if __name__ == "__main__":
    run_script(main)
