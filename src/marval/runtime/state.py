"""A run's state on disk: saved whole, read back on any number of processes."""

import contextlib
import itertools
import json
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor

from marval.config import ModelConfig
from marval.io.checkpoint import save_tensors
from marval.model import MAR
from marval.runtime.distributed import Workers, whole_state
from marval.runtime.folder import RUN, check_resume, compare_settings, saved_states
from marval.runtime.log import LOG, cut_log
from marval.runtime.optim import Updates

FILE_BYTES = 2**28  # of tensors in one file of a saved state
COUNTERS = ("skipped", "in_a_row")  # of `Updates`; states of earlier versions have none


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


def save_network(folder: Path, network: MAR, config: ModelConfig, workers: Workers) -> None:
    """Write a (sharded) network as a model that anyone can load."""
    tensors = whole_state(network)
    check_finite(f"for {folder}", tensors, workers)
    if workers.main:
        save_tensors(folder, tensors, config)
