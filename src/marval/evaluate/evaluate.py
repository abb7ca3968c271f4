"""`marval evaluate`: figures of one or more models, one row per (model, K), written as JSON after every row."""

import dataclasses
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from marval.config import Chain
from marval.data import ImageData
from marval.evaluate.features import (
    EfficientNetFeatures,
    Statistics,
    bundled_statistics,
    diversity_within_class,
    extract,
    frechet_distance,
)
from marval.flops import model_flops
from marval.io.checkpoint import model_hash
from marval.io.files import write_text
from marval.parallel import Workers
from marval.pipeline import Pipeline
from marval.rewards import Classifier, load_classifier
from marval.sampling import draw_counts

SHORTEST = 0.3  # seconds that a timing lasts at least


@dataclasses.dataclass(frozen=True)
class Judge:
    """What images are judged by: features, the real set's statistics, and a classifier that no reward has seen."""

    network: EfficientNetFeatures
    real: Statistics
    classifier: Classifier | None

    def figures(self, images: UInt8[Tensor, "n c h w"], labels: Int[Tensor, " n"]) -> dict[str, float]:
        """FD-EfficientNet, diversity and, with a classifier, held-out accuracy and log-probability."""
        features = extract(self.network, images)
        found = {"fd": frechet_distance(features, self.real), "diversity": diversity_within_class(features, labels)}
        if self.classifier is not None:
            with torch.inference_mode():
                logits = torch.cat([self.classifier(part.float() / 255) for part in images.split(500)])
            found["accuracy"] = float((logits.argmax(dim=1) == labels).float().mean())
            log_probability = logits.log_softmax(dim=1).gather(1, labels[:, None])
            found["log_probability"] = float(log_probability.mean())
        return found


def real_statistics(data: ImageData, network: EfficientNetFeatures, cache: Path | None = None) -> Statistics:
    """Statistics of the real images, read from `cache` where they are there, else computed (and kept there)."""
    if cache is not None and cache.is_file():
        return Statistics.load(cache)
    found = Statistics.of(extract(network, part) for part in data.images.split(1000))
    if cache is not None:
        found.save(cache)
    return found


def load_judge(data: str, classifier: Path | None, real_images: Callable[[], ImageData]) -> Judge:
    """The judge for a data set: bundled for Fashion-MNIST; elsewhere statistics are computed once and cached.

    Args:
        data: the data set's specification.
        classifier: the held-out classifier; the bundled one for Fashion-MNIST when None, else none.
        real_images: loads the real images, where their statistics are not known yet.
    """
    fashion = data.partition(":")[0] == "fashion-mnist"
    network = EfficientNetFeatures()
    bundled = bundled_statistics("fashion-mnist")
    if fashion and bundled.is_file():
        real = Statistics.load(bundled)
    else:
        images = real_images()
        digest = hashlib.sha256(images.images.numpy().tobytes()).hexdigest()[:16]
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "marval"
        real = real_statistics(images, network, cache / f"statistics-{digest}.safetensors")
    if classifier is None and fashion:
        classifier = Path("fashion-judge")
    return Judge(network, real, None if classifier is None else load_classifier(classifier))


def balanced_labels(count: int, classes: int) -> list[int]:
    """`count` labels that go through the classes in turn."""
    return [i % classes for i in range(count)]


def draw_bytes(
    pipeline: Pipeline,
    count: int,
    iterations: int,
    seed: int,
    batch_size: int = 250,
    autocast: bool = False,
    workers: Workers | None = None,
) -> tuple[UInt8[Tensor, "n c h w"], Int[Tensor, " n"]]:
    """`count` class-balanced images as rounded bytes, and their labels; image i has seed `seed * 1_000_000 + i`.

    The `workers` share the images, and all of them get all.
    """
    workers = workers or Workers()
    labels = balanced_labels(count, len(pipeline.config.class_names))
    seeds = range(seed * 1_000_000, seed * 1_000_000 + count)
    (rows,) = workers.parts(count)
    with torch.autocast(pipeline.device.type, torch.bfloat16, enabled=autocast):
        images = pipeline.sample(labels[rows], seed=list(seeds[rows]), iterations=iterations, batch_size=batch_size)
    return workers.gather((images * 255).round().byte(), count), torch.tensor(labels)


def probe(
    judge: Judge, count: int, iterations: int, seed: int = 0, workers: Workers | None = None
) -> Callable[[Pipeline], dict[str, float]]:
    """A small evaluation on fixed seeds, for training loops."""
    return lambda pipeline: judge.figures(*draw_bytes(pipeline, count, iterations, seed, workers=workers))


def flops_per_image(pipeline: Pipeline, iterations: int) -> int:
    """Floating-point operations (2 per multiply-add) of matrix products and attention for one image."""
    return model_flops(pipeline.config, draw_counts(pipeline.config.mar.num_tokens, iterations)).total


def seconds_per_image(runs: Sequence[tuple[Pipeline, int]], batch: int, repeats: int) -> list[list[float]]:
    """Times of every (pipeline, K), in turn, `repeats` times over, so that a drifting machine hits all alike.

    Each is the mean over at least `SHORTEST` seconds: a single short run would time caches that the others emptied.
    """
    times: list[list[float]] = [[] for _ in runs]
    for repeat in range(repeats + 1):
        for i, (pipeline, iterations) in enumerate(runs):
            began, drawn = time.perf_counter(), 0
            while drawn == 0 or time.perf_counter() - began < SHORTEST:
                pipeline.sample(balanced_labels(batch, len(pipeline.config.class_names)), iterations=iterations)
                drawn += batch  # the images are on the CPU: an accelerator is done
            if repeat > 0:  # the first round warms up
                times[i].append((time.perf_counter() - began) / drawn)
    return times


def provenance(seed: int) -> dict[str, Any]:
    """What made a result: command, commit, versions, machine."""
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "not a checkout"
    return {
        "command": " ".join(["marval", *sys.argv[1:]]),
        "commit": commit,
        "seed": seed,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }


def describe(pipeline: Pipeline) -> dict[str, Any]:
    """The model's name and how it draws tokens."""
    config = pipeline.config
    draw = dataclasses.asdict(config.draw)
    return {"model": config.name, "teacher": isinstance(config.draw, Chain), "draw": draw, "order": config.order}


def evaluate(
    models: Sequence[tuple[Path, Pipeline]],
    judge: Judge,
    *,
    iterations: Sequence[int],
    samples: int,
    out: Path,
    seed: int = 0,
    autocast: bool = False,
    report: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Figures of every model at every K, kept in `out` after each row; rows that are there already are not drawn again.

    Raises:
        ValueError: `out` holds figures of other weights under the same model name.
    """
    rows = read_results(out).get("quality", {}).get("rows", [])
    for folder, pipeline in models:
        digest = model_hash(folder)
        for row in rows:
            if row["model"] == pipeline.config.name and row["sha256"] != digest:
                raise ValueError(f"{out} holds figures of other weights named {row['model']}: choose another --out")
        for k in iterations or (pipeline.config.iterations,):
            key = {**describe(pipeline), "sha256": digest, "iterations": k, "samples": samples, "seed": seed}
            key["autocast"] = autocast
            if any(all(row.get(name) == value for name, value in key.items()) for row in rows):
                continue
            began = time.monotonic()
            figures = judge.figures(*draw_bytes(pipeline, samples, k, seed, autocast=autocast))
            rows.append({**key, **figures, "gflops_per_image": flops_per_image(pipeline, k) / 1e9})
            write_results(out, "quality", rows, seed)
            shown = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
            report(f"{pipeline.config.name} K={k}: {shown}  ({time.monotonic() - began:.0f} s)")
    return rows


def time_models(
    models: Sequence[tuple[Path, Pipeline]],
    *,
    iterations: Sequence[int],
    batches: Sequence[int],
    repeats: int,
    out: Path,
    report: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Seconds per image of every model at every K and batch size, interleaved in one run."""
    rows = []
    runs = [(pipeline, k) for _, pipeline in models for k in iterations or (pipeline.config.iterations,)]
    for batch in batches:
        for (pipeline, k), times in zip(runs, seconds_per_image(runs, batch, repeats), strict=True):
            median = statistics.median(times)
            row = {**describe(pipeline), "iterations": k, "batch": batch, "seconds_per_image": median}
            rows.append({**row, "fastest": min(times), "slowest": max(times), "repeats": repeats})
            report(f"{pipeline.config.name} K={k} batch {batch}: {median * 1000:.2f} ms/image")
    write_results(out, "timing", rows, 0)
    return rows


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
    if not isinstance(found, dict) or not set(found) <= {"quality", "timing", "bench"}:
        raise ValueError(f"{out} is not a results file: choose another --out")
    return found


def write_results(out: Path, part: str, rows: list[dict[str, Any]], seed: int) -> None:
    """Put a part ("quality", "timing", "bench") with its provenance into a results file; figures have six digits."""

    def rounded(value: Any) -> Any:
        return float(f"{value:.6g}") if isinstance(value, float) else value

    rows = [{name: rounded(value) for name, value in row.items()} for row in rows]
    results = {**read_results(out), part: {**provenance(seed), "rows": rows}}
    write_text(out, json.dumps(results, indent=1) + "\n")
