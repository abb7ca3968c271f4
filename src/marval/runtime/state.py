"""A run's state on disk: saved whole, read back on any number of processes, never unpickled."""

import json
import shutil
import warnings
from collections.abc import Mapping
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
from marval.runtime.distributed import Workers, whole
from marval.runtime.folder import RUN, Run, compare_settings, saved_states
from marval.runtime.log import LOG, cut_log
from marval.runtime.optim import Optimizer

IN_A_FILE = 500  # tensors of a saved state: the writer copies a file's tensors twice in memory


class State:
    """Everything that a run goes on from: networks, optimizers, and the settings and origins that must stay the same.

    torch's own `get_state_dict` is of no use here: it adds values that are no tensors, which safetensors cannot hold.
    """

    def __init__(
        self, run: Run, settings: dict[str, Any], networks: dict[str, nn.Module], optimizers: dict[str, Optimizer]
    ):
        self.run, self.settings = run, json.loads(json.dumps(settings))
        # Views: reading into them restores the networks and optimizers.
        self.tensors = {f"{name}.{key}": t for name, net in networks.items() for key, t in net.state_dict().items()}
        for name, optimizer in optimizers.items():
            self.tensors |= {f"optimizer.{name}.{key}": t for key, t in optimizer.tensors().items()}

    def save(self, update: int, extra: Mapping[str, Any] | None = None) -> None:
        """Write the state after `update` updates in shards, atomically; earlier states are removed.

        Raises:
            ValueError: it cannot be written, or holds values that are not finite; the last good state stays.
        """
        folder, workers = self.run.folder, self.run.workers
        check_finite(f"at update {update}", self.tensors, workers)
        target = folder / f"state-{update:08d}"
        partial = folder / f".{target.name}.partial"
        if workers.main:
            shutil.rmtree(partial, ignore_errors=True)
        workers.barrier()
        try:
            files = {name: 1 + i // IN_A_FILE for i, name in enumerate(self.tensors)}
            writer = HuggingFaceStorageWriter(str(partial), files, save_distributed=True)
            with warnings.catch_warnings(action="ignore"):  # torch's: that one process saves alone
                dcp.save(self.tensors, storage_writer=writer, no_dist=workers.mesh is None)
            if workers.main:
                about = {"update": update, "settings": self.settings, "extra": extra or {}}
                (partial / RUN).write_text(json.dumps(about))
                shutil.rmtree(target, ignore_errors=True)
                partial.rename(target)
                for older in set(folder.glob("state-*")) - {target}:  # one that a kill left half deleted, too
                    shutil.rmtree(older, ignore_errors=True)
        except (CheckpointException, OSError, RuntimeError) as error:  # torch hides the system's error in its own
            if workers.main:
                shutil.rmtree(partial, ignore_errors=True)
            reason = str(error).strip().splitlines()[-1]
            raise ValueError(
                f"cannot write {target}: {reason}; free some space, then --resume: the last good state is kept"
            ) from error
        workers.barrier()

    def load(self) -> tuple[int, dict[str, Any]]:
        """Restore what `save` wrote, on any number of processes, and cut the log back to it; its update and extra.

        Raises:
            ValueError: a damaged state, or one of a run with other settings or made from something else.
        """
        folder, workers = self.run.folder, self.run.workers
        if not self.run.resume:
            return 0, {}
        newest = saved_states(folder)[-1]
        damaged = f"{newest} is damaged or not a training state"
        try:
            about = json.loads((newest / RUN).read_text())
            before, update, extra = about["settings"], int(about["update"]), about["extra"]
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{damaged} ({type(error).__name__})") from error
        compare_settings(folder, before, self.settings)
        try:
            with warnings.catch_warnings(action="ignore"):
                dcp.load(
                    self.tensors, storage_reader=HuggingFaceStorageReader(str(newest)), no_dist=workers.mesh is None
                )
        except (CheckpointException, Exception) as error:  # safetensors and torch raise many kinds here
            raise ValueError(f"{damaged} ({type(error).__name__})") from error
        if workers.main:
            cut_log(folder / LOG, update)
        workers.barrier()
        return update, extra


def check_finite(where: str, tensors: Mapping[str, Tensor], workers: Workers) -> None:
    """Refuse NaN and infinity before anything is overwritten; every process must ask."""
    parts = {name: tensor.to_local() if isinstance(tensor, DTensor) else tensor for name, tensor in tensors.items()}
    bad = {name: part.isfinite().all().logical_not() for name, part in parts.items() if part.is_floating_point()}
    for name, share in workers.mean(dict(bad)).items():
        if share:
            raise ValueError(
                f"{name} holds values that are not finite {where}: lower the learning rate, or look for broken data; "
                "they are not saved, what was saved before is kept"
            )


def save_network(folder: Path, network: MAR, config: ModelConfig, workers: Workers) -> None:
    """Write a (sharded) network as a model that anyone can load."""
    tensors = {name: whole(tensor).detach().cpu() for name, tensor in network.state_dict().items()}
    check_finite(f"for {folder}", tensors, workers)
    if workers.main:
        save_tensors(folder, tensors, config)
