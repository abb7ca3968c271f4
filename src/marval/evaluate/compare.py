"""What differs between two results files, and whether by more than chance makes.

Chance is the 95 % interval of the mean difference by Student's t, over the seeds that both files have (images of one
seed share their noise). Times differ where no round of one file is as fast as one of the other. Seeds are those of the
drawn images, not of trainings.
"""

import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from marval.evaluate.results import MEASURE, Row, Setting, by_setting, figures_of, read_results, standard_error

MADE = ("sha256", "order", "draw", "metrics", "command", "commit", "device", "processes", "threads", "versions")


@dataclass(frozen=True)
class Difference:
    """A figure at one setting in both files: both means, and the difference that chance can make (None: unknown)."""

    setting: str
    figure: str
    first: float
    second: float
    chance: float | None
    counts: str  # of seeds, or of rounds in each file

    @property
    def verdict(self) -> str:
        """Whether they differ by more than chance."""
        difference = abs(self.second - self.first)
        if difference == 0:
            return "the same"
        if self.chance is None:
            return "too few to tell: measure three seeds or more (--seed 0 1 2), time several rounds (--repeats 5)"
        return "a difference" if difference > self.chance else "no more than chance"


def compare(first: Path, second: Path) -> tuple[list[str], list[Difference]]:
    """Compare two files: lines on how each was made, and a `Difference` for every figure at a setting of both.

    A setting is who draws (model, T, w, order) and how it was measured (K, number of samples or batch size, precision,
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
    notes: dict[str, str] = {}
    differences: list[Difference] = []
    for part, differences_of in PARTS.items():
        a, b = ({Setting.of(rows[0]): rows for rows in by_setting(one.get(part, []))} for one in results)
        if len(_who(a)) == len(_who(b)) == 1:
            (who,) = _who(a)
            b = {replace(setting, **dict(who)): rows for setting, rows in b.items()}
        for here, there, file in ((a, b, first), (b, a, second)):
            if alone := [_label(rows[0]) for setting, rows in here.items() if setting not in there]:
                lines.append(f"only in {file}: {alone[0]}" + (f" and {len(alone) - 1} more" if alone[1:] else ""))
        for setting in (setting for setting in a if setting in b):
            label, other = _label(a[setting][0]), Setting.of(b[setting][0])
            label += f", against {other.curve}" if other.curve != setting.curve else ""
            notes = _made_differently(label, a[setting][0], b[setting][0]) | notes
            differences += differences_of(label, a[setting], b[setting])
    if not differences:
        raise ValueError(
            f"{first} and {second} share no setting (model, T, w, K, samples or batch, precision) and seed: nothing to "
            "compare"
        )
    return [*lines, *notes.values()], differences


def _who(settings: Collection[Setting]) -> set[Any]:
    return {tuple((name, getattr(setting, name)) for name in ("model", "chain", "order")) for setting in settings}


def _label(row: Row) -> str:
    count = f"batch {row['batch']}" if "batch" in row else f"{row['samples']} samples"
    return f"{Setting.of(row)}, {count}" + (
        "" if Setting.of(row).precision == "float32" else f", {Setting.of(row).precision}"
    )


def _made_differently(label: str, first: Row, second: Row) -> dict[str, str]:
    """Say what else two sides differ in, by its name; refuse those of other features or data."""
    for name in MEASURE:
        a, b = first.get(name), second.get(name)
        if a and b and a != b:
            raise ValueError(f"{label}: measured with {name} {a!r} and {b!r}: these do not compare")
    weights = [{name: score.get("sha256") for name, score in row.get("rewards", {}).items()} for row in (first, second)]
    if any(weights[1].get(name, digest) != digest for name, digest in weights[0].items()):
        raise ValueError(f"{label}: measured by rewards of other weights: these do not compare")
    sides = [{**row["made"], **row} for row in (first, second)]
    pairs = {name: [side.get(name, "not recorded") for side in sides] for name in MADE}
    return {name: f"{name}: {a} and {b} ({label})" for name, (a, b) in pairs.items() if a != b}


def _of_times(label: str, first: Sequence[Row], second: Sequence[Row]) -> list[Difference]:
    a, b, name = first[-1], second[-1], "seconds_per_image"
    counts = [row.get("repeats", 1) for row in (a, b)]
    fast, slow = sorted((a, b), key=lambda row: row[name])
    # Medians that are further apart leave no round of the slow one as fast as any of the fast one.
    overlap = slow[name] - slow["fastest"] + fast["slowest"] - fast[name] if min(counts) > 1 else None
    return [Difference(label, name, a[name], b[name], overlap, "{} and {} rounds".format(*counts))]


def _of_figures(label: str, first: Sequence[Row], second: Sequence[Row]) -> list[Difference]:
    differences = []
    a, b = ({row.get("seed", 0): figures_of(row) for row in rows} for rows in (first, second))
    for name in figures_of(first[0]):
        pairs = [(a[seed][name], b[seed][name]) for seed in a if name in a[seed] and name in b.get(seed, ())]
        if pairs:
            here, there = (statistics.mean(side) for side in zip(*pairs, strict=True))
            chance = chance_of([y - x for x, y in pairs])
            differences.append(Difference(label, name, here, there, chance, f"{len(pairs)} seeds"))
    return differences


def chance_of(differences: Sequence[float]) -> float | None:
    """Half the 95 % interval of the mean of differences, by Student's t; None below two degrees of freedom."""
    degrees = len(differences) - 1
    return None if degrees < 2 else student_t(degrees) * standard_error(differences)[1]


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


PARTS = {"quality": _of_figures, "rewards": _of_figures, "timing": _of_times}
