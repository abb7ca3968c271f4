"""What differs between two results files, and whether by more than chance makes.

Chance is the 95 % interval of the difference: by Student's t over seeds (of the differences of pairs, where both files
have the same seeds, whose images share their noise; else with one variance for both sides), by two standard errors over
the images for rewards. Times differ where no round of one file is as fast as one of the other. Seeds are those of the
drawn images, not of trainings.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from marval.evaluate.metrics import REDEFINED
from marval.evaluate.results import MEASURE, Row, Setting, figures_of, read_results, standard_error, version_of

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
    for file in (first, second):
        if not file.is_file():
            raise ValueError(f"{file} is not there: write it with marval evaluate --out {file}")
    results = [read_results(file) for file in (first, second)]
    lines: list[str] = []
    notes: dict[str, list[str]] = {}  # and the settings that each is true of
    differences: list[Difference] = []
    for part, differences_of in PARTS.items():
        a, b = (_groups(one.get(part, [])) for one in results)
        if len({setting.curve for setting in a}) == len({setting.curve for setting in b}) == 1:
            one = next(iter(a))
            chain = {name: getattr(one, name) for name in ("model", "diffusion_steps", "guidance")}
            b = {replace(setting, **chain): rows for setting, rows in b.items()}
        for here, there, file in ((a, b, first), (b, a, second)):
            if alone := [_label(rows[0]) for setting, rows in here.items() if setting not in there]:
                lines.append(f"only in {file}: {_first_of(alone)}")
        for setting in (setting for setting in a if setting in b):
            label, other = _label(a[setting][0]), Setting.of(b[setting][0])
            label += f", against {other.curve}" if other.curve != setting.curve else ""
            for note in _made_differently(label, a[setting], b[setting]):
                notes.setdefault(note, []).append(label)
            differences += differences_of(label, a[setting], b[setting])
    if not differences:
        raise ValueError(
            f"{first} and {second} share no setting (model, T, w, K, samples or batch, precision): nothing to compare"
        )
    return [*lines, *(f"{note} ({_first_of(labels)})" for note, labels in notes.items())], differences


def _first_of(labels: Sequence[str]) -> str:
    return labels[0] + (f" and {len(labels) - 1} more" if labels[1:] else "")


def _label(row: Row) -> str:
    count = f"batch {row['batch']}" if "batch" in row else f"{row['samples']} samples"
    return ", ".join([str(Setting.of(row)), count, *(name for name in ("autocast", "compiled") if row.get(name))])


def _groups(rows: Sequence[Row]) -> dict[Setting, list[Row]]:
    """Group rows by setting; rows of older versions of the metrics are left out."""
    groups: dict[Setting, list[Row]] = {}
    for row in sorted(rows, key=version_of, reverse=True):
        group = groups.setdefault(Setting.of(row), [])
        if not group or version_of(row) == version_of(group[0]):
            group.append(row)
    return groups


def _made_differently(label: str, first: Sequence[Row], second: Sequence[Row]) -> list[str]:
    """Say what else two sides differ in; refuse those of other features or data."""
    for name in MEASURE:
        a, b = first[0].get(name), second[0].get(name)
        if a and b and a != b:
            raise ValueError(f"{label}: measured with {name} {a!r} and {b!r}: these do not compare")
    redefined = [name for name in figures_of(first[0]) if _redefined(name, first[0], second[0])]
    lines = [f"{name} is not compared: it is defined otherwise by older metrics" for name in redefined]
    origins = []
    for rows in (first, second):
        row, made = rows[0], rows[0].get("made", {})
        origin: dict[str, Any] = {name: row.get(name, "not recorded") for name in IDENTITY}
        origin["seeds"] = sorted({row.get("seed", 0) for row in rows})
        origins.append(origin | {name: made.get(name, "not recorded") for name in MADE})
    return lines + [f"{name}: {a} and {origins[1][name]}" for name, a in origins[0].items() if a != origins[1][name]]


def _redefined(name: str, first: Row, second: Row) -> bool:
    older, newer = sorted((version_of(first), version_of(second)))
    return older < REDEFINED.get(name, 0) <= newer


def _of_times(label: str, first: Sequence[Row], second: Sequence[Row]) -> list[Difference]:
    a, b, name = first[-1], second[-1], "seconds_per_image"
    counts = a.get("repeats", 1), b.get("repeats", 1)
    fast, slow = sorted((a, b), key=lambda row: row[name])
    # Medians that are further apart leave no round of the slow one as fast as any of the fast one.
    overlap = slow[name] - slow["fastest"] + fast["slowest"] - fast[name] if min(counts) > 1 else None
    return [Difference(label, name, a[name], b[name], overlap, counts, "rounds")]


def _of_quality(label: str, first: Sequence[Row], second: Sequence[Row]) -> list[Difference]:
    differences = []
    for name in figures_of(first[0]):
        a, b = ({row.get("seed", 0): row[name] for row in rows if name in row} for rows in (first, second))
        if a and b and name != "gflops_per_image" and not _redefined(name, first[0], second[0]):
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

    (Abramowitz & Stegun, 26.7.5.) 3 % too small at 2 degrees of freedom, 0.7 % at 3.
    """
    z, n = statistics.NormalDist().inv_cdf(0.975), degrees
    return (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    )


def _of_rewards(label: str, first: Sequence[Row], second: Sequence[Row]) -> list[Difference]:
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


PARTS = {"quality": _of_quality, "rewards": _of_rewards, "timing": _of_times}
