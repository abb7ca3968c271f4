"""What the training loops share: the run's folder, its log, its resumable state, safe updates and the progress line."""

import contextlib
import itertools
import json
import math
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from rich.console import Console
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from marval.config import ModelConfig, RunConfig
from marval.io.checkpoint import save_tensors
from marval.io.files import write_text
from marval.model import MAR, TokenHead
from marval.parallel import Workers, whole, whole_state
from marval.train.folder import RUN, check_resume, compare_settings, saved_states

LOG = "log.jsonl"
FILE_BYTES = 2**28  # of tensors in one file of a saved state
COUNTERS = ("skipped", "in_a_row")  # of `Updates`; states of earlier versions have none


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, updates: int, decay: float) -> None:
    """Move the averaged weights towards the new ones; the decay ramps up as (1 + n) / (10 + n), n = `updates`."""
    rate = 1 - min(decay, (1 + updates) / (10 + updates))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), rate)


def learning_rate_factor(step: int, warmup: int, decay: int, total: int) -> float:
    """Linear warm-up over `warmup` steps, then 1, then linear decay to 0 over the last `decay` steps (or all)."""
    return max(0.0, min(1.0, (step + 1) / max(warmup, 1), (total - step) / max(min(decay, total), 1)))


def decayed(network: nn.Module) -> set[Tensor]:
    """The weights that weight decay shrinks: the transformer's matrices. No bias, norm, embedding, nor any of the head.

    MAR's code leaves out biases, norms and the head; it decays the embeddings, which we leave alone as well.
    """
    head = {id(module) for part in network.modules() if isinstance(part, TokenHead) for module in part.modules()}
    linear = (module for module in network.modules() if isinstance(module, nn.Linear) and id(module) not in head)
    return {module.weight for module in linear}


class Updates:
    """Clipped updates of a network's trainable weights by Adam, with AdamW's weight decay where `decayed` says.

    Those whose gradients are not finite are skipped, on the device, and counted.
    """

    def __init__(self, network: nn.Module, settings: RunConfig, betas: tuple[float, float], weight_decay: float = 0.0):
        self.network, self.settings = network, settings
        parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        matrices = decayed(network) if weight_decay else set()
        groups = [
            {"params": [p for p in parameters if p in matrices], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p not in matrices], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW([group for group in groups if group["params"]], 0.0, betas, fused=True)
        for parameter in parameters:  # allocated from the start: a resumed run reads into it
            zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **zeros}
        self.skipped, self.in_a_row = (torch.zeros((), device=parameters[0].device) for _ in range(2))

    def __call__(self, learning_rate: float) -> Tensor:
        """Update the network with its gradients, clear them, and return their norm before clipping."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        norm = whole(nn.utils.clip_grad_norm_(self.network.parameters(), self.settings.gradient_clip))
        bad = (~norm.isfinite()).float()
        self.optimizer.found_inf = bad  # type: ignore[attr-defined]  # fused Adam then leaves everything as it was
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.skipped.add_(bad)
        self.in_a_row.add_(bad).mul_(bad)
        return norm

    def check(self, step: int, figures: dict[str, float]) -> None:
        """Stop a run that gets nowhere.

        Raises:
            ValueError: `settings.max_skipped` updates in a row, or more, were skipped.
        """
        if self.in_a_row >= self.settings.max_skipped:
            shown = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
            raise ValueError(
                f"{int(self.in_a_row)} updates in a row were skipped up to step {step}: their gradients are not finite "
                f"({shown}); lower the learning rate, or look for broken data; the last saved state is kept"
            )


def state_tensors(networks: dict[str, nn.Module], updates: dict[str, Updates]) -> dict[str, Tensor]:
    """Every tensor of a run by name (views, so that reading into them restores it)."""
    tensors = {f"{name}.{key}": t for name, network in networks.items() for key, t in network.state_dict().items()}
    for name, update in updates.items():
        for key, parameter in update.network.named_parameters():
            for part, value in update.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{name}.{key}.{part}"] = value.view(1) if value.ndim == 0 else value
        for counter in COUNTERS:
            tensors[f"optimizer.{name}.{counter}"] = getattr(update, counter).view(1)
    return tensors


def shard_files(tensors: dict[str, Tensor]) -> dict[str, int]:
    """The number of the file that each tensor is written to; the writer copies a file's tensors twice in memory."""
    ends = itertools.accumulate(tensor.nbytes for tensor in tensors.values())
    numbers = [1 + (end - 1) // FILE_BYTES for end in ends]
    used = {number: i for i, number in enumerate(sorted(set(numbers)), start=1)}  # 1 ... N, without gaps
    return {name: used[number] for name, number in zip(tensors, numbers, strict=True)}


def save_state(
    folder: Path,
    step: int,
    settings: dict[str, Any],
    tensors: dict[str, Tensor],
    extra: dict[str, Any],
    workers: Workers,
) -> None:
    """Write the whole training state of the run at `folder` in shards, atomically; earlier states are removed.

    Raises:
        ValueError: it cannot be written, or holds values that are not finite; the last good state stays.
    """
    check_finite(f"at step {step}", tensors, workers)
    target = folder / f"state-{step:08d}"
    partial = folder / f".{target.name}.partial"
    if workers.main:
        shutil.rmtree(partial, ignore_errors=True)
    workers.barrier()
    try:
        writer = HuggingFaceStorageWriter(str(partial), shard_files(tensors), save_distributed=True)
        with quiet_checkpoints():
            dcp.save(tensors, storage_writer=writer, no_dist=workers.mesh is None)
        if workers.main:
            (partial / RUN).write_text(json.dumps({"step": step, "settings": settings, "extra": extra}))
            old = list(folder.glob("state-*"))  # one that a kill left half deleted, too
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)
            for path in old:
                if path != target:
                    shutil.rmtree(path, ignore_errors=True)
    except (CheckpointException, OSError, RuntimeError) as error:  # torch hides the system's error in its own
        if workers.main:
            shutil.rmtree(partial, ignore_errors=True)
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(
            f"cannot write {target}: {reason}; free some space, then --resume: the last good state is kept"
        ) from error
    workers.barrier()


@contextlib.contextmanager
def quiet_checkpoints() -> Iterator[None]:
    """Without torch's warning that a single process saves alone: it is meant to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def check_finite(where: str, tensors: Mapping[str, Tensor], workers: Workers) -> None:
    """Look for NaN and infinity before anything is overwritten; every process must ask.

    Raises:
        ValueError: names the first tensor that has some.
    """
    parts = {name: tensor.to_local() if isinstance(tensor, DTensor) else tensor for name, tensor in tensors.items()}
    bad = {name: part.isfinite().all().logical_not() for name, part in parts.items() if part.is_floating_point()}
    for name, found in workers.mean(dict(bad)).items():
        if found:
            raise ValueError(
                f"{name} holds values that are not finite {where}: lower the learning rate, or look for broken data; "
                "they are not saved, what was saved before is kept"
            )


def load_state(folder: Path, settings: dict[str, Any], tensors: dict[str, Tensor], workers: Workers) -> tuple[int, Any]:
    """Restore what `save_state` wrote (on any number of processes), cut the log back to that step; step and extra.

    Raises:
        ValueError: no state there, a damaged one, or one of a run with other settings or made from something else.
    """
    check_resume(folder, True)
    newest = saved_states(folder)[-1]
    try:
        run = json.loads((newest / RUN).read_text())
        before, step, extra = run["settings"], int(run["step"]), run["extra"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{newest} is damaged or not a training state ({type(error).__name__})") from error
    told = compare_settings(folder, before, json.loads(json.dumps(settings)))
    if told and workers.main:
        print(f"marval: {told}", file=sys.stderr)
    try:
        with quiet_checkpoints():
            reader = HuggingFaceStorageReader(str(newest))
            saved = reader.read_metadata().state_dict_metadata
            wanted = {k: t for k, t in tensors.items() if k in saved or k.rpartition(".")[2] not in COUNTERS}
            dcp.load(wanted, storage_reader=reader, no_dist=workers.mesh is None)
    except (CheckpointException, Exception) as error:  # safetensors and torch raise many kinds here
        raise ValueError(f"{newest} is damaged or not a training state ({type(error).__name__})") from error
    if workers.main:
        cut_log(folder / LOG, step)
    workers.barrier()
    return step, extra


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


def save_network(folder: Path, network: MAR, config: ModelConfig, workers: Workers) -> None:
    """Write a (sharded) network as a model that anyone can load."""
    tensors = whole_state(network)
    check_finite(f"for {folder}", tensors, workers)
    if workers.main:
        save_tensors(folder, tensors, config)


@contextlib.contextmanager
def fast_attention(device: torch.device | str) -> Iterator[None]:
    """On a CPU, short sequences train a third faster with the plain attention kernel (measured at 53 tokens)."""
    if torch.device(device).type == "cpu":
        with sdpa_kernel(SDPBackend.MATH):
            yield
    else:
        yield


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
