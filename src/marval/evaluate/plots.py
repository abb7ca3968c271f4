"""Plots of quality against time and of sweeps (matplotlib, the extra `plots`)."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from marval.evaluate.pareto import Point
from marval.io.files import atomic_path


def need_matplotlib() -> Any:
    """matplotlib's figure class, without a display.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("plots need matplotlib: pip install matplotlib") from error
    return Figure


def save_figure(figure: Any, file: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    with atomic_path(file) as partial:
        figure.savefig(partial, format="png", dpi=120)


def curves_of(points: Sequence[Point]) -> dict[str, list[Point]]:
    """Points by model and, for teachers, T and w, each curve by growing K."""
    curves: dict[str, list[Point]] = {}
    for p in points:
        curves.setdefault(p.curve, []).append(p)
    return {name: sorted(curve, key=lambda p: p.iterations) for name, curve in curves.items()}


def draw_pareto(points: Sequence[Point], file: Path, batch: int) -> None:
    """Quality against time per image in the manner of MARVAL's figure 1: one point for each (model, K, T), K beside it.

    Teachers are dashed. Left and below is better.
    """
    figure = need_matplotlib()(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    for name, curve in curves_of(points).items():
        style = {"linestyle": "--", "marker": "s"} if curve[0].teacher else {"linestyle": "-", "marker": "o"}
        axes.plot([p.seconds * 1000 for p in curve], [p.fd for p in curve], label=name, markersize=5, **style)
        for p in curve:
            place = (p.seconds * 1000, p.fd)
            axes.annotate(f"K={p.iterations}", place, (4, 4), textcoords="offset points", fontsize=7)
    axes.set(
        xscale="log", xlabel=f"ms per image, batch {batch}", ylabel=f"{points[0].measure} ({_samples(points)} samples)"
    )
    for kind in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        kind(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "125" else "")  # 1, 2, 5, 10, 20, ... in plain numbers
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    save_figure(figure, file)


def draw_sweep(points: Sequence[Point], file: Path, batch: int) -> None:
    """Fréchet distance and held-out accuracy over K, one curve for each T and w."""
    figure = need_matplotlib()(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    panels: list[tuple[Any, str, Callable[[Point], float | None]]] = [
        (left, f"{points[0].measure} ({_samples(points)} samples)", lambda p: p.fd),
        (right, "held-out accuracy", lambda p: p.accuracy),
    ]
    for axes, title, value in panels:
        for name, curve in curves_of(points).items():
            known = [(p.iterations, value(p)) for p in curve if value(p) is not None]
            axes.plot([k for k, _ in known], [v for _, v in known], marker="o", label=name)
        axes.set(xscale="log", xlabel="K", ylabel=title)
        axes.set_xticks(ticks := sorted({p.iterations for p in points}), [str(k) for k in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    left.legend(fontsize=8)
    save_figure(figure, file)


def _samples(points: Sequence[Point]) -> str:
    return " / ".join(f"{n:,}" for n in sorted({p.samples for p in points}))
