"""Two of our processes share two cores without ruining each other (slow: a minute; needs a quiet machine)."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

JOBS = ("training", "a batch of 64", "a single picture")


def speeds(processes):
    """Of each job, what each of so many processes does in a second, all on the same two cores."""
    chosen = sorted(os.sched_getaffinity(0))[:2]
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_", "MKL_"))
    }
    command = [sys.executable, str(Path(__file__).parent / "helpers" / "busy_run.py")]
    with contextlib.ExitStack() as stack:
        started = []
        for _ in range(processes):
            process = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                preexec_fn=lambda: os.sched_setaffinity(0, chosen),
            )  # fmt: skip
            started.append(stack.enter_context(process))
        found = []
        for _ in JOBS:
            assert [process.stdout.readline() for process in started] == ["ready\n"] * processes
            for process in started:
                process.stdin.write("go\n")
                process.stdin.flush()
            found.append([float(process.stdout.readline()) for process in started])
    return found


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_getaffinity") or os.cpu_count() < 2, reason="needs two cores to share")
def test_two_processes_on_two_cores_each_keep_two_fifths_of_their_speed():
    for job, (alone,), both in zip(JOBS, speeds(1), speeds(2), strict=True):
        print(f"{job}: {alone:.1f} a second alone, {both[0]:.1f} and {both[1]:.1f} together")
        assert min(both) >= 0.4 * alone, job
