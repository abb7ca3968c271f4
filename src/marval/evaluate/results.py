"""Results files: JSON with one part per kind of measurement, whose rows say what made them."""

import dataclasses
import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from marval.config import Chain, OneStep
from marval.evaluate.features import FEATURES
from marval.io.checkpoint import model_hash
from marval.io.files import locked, write_text
from marval.pipeline import Pipeline
from marval.runtime.provenance import provenance

PARTS = ("quality", "timing", "bench", "rewards", "study", "full-size", "plan")

# What rows of a part must hold, so that what reads them need not ask.
_WHO = {"model": str, "draw": dict, "iterations": int}
NEEDED: dict[str, dict[str, Any]] = {
    "quality": {**_WHO, "samples": int},
    "rewards": {**_WHO, "samples": int, "rewards": dict},
    "timing": {**_WHO, "batch": int, "seconds_per_image": int | float},
    "bench": {**_WHO, "batch": int, "seconds_per_image": int | float},
}
IDENTITY = ("model", "teacher", "draw", "order", "sha256", "iterations", "samples", "seed", "autocast")
MEASURE = ("features", "data_sha256", "classifier_sha256", "reference", "inception_sha256")
BARE = ("kid", "precision", "recall", "density", "coverage")  # older names of figures on a judge's features

Row = dict[str, Any]
Models = Sequence[tuple[Path, Pipeline]]  # with the folders that they were loaded from


def describe(pipeline: Pipeline) -> dict[str, Any]:
    """The model's name and how it draws tokens."""
    config = pipeline.config
    draw = dataclasses.asdict(config.draw)
    if isinstance(config.draw, OneStep):  # a record of how the weights were made: no setting of the drawing
        del draw["guidance"], draw["guidance_schedule"]
    return {"model": config.name, "teacher": isinstance(config.draw, Chain), "draw": draw, "order": config.order}


def model_hashes(models: Models, rows: Sequence[Row] = (), out: Path | None = None) -> list[str]:
    """SHA-256 of every model's weights.

    Raises:
        ValueError: as `check_names`.
    """
    hashes = [model_hash(folder) for folder, _ in models]
    names = [pipeline.config.name for _, pipeline in models]
    check_names(zip(names, hashes, strict=True), rows, out)
    return hashes


def check_names(models: Iterable[tuple[str, str]], rows: Sequence[Row] = (), out: Path | None = None) -> None:
    """One name stands for one model, among `models` (name and SHA-256) and in the rows of a results file.

    Raises:
        ValueError: two models share a name, or `out` holds figures of other weights under one.
    """
    known: dict[str, str] = {}
    for name, digest in models:
        if known.setdefault(name, digest) != digest:
            raise ValueError(f"two different models are named {name}: give one another --name, or measure them apart")
    for row in rows:
        if row["model"] in known and row.get("sha256", known[row["model"]]) != known[row["model"]]:
            raise ValueError(f"{out} holds figures of other weights named {row['model']}: choose another --out")


def check_measure(about: Row, rows: Sequence[Row], out: Path) -> None:
    """A results file's rows are measured on the same features and against the same data, as far as they say.

    Raises:
        ValueError: they are not; both are named.
    """
    for row in rows:
        for name, value in about.items():
            found = row.get(name, FEATURES if name == "features" else value)  # a row may not say
            if found != value:
                raise ValueError(f"{out} has {name} {found!r}, expected {value!r}: choose another --out")


def read_results(out: Path) -> dict[str, Any]:
    """The parts of a results file; empty where there is none.

    What older versions called otherwise has its name of today: KID and others say which features they are on, times
    whether decoding is in them.

    Raises:
        ValueError: not a results file.
    """
    if not out.exists():
        return {}
    try:
        found = json.loads(out.read_text(), parse_constant=_refuse_constant)
        _check_form(found)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{out} is not a results file ({error}): choose another --out") from None
    return {part: {**content, "rows": [_today(r, part) for r in content["rows"]]} for part, content in found.items()}


def _refuse_constant(name: str) -> float:
    raise ValueError(f"it holds {name} in the place of a number")


def _check_form(found: Any) -> None:
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__}, expected parts by name")
    for part, content in found.items():
        if part not in PARTS:
            raise ValueError(f"unknown part {part!r}, expected some of {', '.join(PARTS)}")
        rows = content.get("rows") if isinstance(content, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError(f"{part} has no list of rows")
        for row in rows:
            for name, kind in NEEDED.get(part, {}).items():
                if not isinstance(row.get(name), kind) or isinstance(row.get(name), bool):
                    raise ValueError(f"a row of {part} has {name} {row.get(name)!r}")


def _today(row: Row, part: str) -> Row:
    draw = row.get("draw")
    if isinstance(draw, dict) and "steps" in draw:
        row = {**row, "draw": {"diffusion_steps" if name == "steps" else name: value for name, value in draw.items()}}
    if part in ("timing", "bench"):  # evaluate timed whole pictures, bench tokens
        return {"decoded": part == "timing", **row}
    if part != "quality":
        return row
    prefix = "efficientnet" if row.get("features", FEATURES) in (FEATURES, "") else "own"
    return {f"{prefix}_{name}" if name in BARE else name: value for name, value in row.items()}


def lock_of(out: Path) -> Path:
    """The file that commands lock while they change a results file, which itself is replaced at each change."""
    return out.with_name(f".{out.name}.lock")


def write_results(out: Path, part: str, rows: list[Row], seed: int) -> None:
    """Put a whole part (see `PARTS`) with its provenance into a results file; figures have six digits."""
    with locked(lock_of(out), wait=True):
        _write(out, read_results(out), part, rows, seed)


def merge_results(out: Path, part: str, rows: Sequence[Row], seed: int = 0) -> None:
    """Put rows into a part, each in the place of the one that it measures again.

    The file is read again and replaced under a lock, so that rows that other commands wrote meanwhile stay.

    Raises:
        ValueError: the file now holds figures of other weights under a row's name, or measured otherwise.
    """
    with locked(lock_of(out), wait=True):
        results = read_results(out)
        before = {identity(row, part): row for row in results.get(part, {}).get("rows", [])}
        check_names(((row["model"], row["sha256"]) for row in rows if "sha256" in row), named_rows(results), out)
        for row in rows:
            check_measure({name: row[name] for name in MEASURE if name in row}, list(before.values()), out)
            old = before.pop(identity(row, part), {})
            if part == "rewards" and version_of(old) == version_of(row):  # scored by another command meanwhile
                row = {**row, "rewards": {**old.get("rewards", {}), **row["rewards"]}}
            before[identity(row, part)] = row
        _write(out, results, part, list(before.values()), seed)


def _write(out: Path, results: dict[str, Any], part: str, rows: list[Row], seed: int) -> None:
    def rounded(value: Any) -> Any:
        return float(f"{value:.6g}") if isinstance(value, float) else value

    rows = [{name: rounded(value) for name, value in row.items()} for row in rows]
    content = {**results, part: {**provenance(seed), "rows": rows}}
    write_text(out, json.dumps(content, indent=1, allow_nan=False) + "\n")


def identity(row: Row, part: str) -> str:
    """What a row is of: rows of one identity measure the same again."""
    if part in ("timing", "bench"):
        return json.dumps(timed_setting(row))
    return json.dumps([row.get(name) for name in (*IDENTITY, "prompt", "first_seed")])


def version_of(row: Row) -> int:
    """The version of the metrics that a row was measured by; the first ones did not say."""
    return int(row.get("metrics", 1))


def measured_rows(out: Path) -> list[Row]:
    """Rows of a results file that name a model and its weights, of all parts."""
    return named_rows(read_results(out))


def named_rows(results: dict[str, Any]) -> list[Row]:
    """Rows of a file's parts that name a model and its weights."""
    return [row for part in results.values() for row in part["rows"] if "model" in row and "sha256" in row]


def setting(row: Row) -> tuple[Any, ...]:
    """What a row was measured at, but for its seed: model, T and w (None for a student), K, samples, bf16."""
    draw = row["draw"]
    return (
        row["model"], draw.get("diffusion_steps"), draw.get("guidance"), row["iterations"], row.get("samples"),
        bool(row.get("autocast")),
    )  # fmt: skip


def timed_setting(row: Row) -> tuple[Any, ...]:
    """What a row of timing or bench was measured at: model, T, w, K, batch size, bf16, compiled."""
    draw = row["draw"]
    return (
        row["model"], draw.get("diffusion_steps"), draw.get("guidance"), row["iterations"], row["batch"],
        bool(row.get("autocast")), bool(row.get("compiled")),
    )  # fmt: skip


def named(row: Row) -> str:
    """Model, K and, for a teacher, T and w, as reports say it."""
    return f"{row['model']} K={row['iterations']}{_chain(row)}"


def curve_of(row: Row) -> str:
    """The same without K."""
    return f"{row['model']}{_chain(row)}"


def _chain(row: Row) -> str:
    draw = row["draw"]
    return f", T={draw['diffusion_steps']}, w={draw['guidance']:g}" if "diffusion_steps" in draw else ""


def by_setting(rows: Iterable[Row]) -> dict[tuple[Any, ...], list[Row]]:
    """Rows that differ in their seed alone, together; those of other metrics are apart."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault((*setting(row), version_of(row)), []).append(row)
    return found


def on_one_machine(rows: Sequence[Row]) -> tuple[list[Row], str]:
    """The times of the newest row's machine and number of threads, and what was left out, in words.

    Times of two machines make no ratio.
    """

    def machine(row: Row) -> tuple[Any, Any]:
        made = row.get("made", {})
        return made.get("device"), made.get("threads")

    kept = [row for row in rows if machine(row) == machine(rows[-1])]
    if len(kept) == len(rows):
        return kept, ""
    device, threads = machine(rows[-1])
    return kept, (
        f"{len(rows) - len(kept)} of {len(rows)} times are left out: they are of another machine or number of threads "
        f"than the newest ({device or 'not recorded'}, {threads or '?'} threads); time all models in one command"
    )


def standard_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean of some values and its standard error: what every ± in tables and reports is. 0 for a single value."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return statistics.fmean(values), error


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *rows))


def figures_of(row: Row) -> dict[str, float]:
    """The measured figures of a row of quality: everything that is a fractional number and no setting."""
    return {name: value for name, value in row.items() if isinstance(value, float)}
