"""Results files: JSON with one part per kind of measurement, whose rows say what made them."""

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from marval.config import Chain
from marval.evaluate.features import FEATURES
from marval.io.checkpoint import model_hash
from marval.io.files import write_text
from marval.pipeline import Pipeline

PARTS = ("quality", "timing", "bench", "rewards", "study", "full-size", "plan")
PACKAGES = ("marval", "torch", "numpy", "torchmetrics", "torch-fidelity")

Row = dict[str, Any]
Models = Sequence[tuple[Path, Pipeline]]  # with the folders that they were loaded from


@functools.cache
def commit() -> str:
    """The commit of the code that runs, "-dirty" where the package differs from it."""

    def git(*arguments: str) -> str:
        package = Path(__file__).parents[1]
        return subprocess.run(
            ["git", *arguments], cwd=package, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--", "*.py") else "")
    except (OSError, subprocess.CalledProcessError):
        return "not a checkout"


def command_line() -> str:
    """What was typed, for provenance."""
    return shlex.join(["marval", *sys.argv[1:]])


def provenance(seed: int) -> dict[str, Any]:
    """What made a result: command, commit, versions, machine."""
    return {
        "command": command_line(),
        "commit": commit(),
        "seed": seed,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }


def made_by(device: torch.device, processes: int = 1) -> dict[str, Any]:
    """What made one row: command, commit, device, processes and the threads of each, versions of what is installed."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "command": command_line(),
        "commit": commit(),
        "device": f"{device.type} ({name})",
        "processes": processes,
        "threads": torch.get_num_threads(),
        "versions": versions,
    }


def describe(pipeline: Pipeline) -> dict[str, Any]:
    """The model's name and how it draws tokens."""
    config = pipeline.config
    draw = dataclasses.asdict(config.draw)
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


def setting(row: Row) -> tuple[Any, ...]:
    """What a row was measured at, but for its seed: model, T and w (None for a student), K, samples, bf16."""
    draw = row["draw"]
    return (
        row["model"], draw.get("steps"), draw.get("guidance"), row["iterations"], row.get("samples"),
        bool(row.get("autocast")),
    )  # fmt: skip


def named(row: Row) -> str:
    """Model, K and, for a teacher, T and w, as reports say it."""
    draw = row["draw"]
    chain = f", T={draw['steps']}, w={draw['guidance']:g}" if "steps" in draw else ""
    return f"{row['model']} K={row['iterations']}{chain}"


def by_setting(rows: Iterable[Row]) -> dict[tuple[Any, ...], list[Row]]:
    """Rows that differ in their seed alone, together."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(setting(row), []).append(row)
    return found


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *rows))


def figures_of(row: Row) -> dict[str, float]:
    """The measured figures of a row of quality: everything that is a fractional number and no setting."""
    return {name: value for name, value in row.items() if isinstance(value, float)}
