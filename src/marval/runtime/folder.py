"""A run's folder: who may have it, and whether what it holds comes from the same settings, models, data and reward."""

import contextlib
import functools
import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from torch import nn

from marval.data import LatentData, TrainingData
from marval.data.latents import PLAN
from marval.io.checkpoint import weights_hash
from marval.io.files import check_output, locked
from marval.runtime.distributed import Workers

RUN = "run.json"  # beside the tensors of a saved state
LOCK = ".lock"  # in the run's folder, while it runs
# Settings that a resumed run may have different: how long and how fast it learns, and what changes no result.
MAY_CHANGE = (
    "updates", "learning_rate", "auxiliary_learning_rate", "warmup", "decay",
    "save_every", "log_every", "accumulate", "checkpoint_blocks", "max_skipped",
)  # fmt: skip
LABELS = ("source", "data")  # of a model's configuration: the command and --data as typed; a folder may have moved
Run = TypeVar("Run", bound=Callable[..., Any])


def saved_states(folder: Path) -> list[Path]:
    """The whole states of a run, oldest first."""
    return sorted(path for path in folder.glob("state-*") if (path / RUN).is_file())


def check_resume(out: Path, resume: bool) -> None:
    """Whether a run in the folder `out` can start, or with `resume` go on; nothing is made.

    Raises:
        ValueError: it holds a run and `resume` is off, or holds none and it is on, or cannot be written to.
    """
    check_output(out, folder=True)
    if saved_states(out) and not resume:
        raise ValueError(f"{out} already holds a run: add --resume to continue it, or choose another --out")
    if resume and not saved_states(out):
        raise ValueError(f"nothing to resume in {out}: it has no saved state; start without --resume")


@contextlib.contextmanager
def claimed(out: Path, resume: bool, workers: Workers) -> Iterator[None]:
    """Have the run's folder, which is made, to oneself; one that stays empty is removed.

    Raises:
        ValueError: as `check_resume`, or another run is at work there.
    """
    with contextlib.ExitStack() as held:

        def claim() -> None:
            if workers.main:
                check_resume(out, resume)
                for place in [path for path in (*reversed(out.parents), out) if not path.exists()]:
                    held.callback(remove_empty, place)
                held.enter_context(locked(out / LOCK, wait=False))

        workers.together(claim)
        yield


def remove_empty(folder: Path) -> None:
    """Remove a folder if nothing is in it."""
    with contextlib.suppress(OSError):
        folder.rmdir()


def claims_folder(run: Run) -> Run:
    """Let a training function have its folder, the argument `out`, to itself while it runs (see `claimed`)."""
    signature = inspect.signature(run)

    @functools.wraps(run)
    def alone(*arguments: Any, **named: Any) -> Any:
        given = signature.bind(*arguments, **named)
        given.apply_defaults()
        given.arguments["workers"] = workers = given.arguments["workers"] or Workers()
        with claimed(given.arguments["out"], given.arguments["resume"], workers):
            return run(*given.args, **given.kwargs)

    return cast(Run, alone)


def compare_settings(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> str:
    """Whether a run may go on with the settings `now`; what cannot be compared, since only one side has it.

    Raises:
        ValueError: names every setting that differs, both its values, and what may differ.
    """
    first, second = (flat({k: v for k, v in side.items() if k not in LABELS}) for side in (before, now))
    compared = [key for key in first if key in second and key.rpartition(".")[2] not in MAY_CHANGE]
    changed = [key for key in compared if first[key] != second[key]]
    if changed:
        raise ValueError(
            f"{folder} holds another run: "
            + ", ".join(f"{key} was {first[key]}, now {second[key]}" for key in changed)
            + f"; --resume may change {', '.join(MAY_CHANGE)}, nothing else: choose another --out"
        )
    unknown = sorted(second.keys() - first.keys())
    return f"{folder} was saved by another version of marval, which did not say {', '.join(unknown)}" if unknown else ""


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted names."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def data_identity(data: TrainingData) -> str:
    """What tells one data set from another: how many images, and a hash of their bytes (of a cache: of its plan)."""
    if isinstance(data, LatentData):
        plan = {"plan": (data.folder / PLAN).read_text(), "scale": data.scale}
        return identity(f"{len(data)} latents", hashlib.sha256(json.dumps(plan).encode()).hexdigest())
    digest = hashlib.sha256(json.dumps([data.shape, data.class_names, data.labels.tolist()]).encode())
    digest.update(data.images.contiguous().numpy().data)
    return identity(f"{len(data)} images", digest.hexdigest())


def model_identity(name: str, network: nn.Module) -> str:
    """What tells one model from another: its name and a hash of its weights."""
    return identity(name, weights_hash(network))


def identity(name: str, digest: str) -> str:
    """A name, and the hash of what it stands for."""
    return f"{name} (sha256 {digest})"
