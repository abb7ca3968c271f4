"""`marval compare`: what differs between two results files, and whether it is more than chance makes.

Figures of several seeds are compared by Student's t-test (two-sided, 5 %) with one variance for both sides, so that one
seed on one side is enough where the other has several; of one seed on each side nothing can be said. The seeds are
those of the drawn images: what another training would give, no number of them tells. Seeds that both sides share make
the test cautious (their images have their noise in common). Times differ where no round of one file is as fast as one
of the other.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marval.evaluate.results import Row, by_setting, figures_of, named, read_results, setting

IDENTITY = ("sha256", "data_sha256", "order", "draw")
MADE = ("command", "commit", "device", "versions")
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

    Its mean over seeds or median over rounds, of how many in each file, and how much chance makes them differ (None:
    unknown).
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

    A setting is model, T, w, K, number of samples and precision; where each file holds one model, models of different
    names are compared.

    Raises:
        ValueError: a file is missing, holds no results, shares no setting with the other, or was measured on other
            features or data.
    """
    parts = [_read(file) for file in (first, second)]
    said: list[str] = []
    found: list[Difference] = []
    for part in ("quality", "timing"):
        a, b = (_groups(results.get(part, {}).get("rows", []), part) for results in parts)
        if len({key[0] for key in a}) == len({key[0] for key in b}) == 1:
            (name,) = {key[0] for key in a}
            b = {(name, *key[1:]): rows for key, rows in b.items()}
        for here, there, file in ((a, b, first), (b, a, second)):
            said += [f"only in {file}: {_label(rows[0], part)}" for key, rows in here.items() if key not in there]
        for key in (key for key in a if key in b):
            said += [line for line in _made_differently(a[key], b[key], part) if line not in said]
            found += _differences(a[key], b[key], part)
    if not found:
        raise ValueError(f"{first} and {second} share no setting (model, T, w, K, samples): nothing to compare")
    return said, found


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(f"{file} is not there: write it with marval evaluate --out {file}")
    return read_results(file)


def _groups(rows: Sequence[Row], part: str) -> dict[tuple[Any, ...], list[Row]]:
    if part == "quality":
        return by_setting(rows)
    return {(*setting(row), row["batch"]): [row] for row in rows}


def _label(row: Row, part: str) -> str:
    count = f"{row['samples']} samples" if part == "quality" else f"batch {row['batch']}"
    return f"{named(row)}, {count}"


def _made_differently(first: Sequence[Row], second: Sequence[Row], part: str) -> list[str]:
    a, b, label = first[0], second[0], _label(first[0], part)
    features = [row.get("features") for row in (a, b)]
    if None not in features and features[0] != features[1]:
        raise ValueError(f"{label}: measured on features {features[0]!r} and {features[1]!r}: these do not compare")
    data = [row.get("data_sha256") or None for row in (a, b)]
    if None not in data and data[0] != data[1]:
        raise ValueError(f"{label}: measured against data {data[0]} and {data[1]}: these do not compare")
    lines = []
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
    label = _label(first[0], part)
    if part == "timing":
        (a,), (b,) = first, second
        name, counts = "seconds_per_image", (a["repeats"], b["repeats"])
        fast, slow = sorted((a, b), key=lambda row: row[name])
        # Medians that are further apart leave no round of the slow one as fast as any of the fast one.
        overlap = slow[name] - slow["fastest"] + fast["slowest"] - fast[name] if min(counts) > 1 else None
        return [Difference(label, name, a[name], b[name], overlap, counts, "rounds")]
    found = []
    for name in figures_of(first[0]):
        values = [[row[name] for row in rows if name in row] for rows in (first, second)]
        if name == "gflops_per_image" or not all(values):
            continue
        a_values, b_values = values
        means = statistics.mean(a_values), statistics.mean(b_values)
        counts = len(a_values), len(b_values)
        found.append(Difference(label, name, *means, chance_of(a_values, b_values), counts))
    return found


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
