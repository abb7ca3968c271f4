"""A run's log: one JSON object a line, and the line that shows progress."""

import contextlib
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from marval.io.files import write_text
from marval.presets import RunConfig
from marval.runtime.distributed import Workers
from marval.runtime.optim import MOST_SKIPPED, Optimizer
from marval.runtime.progress import minutes

LOG = "log.jsonl"
Figures = dict[str, Tensor | float]


def add_means(figures: Figures, share: float, **values: Tensor) -> None:
    """Add a part's share of a batch's means to `figures`, on the device."""
    for name, value in values.items():
        figures[name] = figures.get(name, 0.0) + value.detach().mean() * share


def cut_log(log: Path, update: int) -> None:
    """Drop the lines after `update`, and a last line that a kill cut short."""
    if not log.is_file():
        return
    lines = []
    for line in log.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            if json.loads(line)["update"] <= update:
                lines.append(line + "\n")
    write_text(log, "".join(lines))


class Due(NamedTuple):
    """What is to be done after an update (counted from 1). Figures are logged, and so checked, before any saving."""

    update: int
    log: bool
    probe: bool
    save: bool
    last: bool


def due(update: int, settings: RunConfig, workers: Workers, probe_every: int = 0) -> Due:
    """Look up what is due after so many updates; every process must ask. With `probe_every` 0 nothing is probed."""
    end = update == settings.updates
    last = end or workers.stopping()
    save = last or update % settings.save_every == 0
    probe = probe_every > 0 and (end or update % probe_every == 0)
    return Due(update, save or probe or update % settings.log_every == 0, probe, save, last)


class Log:
    """Appends one JSON object per line to a run's log, and prints a progress line now and then.

    Args:
        flops: operations for an image in an update; 0 where nobody counted them.
    """

    def __init__(
        self, file: Path, workers: Workers, start: int, total: int, batch_size: int, tensorboard: bool = False,
        flops: float = 0.0,
    ):  # fmt: skip
        self.file, self.workers = file, workers
        self.start, self.total, self.batch_size, self.flops = start, total, batch_size, flops
        self.began = self.printed = time.monotonic()
        self.logged = start, self.began  # the last update, and when it was
        if workers.main and start == 0:  # an earlier run's log, of which nothing was saved
            file.unlink(missing_ok=True)
        self.events: Any = None
        if tensorboard and workers.main:
            from torch.utils.tensorboard import SummaryWriter

            # What an earlier run wrote beyond `start` is void.
            self.events = SummaryWriter(str(file.parent), purge_step=start + 1)
        self.console = Console(quiet=not workers.main)
        self.interval = 1.0 if self.console.is_terminal else 30.0

    def __call__(self, update: int, figures: Figures, optimizers: Sequence[Optimizer] = ()) -> None:
        """Record the figures of an update (counted from 1), averaged over the processes.

        Raises:
            ValueError: too many updates in a row were skipped; or, without optimizers, a figure is not finite.
        """
        values = self.workers.mean(figures)
        listed = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        skipped = max((int(optimizer.in_a_row) for optimizer in optimizers), default=0)
        if skipped >= MOST_SKIPPED or not (optimizers or all(map(math.isfinite, values.values()))):
            told = f"{skipped} updates in a row up to update {update} were skipped" if skipped else f"update {update}"
            advice = "lower the learning rate, or look for broken data"
            raise ValueError(f"{told}: gradients or figures are not finite ({listed}); {advice}")
        now = time.monotonic()
        if optimizers:
            values["skipped"] = sum(int(optimizer.skipped) for optimizer in optimizers)
            values["images_per_second"] = (update - self.logged[0]) * self.batch_size / (now - self.logged[1])
            if self.workers.device.type == "cuda":
                values["memory_gib"] = torch.cuda.max_memory_allocated(self.workers.device) / 2**30
                if self.flops:
                    values["tflops_per_gpu"] = values["images_per_second"] * self.flops / self.workers.count / 1e12
        self.logged = update, now
        if self.workers.main:
            line = {name: float(f"{v:.6g}") if math.isfinite(v) else None for name, v in values.items()}
            with self.file.open("a") as out:
                out.write(json.dumps({"update": update, **line}) + "\n")
        if self.events is not None:
            for name, value in values.items():
                self.events.add_scalar(name, value, update)
            self.events.flush()
        if now - self.printed < self.interval and update < self.total:
            return
        self.printed = now
        rate = (update - self.start) / max(now - self.began, 1e-9)
        left = (self.total - update) / max(rate, 1e-9)
        listed += f"  {rate * self.batch_size:.0f} images/s"
        listed += f"  {values['tflops_per_gpu']:.0f} TFLOP/s a GPU" if "tflops_per_gpu" in values else ""
        listed += f"  {minutes(left)} left"
        self.console.print(f"update {update}/{self.total}  {listed}", soft_wrap=True)
