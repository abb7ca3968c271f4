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
from marval.io.files import write_text
from marval.pipeline import Pipeline
from marval.provenance import provenance

PARTS = ("quality", "timing", "bench", "rewards", "study", "full-size", "plan")

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

    Raises:
        ValueError: not a results file.
    """
    if not out.is_file():
        return {}
    try:
        found = json.loads(out.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{out} is not a results file ({error}): choose another --out") from None
    if not isinstance(found, dict) or not set(found) <= set(PARTS):
        raise ValueError(f"{out} is not a results file: choose another --out")
    return found


def write_results(out: Path, part: str, rows: list[Row], seed: int) -> None:
    """Put a part (see `PARTS`) with its provenance into a results file; figures have six digits."""

    def rounded(value: Any) -> Any:
        return float(f"{value:.6g}") if isinstance(value, float) else value

    rows = [{name: rounded(value) for name, value in row.items()} for row in rows]
    results = {**read_results(out), part: {**provenance(seed), "rows": rows}}
    write_text(out, json.dumps(results, indent=1) + "\n")


def replace_times(out: Path, part: str, rows: list[Row]) -> None:
    """Put rows of timing or bench into a results file, in the place of those at the same setting."""
    new = {timed_setting(row) for row in rows}
    kept = [row for row in read_results(out).get(part, {}).get("rows", []) if timed_setting(row) not in new]
    write_results(out, part, kept + rows, 0)


def measured_rows(out: Path) -> list[Row]:
    """Rows of a results file that name a model and its weights, of all parts."""
    return [row for part in read_results(out).values() for row in part["rows"] if "model" in row and "sha256" in row]


def setting(row: Row) -> tuple[Any, ...]:
    """What a row was measured at, but for its seed: model, T and w (None for a student), K, samples, bf16."""
    draw = row["draw"]
    return (
        row["model"], draw.get("steps"), draw.get("guidance"), row["iterations"], row.get("samples"),
        bool(row.get("autocast")),
    )  # fmt: skip


def timed_setting(row: Row) -> tuple[Any, ...]:
    """What a row of timing or bench was measured at: model, T, w, K, batch size, bf16, compiled."""
    draw = row["draw"]
    return (
        row["model"], draw.get("steps"), draw.get("guidance"), row["iterations"], row["batch"],
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
    return f", T={draw['steps']}, w={draw['guidance']:g}" if "steps" in draw else ""


def by_setting(rows: Iterable[Row]) -> dict[tuple[Any, ...], list[Row]]:
    """Rows that differ in their seed alone, together."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(setting(row), []).append(row)
    return found


def first_chains(rows: Iterable[Row]) -> dict[str, Row]:
    """How every model draws; of a teacher at several T and w, as it was measured first."""
    found: dict[str, Row] = {}
    for row in rows:
        found.setdefault(row["model"], row["draw"])
    return found


def mean_distances(rows: Sequence[Row]) -> dict[tuple[str, int, int], float]:
    """Fréchet distance by (model, K, samples), the mean over seeds, of the models' `first_chains`."""
    draws, found = first_chains(rows), dict[tuple[str, int, int], float]()
    for group in by_setting(row for row in rows if row["draw"] == draws[row["model"]]).values():
        key = (group[0]["model"], group[0]["iterations"], group[0]["samples"])
        found.setdefault(key, statistics.mean(row["fd"] for row in group))
    return found


def times_by_batch(results: dict[str, Any]) -> dict[tuple[str, int, int], Row]:
    """Rows of timing by (model, K, batch), of the chains that `mean_distances` has."""
    draws = first_chains(results["quality"]["rows"])
    return {
        (row["model"], row["iterations"], row["batch"]): row
        for row in results["timing"]["rows"] if row["draw"] == draws.get(row["model"])
    }  # fmt: skip


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *rows))


def figures_of(row: Row) -> dict[str, float]:
    """The measured figures of a row of quality: everything that is a fractional number and no setting."""
    return {name: value for name, value in row.items() if isinstance(value, float)}
