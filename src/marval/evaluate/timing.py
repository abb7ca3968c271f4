"""The one timer: jobs that take turns, so that a drifting machine hits all alike, synchronised with the device."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from marval.evaluate.images import balanced_labels
from marval.evaluate.results import Row, describe
from marval.pipeline import Pipeline
from marval.runtime.progress import progress
from marval.runtime.provenance import made_by
from marval.sampling import DrawTokens, sample

SHORTEST = 0.3  # seconds that a timing lasts at least

Job = Callable[[], Any]


def synchronize(device: torch.device) -> None:
    """Wait for an accelerator; a CPU is always done."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def seconds_of(job: Job, device: torch.device) -> float:
    """Wall time of a job."""
    synchronize(device)
    began = time.perf_counter()
    job()
    synchronize(device)
    return time.perf_counter() - began


def in_turns(jobs: Sequence[Job], repeats: int, device: torch.device) -> list[list[float]]:
    """Seconds of every job, `repeats` times over, after a round that warms up; with 0 repeats only of that round.

    Each is the mean over at least `SHORTEST` seconds: a single short run would time caches that the others emptied.
    """
    times: list[list[float]] = [[] for _ in jobs]
    with progress((repeats + 1) * len(jobs), "timing") as advance:
        for repeat in range(repeats + 1):
            for job, own in zip(jobs, times, strict=True):
                taken = [seconds_of(job, device)]
                while sum(taken) < SHORTEST:
                    taken.append(seconds_of(job, device))
                if repeat > 0 or repeats == 0:
                    own.append(sum(taken) / len(taken))
                advance(1)
    return times


def decodes(pipeline: Pipeline) -> bool:
    """Whether tokens can become pictures: a full-size model with random weights has no VAE."""
    return getattr(pipeline.config.space, "vae", "") != "none"


def drawing(
    pipeline: Pipeline, iterations: int, batch: int, *, autocast: bool = False, draw: DrawTokens | None = None
) -> Job:
    """The job that every timing times: draw a batch of pictures as users do, decoded and brought to the CPU.

    Args:
        draw: another way to draw tokens, which are then not decoded; without a VAE they never are.
    """
    labels = balanced_labels(batch, len(pipeline.config.class_names))
    settings: dict[str, Any] = {"iterations": iterations, "batch_size": batch}
    on_device = torch.tensor(labels, device=pipeline.device)

    def run() -> None:
        with torch.inference_mode(), torch.autocast(pipeline.device.type, torch.bfloat16, enabled=autocast):
            if draw is not None:
                order = pipeline.config.order
                sample(pipeline.model, draw, on_device, iterations=iterations, seeds=range(batch), orders=order)
            elif decodes(pipeline):
                pipeline.sample(labels, **settings)
            else:
                pipeline.sample_tokens(labels, seeds=range(batch), **settings).cpu()

    return run


def timed_row(pipeline: Pipeline, iterations: int, batch: int, seconds: Sequence[float], *, autocast: bool) -> Row:
    """A row of timing, from the seconds of each round of `drawing`: per image, the median, fastest and slowest."""
    times = [one / batch for one in seconds]
    return {
        **describe(pipeline),
        "iterations": iterations,
        "batch": batch,
        "autocast": autocast,
        "decoded": decodes(pipeline),
        "seconds_per_image": statistics.median(times),
        "fastest": min(times),
        "slowest": max(times),
        "repeats": len(times),
        "made": made_by(pipeline.device),
    }
