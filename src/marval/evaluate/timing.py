"""Times of jobs that take turns, so that a drifting machine hits all alike."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

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
    for repeat in range(repeats + 1):
        for job, own in zip(jobs, times, strict=True):
            taken = [seconds_of(job, device)]
            while sum(taken) < SHORTEST:
                taken.append(seconds_of(job, device))
            if repeat > 0 or repeats == 0:
                own.append(sum(taken) / len(taken))
    return times
