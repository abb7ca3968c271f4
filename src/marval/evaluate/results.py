"""Results files: JSON with a part for each kind of measurement, whose rows say what made them."""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marval.io.files import locked, one_line, write_text

WHO = ("model", "draw", "iterations")
NEEDED = {  # what rows of a part hold, so that readers need not ask
    "quality": (*WHO, "samples"),
    "rewards": (*WHO, "samples", "rewards"),
    "timing": (*WHO, "batch", "seconds_per_image"),
}
MEASURE = ("features", "data_sha256", "classifier_sha256", "reference", "inception_sha256")
BARE = ("kid", "precision", "recall")  # older names of figures on EfficientNet's features

Row = dict[str, Any]
Results = dict[str, list[Row]]  # rows by part


# Files


def read_results(out: Path) -> Results:
    """The rows of a results file by part, under today's names; empty where there is no file."""
    if not out.exists():
        return {}
    try:
        parts = json.loads(out.read_text())
        return {name: [_under_todays_names(row, name, part) for row in part["rows"]] for name, part in parts.items()}
    except (OSError, ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        raise ValueError(f"{out} is not a results file ({one_line(error)}): choose another --out") from None


def _under_todays_names(row: Row, name: str, part: Row) -> Row:
    """A row, checked, with what made it, which older files wrote once for a whole part."""
    row = {**row, "made": {**part, **row.get("made", {})}}
    del row["made"]["rows"]
    if name == "quality":
        row = {f"efficientnet_{key}" if key in BARE else key: value for key, value in row.items()}
    if "draw" in row:  # T was called steps
        row["draw"] = {"diffusion_steps" if key == "steps" else key: value for key, value in row["draw"].items()}
    if missing := [key for key in NEEDED.get(name, ()) if key not in row]:
        raise ValueError(f"a row of {name} has no {', '.join(missing)}")
    return row


def write_results(out: Path, part: str, rows: Sequence[Row]) -> None:
    """Put a whole part into a results file."""
    with locked(_lock(out), wait=True):
        _write(out, {**read_results(out), part: list(rows)})


def merge_results(out: Path, part: str, rows: Sequence[Row]) -> None:
    """Put rows into a part, each in the place of the one that measured the same before.

    The file is read, checked (`check_rows`) and replaced under a lock: what other commands wrote meanwhile stays.
    """
    with locked(_lock(out), wait=True):
        results = read_results(out)
        check_rows(rows, results, part, out)
        merged = {_identity(row): row for row in results.get(part, [])}
        for row in rows:
            old = merged.pop(_identity(row), {})  # the newest row stands last
            if part == "rewards":  # another command's rewards stay
                row = {**row, "rewards": old.get("rewards", {}) | row["rewards"]}
            merged[_identity(row)] = row
        _write(out, {**results, part: list(merged.values())})


def _lock(out: Path) -> Path:
    return out.with_name(f".{out.name}.lock")  # beside the results, which are replaced at each change


def _identity(row: Row) -> tuple["Setting", int | None]:
    return Setting.of(row), row.get("seed")


def _write(out: Path, results: Results) -> None:
    """Write the results; figures have six digits."""

    def rounded(value: Any) -> Any:
        return float(f"{value:.6g}") if isinstance(value, float) else value

    content = {
        part: {"rows": [{name: rounded(value) for name, value in row.items()} for row in rows]}
        for part, rows in results.items()
    }
    write_text(out, json.dumps(content, indent=1, allow_nan=False) + "\n")


def check_rows(rows: Iterable[Row], results: Results, part: str, out: Path) -> None:
    """Refuse rows of other weights than `out` has under a model's name, or of other features or data than the part."""
    for row in rows:
        for name, old in ((name, old) for name, others in results.items() for old in others):
            differing = [key for key in ("sha256", *MEASURE) if key in old and key in row and old[key] != row[key]]
            if "sha256" in differing and old.get("model") == row["model"]:
                raise ValueError(f"{out} holds figures of other weights named {row['model']}: choose another --out")
            if name == part and (key := next((key for key in differing if key in MEASURE), None)):
                raise ValueError(f"{out} has {key} {old[key]!r}, expected {row[key]!r}: choose another --out")


# Rows


DIALS = {"T": "diffusion_steps", "w": "guidance", "temperature": "temperature"}  # titles, and names in a draw


def dials_of(draw: Mapping[str, Any]) -> dict[str, str]:
    """T of a teacher, w where it can be chosen, and a temperature that is not 1; "" for what a draw has not."""
    values = {title: draw.get(name) for title, name in DIALS.items()}
    return {
        title: "" if value is None or (title, value) == ("temperature", 1) else f"{value:g}"
        for title, value in values.items()
    }


@dataclass(frozen=True)
class Setting:
    """The model and settings that drew the images of a row: what the rows of one table line share (not the seed)."""

    model: str
    chain: str  # T of a teacher, w where it can be chosen, temperature
    order: str | None
    iterations: int
    samples: int | None
    batch: int | None
    dtype: str
    compiled: bool
    prompt: str | None

    @classmethod
    def of(cls, row: Row) -> "Setting":
        """The setting of a row of any part."""
        chain = "".join(f", {title}={value}" for title, value in dials_of(row["draw"]).items() if value)
        return cls(
            row["model"], chain, row.get("order"), row["iterations"], row.get("samples"), row.get("batch"),
            row.get("dtype", "bfloat16" if row.get("autocast") else "float32"), bool(row.get("compiled")),
            row.get("prompt"),
        )  # fmt: skip

    @property
    def curve(self) -> str:
        """What K varies along: the model and, for a teacher, T and w."""
        return self.model + self.chain

    @property
    def precision(self) -> str:
        """The precision's name in tables."""
        return self.dtype.replace("bfloat16", "bf16") + (", compiled" if self.compiled else "")

    def __str__(self) -> str:
        return f"{self.model} K={self.iterations}{self.chain}"


def by_setting(rows: Iterable[Row]) -> list[list[Row]]:
    """Group rows that differ in the seed only."""
    groups: dict[Setting, list[Row]] = {}
    for row in rows:
        groups.setdefault(Setting.of(row), []).append(row)
    return list(groups.values())


def on_one_machine(timing: Sequence[Row]) -> list[Row]:
    """The times of the newest row's device and number of threads: times of two machines make no ratio."""

    def machine(row: Row) -> tuple[Any, Any]:
        return row["made"].get("device"), row["made"].get("threads")

    return [row for row in timing if machine(row) == machine(timing[-1])]


def standard_error(values: Sequence[float]) -> tuple[float, float]:
    """Compute the mean and its standard error, the ± of tables and reports; 0 for a single value."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return statistics.fmean(values), error


def figures_of(row: Row) -> dict[str, float]:
    """The measured figures of a row: mean rewards, or every floating-point number of quality but the operations."""
    rewards = {name: score["mean"] for name, score in row.get("rewards", {}).items()}
    figures = {name: value for name, value in row.items() if isinstance(value, float) and name != "gflops_per_image"}
    return rewards or figures
