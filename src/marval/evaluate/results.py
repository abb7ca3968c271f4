"""Results files: JSON with a part for each kind of measurement, whose rows say what made them."""

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marval.evaluate.features import FEATURES
from marval.io.files import locked, write_text

_WHO = {"model": str, "draw": dict, "iterations": int}
NEEDED: dict[str, dict[str, Any]] = {  # what rows of a part must hold, so that readers need not ask
    "quality": {**_WHO, "samples": int},
    "rewards": {**_WHO, "samples": int, "rewards": dict},
    "timing": {**_WHO, "batch": int, "seconds_per_image": int | float},
}
MEASURE = ("features", "data_sha256", "classifier_sha256", "reference", "inception_sha256")
BARE = ("kid", "precision", "recall", "density", "coverage")  # older names of figures on a judge's features

Row = dict[str, Any]
Results = dict[str, list[Row]]  # rows by part


# Files


def read_results(out: Path) -> Results:
    """The rows of a results file by part, under today's names; empty where there is no file.

    Raises:
        ValueError: not a results file.
    """
    if not out.exists():
        return {}
    try:
        content = json.loads(out.read_text(), parse_constant=_refuse_constant)
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, expected parts by name")
        results: Results = {}
        for name, part in content.items():
            kind = "timing" if name == "bench" else name  # two commands timed, before one did
            results.setdefault(kind, []).extend(_rows(name, kind, part))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{out} is not a results file ({error}): choose another --out") from None
    return results


def _refuse_constant(name: str) -> float:
    raise ValueError(f"it holds {name} in the place of a number")


def _rows(name: str, kind: str, part: Any) -> list[Row]:
    """A part's rows, checked and under today's names."""
    rows = part.get("rows") if isinstance(part, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{name} has no list of rows")
    made = {key: value for key, value in part.items() if key != "rows"}
    checked = []
    for row in rows:
        for key, kinds in NEEDED.get(kind, {}).items():
            if not isinstance(row.get(key), kinds) or isinstance(row.get(key), bool):
                raise ValueError(f"a row of {name} has {key} {row.get(key)!r}")
        draw = row.get("draw")
        if isinstance(draw, dict) and "steps" in draw:  # T's older name
            draw = {"diffusion_steps" if key == "steps" else key: value for key, value in draw.items()}
            row = {**row, "draw": draw}
        if kind == "timing":  # evaluate timed whole pictures, bench tokens
            row = {"decoded": name == "timing", **row}
        elif kind == "quality":
            prefix = "efficientnet" if row.get("features", FEATURES) in (FEATURES, "") else "own"
            row = {f"{prefix}_{key}" if key in BARE else key: value for key, value in row.items()}
        checked.append({**row, "made": {**made, **row.get("made", {})}} if made or "made" in row else row)
    return checked


def write_results(out: Path, part: str, rows: Sequence[Row]) -> None:
    """Put a whole part into a results file."""
    with _locked(out):
        _write(out, {**read_results(out), part: list(rows)})


def merge_results(out: Path, part: str, rows: Sequence[Row]) -> None:
    """Put rows into a part, each in the place of the one that measured the same before.

    The file is read and replaced under a lock: rows that other commands wrote meanwhile stay.

    Raises:
        ValueError: the file holds figures of other weights under a row's name, or figures measured otherwise.
    """
    with _locked(out):
        results = read_results(out)
        merged = {_identity(row): row for row in results.get(part, [])}
        check_rows(rows, results, part, out)
        for row in rows:
            old = merged.pop(_identity(row), {})
            if part == "rewards" and version_of(old) == version_of(row):  # another command's rewards stay
                row = {**row, "rewards": {**old.get("rewards", {}), **row["rewards"]}}
            merged[_identity(row)] = row
        _write(out, {**results, part: list(merged.values())})


def _locked(out: Path) -> Any:
    """Lock a file beside the results, which are replaced at each change."""
    return locked(out.with_name(f".{out.name}.lock"), wait=True)


def _write(out: Path, results: Results) -> None:
    """Write the results; figures have six digits."""

    def rounded(value: Any) -> Any:
        return float(f"{value:.6g}") if isinstance(value, float) else value

    content = {
        part: {"rows": [{name: rounded(value) for name, value in row.items()} for row in rows]}
        for part, rows in results.items()
    }
    write_text(out, json.dumps(content, indent=1, allow_nan=False) + "\n")


def _identity(row: Row) -> tuple["Setting", str]:
    """Identify what a row measures: rows of one identity repeat the same measurement."""
    own = [] if "batch" in row else [row.get(name) for name in ("draw", "order", "sha256", "seed")]
    return Setting.of(row), json.dumps(own)


def check_rows(rows: Iterable[Row], results: Results, part: str, out: Path) -> None:
    """Check that rows can stand in a part of `out`; what older rows do not record passes.

    Raises:
        ValueError: `out` has figures of other weights under a row's name, or the part others on other features or data.
    """
    before = [(row, False) for name, own in results.items() if name != part for row in own]
    before += [(row, True) for row in results.get(part, [])]
    for row in rows:
        measure, digest = {name: row[name] for name in MEASURE if name in row}, row.get("sha256")
        for old, same_part in before:
            if "sha256" in row and old.get("model") == row["model"] and old.get("sha256", digest) != digest:
                raise ValueError(f"{out} holds figures of other weights named {row['model']}: choose another --out")
            for name, value in measure.items() if same_part else ():
                other = old.get(name, FEATURES if name == "features" else value)
                if other != value:
                    raise ValueError(f"{out} has {name} {other!r}, expected {value!r}: choose another --out")


# Rows


@dataclass(frozen=True)
class Setting:
    """Who drew what a row measures, and how it was measured: all that rows of one table line have in common."""

    model: str
    diffusion_steps: int | None  # T and w of a teacher
    guidance: float | None
    iterations: int
    samples: int | None = None
    autocast: bool = False
    prompt: str | None = None
    batch: int | None = None
    compiled: bool = False

    @classmethod
    def of(cls, row: Row) -> "Setting":
        """The setting of a row of any part."""
        draw = row["draw"]
        return cls(
            row["model"], draw.get("diffusion_steps"), draw.get("guidance"), row["iterations"], row.get("samples"),
            bool(row.get("autocast")), row.get("prompt"), row.get("batch"), bool(row.get("compiled")),
        )  # fmt: skip

    @property
    def _chain(self) -> str:
        return "" if self.guidance is None else f", T={self.diffusion_steps}, w={self.guidance:g}"

    @property
    def curve(self) -> str:
        """What K varies along: the model and, for a teacher, T and w."""
        return self.model + self._chain

    @property
    def precision(self) -> str:
        """The precision's name in tables."""
        return "bf16" if self.autocast else "float32"

    def __str__(self) -> str:
        return f"{self.model} K={self.iterations}{self._chain}"


def version_of(row: Row) -> int:
    """Return the metrics' version of a row; the first rows do not record it."""
    return int(row.get("metrics", 1))


def by_setting(rows: Iterable[Row]) -> list[list[Row]]:
    """Group rows that differ in the seed only; rows of different versions of the metrics stay apart."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        key = Setting.of(row), version_of(row), row.get("order"), row["draw"].get("temperature")
        groups.setdefault(key, []).append(row)
    return list(groups.values())


def on_one_machine(rows: Sequence[Row]) -> tuple[list[Row], str]:
    """Keep the times of the newest row's machine and number of threads; say in a sentence what is left out.

    Times of two machines make no ratio.
    """

    def machine(row: Row) -> tuple[Any, Any]:
        made = row.get("made", {})
        return made.get("device"), made.get("threads")

    same = [row for row in rows if machine(row) == machine(rows[-1])]
    if len(same) == len(rows):
        return same, ""
    device, threads = machine(rows[-1])
    return same, (
        f"{len(rows) - len(same)} of {len(rows)} times are left out: they are of another machine or number of threads "
        f"than the newest ({device or 'not recorded'}, {threads or '?'} threads); time all models in one command"
    )


def standard_error(values: Sequence[float]) -> tuple[float, float]:
    """Compute the mean and its standard error, the ± of tables and reports; 0 for a single value."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return statistics.fmean(values), error


def figures_of(row: Row) -> dict[str, float]:
    """Return the measured figures of a row of quality: every floating-point number."""
    return {name: value for name, value in row.items() if isinstance(value, float)}
