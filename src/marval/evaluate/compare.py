"""What differs between two results files, and whether by more than chance makes.

Chance is the 95 % interval of the difference: by Student's t over seeds (of the differences of pairs, where both files
have the same seeds, whose images share their noise; else with one variance for both sides), by two standard errors over
the images for rewards. Times
differ where no round of one file is as fast as one of the other. Seeds are those of the drawn images, not of trainings.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marval.evaluate.metrics import changed_between
from marval.evaluate.results import (
    MEASURE,
    Row,
    curve_of,
    figures_of,
    how,
    named,
    read_results,
    standard_error,
    version_of,
    who,
)

PARTS = ("quality", "rewards", "timing")
IDENTITY = ("sha256", "data_sha256", "order", "draw", "decoded")
MADE = ("command", "commit", "device", "processes", "threads", "versions")
UNKNOWN = {
    "seeds": "so few seeds tell nothing: measure three or more (--seed 0 1 2)",
    "rounds": "a single round tells nothing: time several (--repeats 5)",
}


@dataclass(frozen=True)
class Difference:
    """A figure at one setting in both files: both means, and the difference that chance can make (None: unknown)."""

    setting: str
    figure: str
    first: float
    second: float
    chance: float | None
    counts: tuple[int, int]  # of seeds, images or rounds in each file
    unit: str = "seeds"

    @property
    def verdict(self) -> str:
        """Whether they differ by more than chance."""
        difference = abs(self.second - self.first)
        if difference == 0:
            return "the same"
        if self.chance is None:
            return UNKNOWN[self.unit]
        return "a difference" if difference > self.chance else "no more than chance"


def compare(first: Path, second: Path) -> tuple[list[str], list[Difference]]:
    """Compare two files: lines on how each was made, and a `Difference` for every figure at a setting of both.

    A setting is who draws (model, T, w) and how it was measured (K, number of samples or batch size, precision,
    prompt). Where each file holds one who draws, these are compared whoever they are: a teacher and a student, say.

    Raises:
        ValueError: a file is missing, holds no results, shares no setting with the other, or was measured on other
            features or data.
    """
    parts = [_read(file) for file in (first, second)]
    lines: list[str] = []
    notes: dict[str, list[str]] = {}  # and the settings that each is true of
    differences: list[Difference] = []
    for part in PARTS:
        a, b = (_groups(results.get(part, [])) for results in parts)
        if len({who for who, _ in a}) == len({who for who, _ in b}) == 1:
            ((same, _), *_) = a
            b = {(same, how): rows for (_, how), rows in b.items()}
        for here, there, file in ((a, b, first), (b, a, second)):
            if alone := [_label(rows[0]) for key, rows in here.items() if key not in there]:
                lines.append(f"only in {file}: {_first_of(alone)}")
        for key in (key for key in a if key in b):
            for note in _made_differently(a[key], b[key]):
                notes.setdefault(note, []).append(_label(a[key][0], b[key][0]))
            differences += _differences(a[key], b[key], part)
    if not differences:
        raise ValueError(
            f"{first} and {second} share no setting (model, T, w, K, samples or batch, precision): nothing to compare"
        )
    return [*lines, *(f"{note} ({_first_of(labels)})" for note, labels in notes.items())], differences


def _first_of(labels: Sequence[str]) -> str:
    return labels[0] + (f" and {len(labels) - 1} more" if labels[1:] else "")


def _read(file: Path) -> dict[str, list[Row]]:
    if not file.is_file():
        raise ValueError(f"{file} is not there: write it with marval evaluate --out {file}")
    return read_results(file)


def _groups(rows: Sequence[Row]) -> dict[tuple[Any, Any], list[Row]]:
    """Group rows by model and by measurement; rows of older versions of the metrics are left out."""
    groups: dict[tuple[Any, Any], list[Row]] = {}
    for row in rows:
        groups.setdefault((who(row), how(row)), []).append(row)
    newest = {key: max(version_of(row) for row in own) for key, own in groups.items()}
    return {key: [row for row in own if version_of(row) == newest[key]] for key, own in groups.items()}


def _label(row: Row, other: Row | None = None) -> str:
    count = f"batch {row['batch']}" if "batch" in row else f"{row['samples']} samples"
    parts = [named(row), count, *(name for name in ("autocast", "compiled") if row.get(name))]
    if other is not None and curve_of(other) != curve_of(row):
        parts.append(f"against {curve_of(other)}")
    return ", ".join(parts)


def _made_differently(first: Sequence[Row], second: Sequence[Row]) -> list[str]:
    a, b, label = first[0], second[0], _label(first[0], second[0])
    for name in MEASURE:
        both = [row.get(name) or None for row in (a, b)]
        if None not in both and both[0] != both[1]:
            raise ValueError(f"{label}: measured with {name} {both[0]!r} and {both[1]!r}: these do not compare")
    older = min(version_of(a), version_of(b))
    lines = [
        f"{name} is not compared: by metrics {older} it is {before}"
        for name, before in changed_between(version_of(a), version_of(b)).items()
    ]
    for name in IDENTITY:
        if a.get(name) != b.get(name):
            lines.append(f"{name}: {a.get(name, 'not recorded')} and {b.get(name, 'not recorded')}")
    seeds = [sorted({row.get("seed", 0) for row in rows}) for rows in (first, second)]
    if seeds[0] != seeds[1]:
        lines.append(f"seeds: {seeds[0]} and {seeds[1]}")
    for name in MADE:
        made = [row.get("made", {}).get(name, "not recorded") for row in (a, b)]
        if made[0] != made[1]:
            lines.append(f"{name}: {made[0]} and {made[1]}")
    return lines


def _differences(first: Sequence[Row], second: Sequence[Row], part: str) -> list[Difference]:
    label = _label(first[0], second[0])
    if part == "quality":
        return _of_quality(first, second, label)
    if part == "rewards":
        return _of_rewards(first, second, label)
    a, b, name = first[-1], second[-1], "seconds_per_image"
    counts = a.get("repeats", 1), b.get("repeats", 1)
    fast, slow = sorted((a, b), key=lambda row: row[name])
    # Medians that are further apart leave no round of the slow one as fast as any of the fast one.
    overlap = slow[name] - slow["fastest"] + fast["slowest"] - fast[name] if min(counts) > 1 else None
    return [Difference(label, name, a[name], b[name], overlap, counts, "rounds")]


def _of_quality(first: Sequence[Row], second: Sequence[Row], label: str) -> list[Difference]:
    differences = []
    changed = changed_between(version_of(first[0]), version_of(second[0]))
    for name in figures_of(first[0]):
        a, b = ({row.get("seed", 0): row[name] for row in rows if name in row} for rows in (first, second))
        if name == "gflops_per_image" or name in changed or not a or not b:
            continue
        means = statistics.mean(a.values()), statistics.mean(b.values())
        differences.append(Difference(label, name, *means, chance_of(a, b), (len(a), len(b))))
    return differences


def chance_of(first: dict[int, float], second: dict[int, float]) -> float | None:
    """The 95 % interval of the difference of two sides' means, by seed; None below two degrees of freedom."""
    paired = first.keys() == second.keys()
    degrees = len(first) - 1 if paired else len(first) + len(second) - 2
    if degrees < 2:
        return None
    if paired:
        return student_t(degrees) * standard_error([second[seed] - first[seed] for seed in first])[1]
    squares = sum(statistics.pvariance(side.values()) * len(side) for side in (first, second))
    return student_t(degrees) * math.sqrt(squares / degrees * (1 / len(first) + 1 / len(second)))


def student_t(degrees: int) -> float:
    """Student's t that 95 % of samples stay within, from the normal's z by the expansion in 1/n of Fisher and Cornish.

    (Abramowitz & Stegun, 26.7.5.) 3 % too small at 2 degrees of freedom, 0.6 % at 3.
    """
    z, n = statistics.NormalDist().inv_cdf(0.975), degrees
    return (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    )


def _of_rewards(first: Sequence[Row], second: Sequence[Row], label: str) -> list[Difference]:
    differences = []
    for name in first[0]["rewards"]:
        sides = [[row for row in rows if name in row["rewards"]] for rows in (first, second)]
        if not all(sides):
            continue
        scores = [[row["rewards"][name] for row in side] for side in sides]
        weights = sorted({score["sha256"] for side in scores for score in side if "sha256" in score})
        if len(weights) > 1:
            raise ValueError(f"{label}: rewards {name} with weights {' and '.join(weights)}: these do not compare")
        a, b = (statistics.mean(score["mean"] for score in side) for side in scores)
        errors = [math.hypot(*(score["standard_error"] for score in side)) / len(side) for side in scores]
        one, other = (sum(row["samples"] for row in side) for side in sides)
        differences.append(Difference(label, name, a, b, 2 * math.hypot(*errors), (one, other), "images"))
    return differences
