"""`marval compare`: what differs between two results files, and whether it is more than chance makes.

Figures of several seeds are compared by Student's t-test (two-sided, 5 %): paired where both sides have the same seeds,
whose images have their noise in common; else with one variance for both sides, so that one seed on one side is enough
where the other has several. Of one seed on each side nothing can be said. The seeds are those of the drawn images: what
another training would give, no number of them tells. Figures that two versions of the metrics define differently are
left out. Rewards are compared by their standard errors over images. Times differ where no round of one file is as fast
as one of the other; times of two machines are compared, too, and said to be such.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marval.evaluate.metrics import changed_between
from marval.evaluate.results import (
    Row,
    curve_of,
    figures_of,
    named,
    read_results,
    setting,
    standard_error,
    timed_setting,
    version_of,
)

IDENTITY = ("sha256", "data_sha256", "order", "draw", "decoded")
MADE = ("command", "commit", "device", "processes", "threads", "versions")
KINDS = ("quality", "rewards", "timing", "bench")
NORMAL = 1.96  # standard deviations within which 19 of 20 normal values lie
UNKNOWN = {
    "seeds": "no telling from one seed on each side, measure several (--seed 0 1 2)",
    "rounds": "no telling from a single round, time several (--repeats 5)",
}
# The 97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom; for
# more of them the last one, which is too large by at most 14 %.
QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True)
class Difference:
    """One figure of one setting in both files.

    Its mean over seeds or images, or median over rounds, of how many in each file, and how much chance makes them
    differ (None: unknown).
    """

    setting: str
    figure: str
    first: float
    second: float
    chance: float | None
    counts: tuple[int, int]
    what: str = "seeds"

    @property
    def verdict(self) -> str:
        """Whether they differ by more than chance."""
        difference = abs(self.second - self.first)
        if difference == 0:
            return "the same"
        if self.chance is None:
            return UNKNOWN[self.what]
        return "a difference" if difference > self.chance else "no more than chance"


def compare(first: Path, second: Path) -> tuple[list[str], list[Difference]]:
    """Lines on what made the two differ, and the differences of every figure that both have at one setting.

    A setting is who draws (model, T, w) and how it was measured (K, number of samples or batch size, precision,
    prompt). Where each file holds one who draws, these are compared whoever they are: a teacher and a student, say.

    Raises:
        ValueError: a file is missing, holds no results, shares no setting with the other, or was measured on other
            features or data.
    """
    parts = [_read(file) for file in (first, second)]
    said: list[str] = []
    found: list[Difference] = []
    for part in KINDS:
        a, b = (_groups(results.get(part, {}).get("rows", []), part) for results in parts)
        if len({who for who, _ in a}) == len({who for who, _ in b}) == 1:
            (who,) = {who for who, _ in a}
            b = {(who, how): rows for (_, how), rows in b.items()}
        for here, there, file in ((a, b, first), (b, a, second)):
            said += [f"only in {file}: {_label(rows[0], part)}" for key, rows in here.items() if key not in there]
        for key in (key for key in a if key in b):
            said += [line for line in _made_differently(a[key], b[key], part) if line not in said]
            found += _differences(a[key], b[key], part)
    if not found:
        raise ValueError(
            f"{first} and {second} share no setting (model, T, w, K, samples or batch, precision): nothing to compare"
        )
    return said, found


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(f"{file} is not there: write it with marval evaluate --out {file}")
    return read_results(file)


def _groups(rows: Sequence[Row], part: str) -> dict[tuple[tuple[Any, ...], tuple[Any, ...]], list[Row]]:
    """Rows by who draws and how it was measured; of several versions of the metrics those of the newest."""
    found: dict[tuple[tuple[Any, ...], tuple[Any, ...]], list[Row]] = {}
    for row in rows:
        key = setting(row) if part in ("quality", "rewards") else timed_setting(row)
        found.setdefault((key[:3], (*key[3:], row.get("prompt"))), []).append(row)
    newest = {key: max(version_of(row) for row in own) for key, own in found.items()}
    return {key: [row for row in own if version_of(row) == newest[key]] for key, own in found.items()}


def _label(row: Row, part: str) -> str:
    label = f"{named(row)}, " + (
        f"{row['samples']} samples" if part in ("quality", "rewards") else f"batch {row['batch']}"
    )
    if part in ("timing", "bench"):
        label += "".join(f", {name}" for name, on in (("bf16", "autocast"), ("compiled", "compiled")) if row.get(on))
    return label


def _label_of(first: Row, second: Row, part: str) -> str:
    label = _label(first, part)
    return label if curve_of(first) == curve_of(second) else f"{label}, against {curve_of(second)}"


def _made_differently(first: Sequence[Row], second: Sequence[Row], part: str) -> list[str]:
    a, b, label = first[0], second[0], _label_of(first[0], second[0], part)
    for name in ("features", "data_sha256", "classifier_sha256", "inception_sha256"):
        found = [row.get(name) or None for row in (a, b)]
        if None not in found and found[0] != found[1]:
            raise ValueError(f"{label}: measured with {name} {found[0]!r} and {found[1]!r}: these do not compare")
    lines = []
    for name, before in changed_between(version_of(a), version_of(b)).items():
        lines.append(f"{name} is not compared: by metrics {min(version_of(a), version_of(b))} it is {before}")
    for name in IDENTITY:
        if a.get(name) != b.get(name):
            lines.append(f"{label}: {name} {a.get(name, 'not recorded')} and {b.get(name, 'not recorded')}")
    seeds = [sorted({row.get("seed", 0) for row in rows}) for rows in (first, second)]
    if seeds[0] != seeds[1]:
        lines.append(f"{label}: seeds {seeds[0]} and {seeds[1]}")
    for name in MADE:
        made = [row.get("made", {}).get(name, "not recorded") for row in (a, b)]
        if made[0] != made[1]:
            lines.append(f"{name}: {made[0]} and {made[1]}")
    return lines


def _differences(first: Sequence[Row], second: Sequence[Row], part: str) -> list[Difference]:
    label = _label_of(first[0], second[0], part)
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
    found = []
    changed = changed_between(*(version_of(rows[0]) for rows in (first, second)))
    for name in figures_of(first[0]):
        a, b = ({row.get("seed", 0): row[name] for row in rows if name in row} for rows in (first, second))
        if name == "gflops_per_image" or name in changed or not a or not b:
            continue
        if a.keys() == b.keys():
            chance = chance_of_pairs([b[seed] - a[seed] for seed in a])
        else:
            chance = chance_of([*a.values()], [*b.values()])
        means = statistics.mean(a.values()), statistics.mean(b.values())
        found.append(Difference(label, name, *means, chance, (len(a), len(b))))
    return found


def _of_rewards(first: Sequence[Row], second: Sequence[Row], label: str) -> list[Difference]:
    """Means over all images of both sides; their standard errors say what chance makes (1.96 of them, 5 %)."""
    found = []
    for name in first[0]["rewards"]:
        sides = [[row["rewards"][name] for row in rows if name in row["rewards"]] for rows in (first, second)]
        if not all(sides):
            continue
        weights = {one["sha256"] for side in sides for one in side if "sha256" in one}
        if len(weights) > 1:
            raise ValueError(
                f"{label}: rewards {name} with weights {' and '.join(sorted(weights))}: these do not compare"
            )
        means = [statistics.mean(one["mean"] for one in side) for side in sides]
        errors = [math.hypot(*(one["standard_error"] for one in side)) / len(side) for side in sides]
        one, other = (sum(row["samples"] for row in rows if name in row["rewards"]) for rows in (first, second))
        chance = NORMAL * math.hypot(*errors)
        found.append(Difference(label, name, means[0], means[1], chance, (one, other), "images"))
    return found


def chance_of_pairs(differences: Sequence[float]) -> float | None:
    """How far from 0 the mean of differences comes in 19 of 20 cases where there is none, by the paired t-test.

    None: a single pair says nothing.
    """
    degrees = len(differences) - 1
    if degrees < 1:
        return None
    return QUANTILES[min(degrees, len(QUANTILES)) - 1] * standard_error(differences)[1]


def chance_of(first: Sequence[float], second: Sequence[float]) -> float | None:
    """How far apart the means of two samples of one distribution come in 19 of 20 cases, by Student's t.

    None: one value on each side says nothing.
    """
    degrees = len(first) + len(second) - 2
    if degrees < 1:
        return None
    squares = sum(statistics.pvariance(values) * len(values) for values in (first, second))
    error = math.sqrt(squares / degrees * (1 / len(first) + 1 / len(second)))
    return QUANTILES[min(degrees, len(QUANTILES)) - 1] * error
