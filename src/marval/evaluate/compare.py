"""`marval compare`: what differs between two results files, and whether a difference exceeds the seeds' spread."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marval.evaluate.results import Row, by_setting, figures_of, read_results, setting

IDENTITY = ("sha256", "data_sha256", "order", "draw")
MADE = ("command", "commit", "device", "versions")


@dataclass(frozen=True)
class Difference:
    """One figure of one setting in both files: means over seeds, and the larger range over seeds (None: unknown)."""

    setting: str
    figure: str
    first: float
    second: float
    spread: float | None

    @property
    def verdict(self) -> str:
        """Whether the difference exceeds the spread."""
        difference = abs(self.second - self.first)
        if difference == 0:
            return "the same"
        if self.spread is None:
            return "spread unknown: measure several seeds"
        return "beyond the spread" if difference > self.spread else "within the spread"


def compare(first: Path, second: Path) -> tuple[list[str], list[Difference]]:
    """Lines on what made the two differ, and the differences of every figure that both have at one setting.

    A setting is model, T, w, K, number of samples and precision; where each file holds one model, models of different
    names are compared. The spread is the range (largest less smallest) over the seeds of a file, the larger of the two;
    of a time, the range over its rounds.

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
    draw = row["draw"]
    chain = f" T={draw['steps']} w={draw['guidance']:g}" if "steps" in draw else ""
    count = f"{row['samples']} samples" if part == "quality" else f"batch {row['batch']}"
    return f"{row['model']} K={row['iterations']}{chain}, {count}"


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
        spread = max(row["slowest"] - row["fastest"] for row in (a, b))
        return [Difference(label, "seconds_per_image", a["seconds_per_image"], b["seconds_per_image"], spread)]
    found = []
    for name in figures_of(first[0]):
        values = [[row[name] for row in rows if name in row] for rows in (first, second)]
        if name == "gflops_per_image" or not all(values):
            continue
        ranges = [max(seeds) - min(seeds) for seeds in values if len(seeds) > 1]
        means = [statistics.mean(seeds) for seeds in values]
        found.append(Difference(label, name, means[0], means[1], max(ranges, default=None)))
    return found
