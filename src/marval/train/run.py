"""What the training loops share: the run's folder, its log, its resumable state and its progress line."""

import contextlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from marval.io.files import atomic_path, write_text

STATE = "state.pt"
LOG = "log.jsonl"
MAY_CHANGE = {"iterations", "save_every", "log_every"}  # settings that a resumed run may have different


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, updates: int, decay: float) -> None:
    """Move the averaged weights towards the new ones; the decay ramps up as (1 + n) / (10 + n), n = `updates`."""
    rate = 1 - min(decay, (1 + updates) / (10 + updates))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), rate)


def learning_rate_factor(step: int, warmup: int, decay: int, total: int) -> float:
    """Linear warm-up over `warmup` steps, then 1, then linear decay to 0 over the last `decay` steps."""
    return min(1.0, (step + 1) / max(warmup, 1), (total - step) / max(decay, 1))


def save_state(folder: Path, step: int, settings: dict[str, Any], **parts: Any) -> None:
    """Write the whole training state (anything with a `state_dict`) of the run at `folder`, atomically."""
    state = {name: part.state_dict() for name, part in parts.items()}
    with atomic_path(folder / STATE) as partial:
        try:
            torch.save({"step": step, "settings": json.dumps(settings, sort_keys=True), **state}, partial)
        except RuntimeError as error:  # torch's writer hides the system's error
            raise OSError(f"{str(error).splitlines()[0]}; is the disk full?") from error


def load_state(folder: Path, settings: dict[str, Any], **parts: Any) -> int:
    """Restore what `save_state` wrote, cut the log back to that step, and return the step.

    Raises:
        ValueError: no state there, a damaged one, or one of a run with other settings.
    """
    file = folder / STATE
    if not file.is_file():
        raise ValueError(f"nothing to resume in {folder}: it has no {STATE}; start without --resume")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds here
        raise ValueError(f"{file} is damaged or not a training state ({type(error).__name__})") from error
    before, now = json.loads(state["settings"]), json.loads(json.dumps(settings))
    changed = [k for k in sorted({*before, *now} - MAY_CHANGE) if before.get(k) != now.get(k)]
    if changed:
        raise ValueError(
            f"{folder} was trained with other settings: "
            + ", ".join(f"{key} was {before.get(key)}, now {now.get(key)}" for key in changed)
        )
    for name, part in parts.items():
        part.load_state_dict(state[name])
    log = folder / LOG
    if log.is_file():
        lines = [line for line in log.read_text().splitlines() if json.loads(line)["step"] <= state["step"]]
        write_text(log, "".join(line + "\n" for line in lines))
    return int(state["step"])


@contextlib.contextmanager
def fast_attention(device: torch.device | str) -> Iterator[None]:
    """On a CPU, short sequences train a third faster with the plain attention kernel (measured at 53 tokens)."""
    if torch.device(device).type == "cpu":
        with sdpa_kernel(SDPBackend.MATH):
            yield
    else:
        yield


def prepare_folder(folder: Path, resume: bool) -> None:
    """Make the run's folder.

    Raises:
        ValueError: it already holds a run and `resume` is off.
    """
    if (folder / STATE).exists() and not resume:
        raise ValueError(f"{folder} already holds a run: add --resume to continue it, or choose another --out")
    folder.mkdir(parents=True, exist_ok=True)


class Log:
    """Appends one JSON object per line to the run's log and prints the progress line."""

    def __init__(self, file: Path, start: int, total: int, images_per_step: int, quiet: bool = False):
        self.file = file
        self.start, self.total, self.images_per_step = start, total, images_per_step
        self.began = self.printed = time.monotonic()
        self.console = Console(quiet=quiet)
        self.interval = 1.0 if self.console.is_terminal else 30.0

    def __call__(self, step: int, **figures: float) -> None:
        """Record `figures` of step `step` (counted from 1).

        Raises:
            ValueError: a figure is not finite.
        """
        for name, value in figures.items():
            if not math.isfinite(value):
                raise ValueError(
                    f"{name} is {value} at step {step}: lower the learning rate; the last checkpoint is kept"
                )
        with self.file.open("a") as out:
            out.write(json.dumps({"step": step, **{name: float(f"{v:.6g}") for name, v in figures.items()}}) + "\n")
        now = time.monotonic()
        if now - self.printed < self.interval and step < self.total:
            return
        self.printed = now
        rate = (step - self.start) / max(now - self.began, 1e-9)
        left = (self.total - step) / max(rate, 1e-9)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
        self.console.print(
            f"step {step}/{self.total}  {shown}  {rate * self.images_per_step:.0f} images/s  "
            f"{int(left // 60)} min {int(left % 60)} s left",
            soft_wrap=True,
        )
