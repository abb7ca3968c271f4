"""A run's log: one JSON object a line, and the line that shows progress."""

import contextlib
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from torch import Tensor

from marval.io.files import write_text
from marval.runtime.distributed import Workers
from marval.runtime.optim import Updates

LOG = "log.jsonl"


def cut_log(log: Path, step: int) -> None:
    """Drop the lines after `step`, and a last line that a kill cut short."""
    if not log.is_file():
        return
    kept = []
    for line in log.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    write_text(log, "".join(kept))


def spreads(figures: dict[str, float]) -> dict[str, float]:
    """The same figures, with `NAME_square` and `NAME_mean` turned into a standard deviation `NAME_std`."""
    found = {}
    for name, value in figures.items():
        stem = name.removesuffix("_square")
        if stem == name:
            found[name] = value
        else:
            found[f"{stem}_std"] = math.sqrt(max(0.0, value - figures[f"{stem}_mean"] ** 2))
    return found


class Log:
    """Appends one JSON object per line to the run's log and prints the progress line."""

    def __init__(
        self, file: Path, start: int, total: int, images_per_step: int, *, quiet: bool = False, workers: Workers
    ):
        self.file, self.workers = file, workers
        self.start, self.total, self.images_per_step = start, total, images_per_step
        self.began = self.printed = time.monotonic()
        if workers.main and start == 0:  # an earlier run's log, of which nothing was saved
            file.unlink(missing_ok=True)
        self.console = Console(quiet=quiet or not workers.main)
        self.interval = 1.0 if self.console.is_terminal else 30.0

    def __call__(self, step: int, figures: dict[str, Tensor | float], updates: Sequence[Updates] = ()) -> None:
        """Record `figures` of step `step` (counted from 1), averaged over the processes.

        Raises:
            ValueError: too many of the `updates` were skipped; or, where none are given, a figure is not finite.
        """
        found = spreads(self.workers.mean(figures))
        for update in updates:
            update.check(step, found)
        for name, value in found.items():
            if not updates and not math.isfinite(value):
                raise ValueError(f"{name} is {value} at step {step}: lower the learning rate, or look for broken data")
        if updates:
            found["skipped"] = sum(int(update.skipped) for update in updates)
        if self.workers.main:
            line = {name: float(f"{v:.6g}") if math.isfinite(v) else None for name, v in found.items()}
            with self.file.open("a") as out:
                out.write(json.dumps({"step": step, **line}) + "\n")
        now = time.monotonic()
        if now - self.printed < self.interval and step < self.total:
            return
        self.printed = now
        rate = (step - self.start) / max(now - self.began, 1e-9)
        left = (self.total - step) / max(rate, 1e-9)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in found.items() if name != "skipped" or value)
        self.console.print(
            f"step {step}/{self.total}  {shown}  {rate * self.images_per_step:.0f} images/s  "
            f"{int(left // 60)} min {int(left % 60)} s left",
            soft_wrap=True,
        )
