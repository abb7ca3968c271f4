"""A run's folder: who may have it, and whether what it holds comes from the same settings, models, data and reward."""

import contextlib
import hashlib
import importlib.util
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from marval.data import LatentData, TrainingData
from marval.data.latents import PLAN
from marval.io.checkpoint import weights_hash
from marval.io.files import check_output, locked
from marval.runtime.distributed import Workers

RUN = "run.json"  # beside the tensors of a saved state
LOCK = ".lock"  # in the run's folder, while it runs
# Settings that a resumed run may change: how long and how fast it learns, and what changes no result.
MAY_CHANGE = (
    "updates", "learning_rate", "auxiliary_learning_rate", "warmup", "decay",
    "save_every", "log_every", "accumulate", "checkpoint_blocks", "compile",
)  # fmt: skip
LABELS = ("source", "data")  # of a model's configuration: the command and --data as typed; a folder may have moved
CLIP = "draw.clip"  # changes no training; that of older teachers of latents was off


@dataclass(frozen=True)
class Run:
    """A training run: its folder, whether it goes on from the state saved there, and the processes that share it."""

    folder: Path
    resume: bool
    workers: Workers
    tensorboard: bool  # write event files beside the log
    thread: ThreadPoolExecutor  # writes what is saved while training goes on


@contextlib.contextmanager
def open_run(
    folder: Path, *, resume: bool = False, workers: Workers | None = None, tensorboard: bool = False
) -> Iterator[Run]:
    """Lock a run's folder, which is made where it is missing; remove it if it stays empty.

    What is being saved when the block ends, or raises, is written before the lock goes.

    Raises:
        ValueError: as `check_resume`, another run is at work there, or TensorBoard is not installed.
    """
    if tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ValueError("--tensorboard needs its package: pip install tensorboard")
    workers = workers or Workers()
    with contextlib.ExitStack() as stack:

        def lock() -> None:
            if workers.main:
                check_resume(folder, resume)
                for place in [path for path in (*reversed(folder.parents), folder) if not path.exists()]:
                    stack.callback(remove_empty, place)
                stack.enter_context(locked(folder / LOCK, wait=False))

        workers.together(lock)
        yield Run(folder, resume, workers, tensorboard, stack.enter_context(ThreadPoolExecutor(1)))


def saved_states(folder: Path) -> list[Path]:
    """The whole states of a run, oldest first."""
    return sorted(path for path in folder.glob("state-*") if (path / RUN).is_file())


def check_resume(folder: Path, resume: bool) -> None:
    """Check that a run in `folder` can start, or with `resume` go on; nothing is made."""
    check_output(folder, folder=True)
    if saved_states(folder) and not resume:
        raise ValueError(f"{folder} already holds a run: add --resume to continue it, or choose another --out")
    if resume and not saved_states(folder):
        raise ValueError(f"nothing to resume in {folder}: it has no saved state; start without --resume")


def remove_empty(folder: Path) -> None:
    """Remove a folder if nothing is in it."""
    with contextlib.suppress(OSError):
        folder.rmdir()


def compare_settings(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Check that a run may go on with the settings `now`; what one side does not say is not compared."""
    old, new = (flat({k: v for k, v in side.items() if k not in LABELS}) for side in (before, now))
    fixed = [key for key in old if key in new and key != CLIP and key.rpartition(".")[2] not in MAY_CHANGE]
    changed = [f"{key} was {old[key]}, now {new[key]}" for key in fixed if old[key] != new[key]]
    if changed:
        told = f"{folder} holds another run: {', '.join(changed)}; --resume may change"
        raise ValueError(f"{told} {', '.join(MAY_CHANGE)}, nothing else: choose another --out")


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted names."""
    names: dict[str, Any] = {}
    for key, value in settings.items():
        names |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return names


def data_identity(data: TrainingData) -> str:
    """Identify a data set: how many images, and a hash of their bytes (of a cache: of its plan)."""
    said = None if data.captions is None else {"encoder": data.captions.encoder, **data.captions.to_dict()}
    captions = "" if said is None else json.dumps(said)
    if isinstance(data, LatentData):
        plan = json.dumps({"plan": (data.folder / PLAN).read_text(), "scale": data.scale})
        return f"{len(data)} latents (sha256 {hashlib.sha256((plan + captions).encode()).hexdigest()})"
    about = json.dumps([data.shape, data.class_names, data.labels.tolist()])
    digest = hashlib.sha256((about + captions).encode())
    digest.update(data.images.contiguous().numpy().data)
    return f"{len(data)} images (sha256 {digest.hexdigest()})"


def model_identity(name: str, network: nn.Module) -> str:
    """Identify a model: its name and a hash of its weights."""
    return f"{name} (sha256 {weights_hash(network)})"
