"""Quality against time per image: points, their table, the best within a budget, and who beats whom."""

import statistics
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from marval.evaluate.results import (
    Row,
    by_setting,
    curve_of,
    markdown,
    named,
    on_one_machine,
    read_results,
    version_of,
)
from marval.evaluate.tables import title_of


@dataclass(frozen=True)
class Point:
    """One (model, K, T, w): time per image, and quality as the mean over seeds."""

    model: str
    teacher: bool
    iterations: int
    curve: str  # model and, for a teacher, T and w: what K varies along
    label: str  # the same with K
    steps: int | None  # T; None for a student
    guidance: float | None  # w; None for a student
    seconds: float
    fd: float  # Fréchet distance: FID, where the quality is measured against ADM's reference
    measure: str  # the distance's name
    accuracy: float | None
    samples: int
    seeds: int


def points_of(
    out: Path,
    *,
    part: Literal["timing", "bench"],
    batch: int,
    samples: int | None = None,
    only: Collection[str] = (),
    mixed: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> list[Point]:
    """The settings of a results file whose quality and whose time at a batch size were both measured.

    A point is a setting that somebody can run: its time is that of the same weights in the same precision, decoding
    included, without compilation. Distances of unequal numbers of samples do not compare: all points have the number
    and precision that most settings have (of equals, the larger number). Times are those of the machine and with the
    threads of the newest row.

    Args:
        part: of the results, that has the times.
        samples: of the quality; the number that most settings have when None.
        only: models' names; all of them when empty.
        mixed: take times of another precision, or without decoding, too: older results have no others.
        report: told what is left out and why.
    """
    results = read_results(out)
    timed = [row for row in results.get(part, {}).get("rows", []) if row["batch"] == batch]
    timed, left_out = on_one_machine(timed)
    timed = sorted(timed, key=lambda row: (bool(row.get("compiled")), bool(row.get("autocast"))))
    found: dict[tuple[Any, ...], list[Point]] = {}
    untimed: list[str] = []
    for rows in by_setting(results.get("quality", {}).get("rows", [])).values():
        row = rows[0]
        distance = "fd" if "fd" in row else "fid"
        if samples not in (None, row["samples"]) or (only and row["model"] not in only) or distance not in row:
            continue
        of_model = [t for t in timed if _chain(t) == _chain(row) and _same_weights(t, row)]
        time = next((t["seconds_per_image"] for t in of_model if mixed or _runs_as(t, row)), None)
        if time is None:
            untimed += [named(row)] if of_model else []
            continue
        accuracies = [r["accuracy"] for r in rows if "accuracy" in r]
        point = Point(
            row["model"], row["teacher"], row["iterations"], curve_of(row), named(row),
            row["draw"].get("diffusion_steps"), row["draw"].get("guidance"),
            time, statistics.mean(r[distance] for r in rows), title_of(distance, rows),
            statistics.mean(accuracies) if accuracies else None, row["samples"], len(rows),
        )  # fmt: skip
        found.setdefault((row["samples"], bool(row.get("autocast")), distance, version_of(row)), []).append(point)
    chosen = max(found.items(), key=lambda item: (len(item[1]), item[0][0]), default=(None, []))[1]
    if left_out:
        report(left_out)
    if untimed:
        report(f"left out, timed in another precision, compiled or without decoding: {', '.join(untimed)}")
    if (others := sum(map(len, found.values())) - len(chosen)) > 0:
        report(f"left out, with other numbers of samples, precision or metrics than most: {others} settings")
    return sorted(chosen, key=lambda p: (p.model, -(p.steps or 0), p.guidance or 0, p.iterations))


def _runs_as(timed: Row, row: Row) -> bool:
    """Whether a time is of what drew the images of a row of quality."""
    same = bool(timed.get("autocast")) == bool(row.get("autocast"))
    return same and timed["decoded"] and not timed.get("compiled")


def _chain(row: Row) -> tuple[Any, ...]:
    draw = row["draw"]
    return row["model"], draw.get("diffusion_steps"), draw.get("guidance"), row["iterations"]


def _same_weights(timed: Row, row: Row) -> bool:
    return timed.get("sha256", row.get("sha256")) == row.get("sha256", timed.get("sha256"))


def sweep_table(points: Sequence[Point]) -> str:
    """The points in Markdown."""
    measure = points[0].measure if points else "Fréchet distance"
    header, lines = ["model", "K", "T", "w", measure, "held-out accuracy", "ms / image"], []
    for p in points:
        chain = [str(p.steps or ""), "" if p.guidance is None else f"{p.guidance:g}"]
        accuracy = "" if p.accuracy is None else f"{p.accuracy:.4f}"
        lines.append([p.model, str(p.iterations), *chain, f"{p.fd:.2f}", accuracy, f"{p.seconds * 1000:.2f}"])
    return markdown(header, lines)


def best_within(points: Sequence[Point], budget: float) -> str:
    """A sentence: the setting with the smallest Fréchet distance that takes at most `budget` seconds an image.

    Raises:
        ValueError: there are no points.
    """
    if not points:
        raise ValueError("no setting has both a distance and a time: nothing to choose from")
    within = [p for p in points if p.seconds <= budget]
    if not within:
        fastest = min(points, key=lambda p: p.seconds)
        return f"none draws an image in {budget:g} s: the fastest is {fastest.label}, {fastest.seconds:.4g} s"
    best = min(within, key=lambda p: p.fd)
    return f"best within {budget:g} s an image: {best.label}: {best.measure} {best.fd:.2f} in {best.seconds:.4g} s"


def unbeaten(teacher: Sequence[Point], student: Sequence[Point]) -> list[Point]:
    """The teacher's points that no point of the student beats in both time and Fréchet distance.

    Empty: the student lies left-below of the whole teacher curve.
    """
    return [t for t in teacher if not any(s.seconds < t.seconds and s.fd < t.fd for s in student)]


def verdicts(points: Sequence[Point]) -> list[str]:
    """For every student: whether it lies left-below of the whole curve of the teachers' points."""
    teacher, lines = [p for p in points if p.teacher], []
    for name in dict.fromkeys(p.model for p in points if not p.teacher):
        left = unbeaten(teacher, [p for p in points if p.model == name])
        if not teacher:
            continue
        if not left:
            lines.append(f"{name} lies left-below of all {len(teacher)} points of the teacher")
        else:
            lines.append(f"{name} does not beat {', '.join(p.label for p in left)}")
    return lines
