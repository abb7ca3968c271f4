"""A run's state on disk: saved whole, read back on any number of processes, never unpickled."""

import json
import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future as TorchFuture

from marval.config import ModelConfig
from marval.io.checkpoint import save_tensors
from marval.io.files import write_tensors
from marval.model import MAR
from marval.runtime.distributed import Workers, whole
from marval.runtime.folder import RUN, Run, compare_settings, saved_states
from marval.runtime.log import LOG, cut_log
from marval.runtime.optim import Optimizer


class ShardWriter(HuggingFaceStorageWriter):
    """Writes the parts of tensors that a process holds as one file, from where they are.

    torch's own writer makes two copies of them in memory first, and nothing else runs meanwhile: it holds the GIL.
    """

    def __init__(self, folder: Path, parts: dict[str, Tensor]):
        super().__init__(str(folder), save_distributed=True)
        self.parts = parts

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> TorchFuture[list[WriteResult]]:
        """Write the parts, with the place of each in the whole."""
        items: list[Any] = plan.items
        places = {item.index.fqn: {"saved_offsets": item.tensor_data.chunk.offsets} for item in items}
        file = Path(self.path) / f"shard-{plan.storage_data['shard_index']:05d}.safetensors"
        parts = {name: self.parts[name] for name in places}  # no empty ones
        write_tensors(file, parts, {"DCP_SHARDING_INFO": json.dumps(places)})  # torch's names, for its reader
        done = TorchFuture[list[WriteResult]]()
        done.set_result([])
        return done


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
        self.parts = {name: t.to_local() if isinstance(t, DTensor) else t for name, t in self.tensors.items()}
        # Of what all processes have whole each saves some: sorted by size, it is dealt out like cards.
        workers, common = run.workers, [name for name, t in self.tensors.items() if not isinstance(t, DTensor)]
        common.sort(key=lambda name: self.parts[name].numel())
        others, pinned = set(common) - set(common[workers.rank :: workers.count]), workers.device.type == "cuda"
        own = {name: part for name, part in self.parts.items() if name not in others}
        self.copies = {name: torch.empty_like(t, device="cpu", pin_memory=pinned) for name, t in own.items()}
        # The thread that writes has a group of its own: it talks to the other processes while training does.
        self.group = None if workers.mesh is None else dist.new_group(backend="gloo")
        self.writing: Future[None] | None = None
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # torch's, of one process alone

    def save(self, update: int, extra: Mapping[str, Any] | None = None, model: ModelConfig | None = None) -> None:
        """Copy the state after `update` updates to the host, for a thread that writes it while training goes on.

        It is written in shards, atomically; earlier states are removed then.

        Args:
            model: the configuration of the network `ema`, which is written to the run's `model` as well.

        Raises:
            ValueError: it holds values that are not finite, or the save before failed; the last good state stays.
        """
        self.wait()
        folder, workers = self.run.folder, self.run.workers
        check_finite(f"at update {update}", self.parts, workers)
        if workers.main:
            for partial in folder.glob(".state-*"):  # what kills left
                shutil.rmtree(partial, ignore_errors=True)
        workers.barrier()
        torch._foreach_copy_(list(self.copies.values()), [self.parts[name] for name in self.copies], non_blocking=True)
        if workers.device.type == "cuda":
            torch.cuda.synchronize(workers.device)
        about = json.dumps({"update": update, "settings": self.settings, "extra": extra or {}})
        self.writing = self.run.thread.submit(self._write, folder / f"state-{update:08d}", about, model)

    def wait(self) -> None:
        """Wait until what was saved last is on disk; every process must ask.

        Raises:
            ValueError: it cannot be written; the last good state stays.
        """
        if self.writing is not None:
            writing, self.writing = self.writing, None
            self.run.workers.together(writing.result)

    def _write(self, target: Path, about: str, model: ModelConfig | None) -> None:
        partial, main = target.with_name(f".{target.name}.partial"), self.run.workers.main
        try:
            writer, own = ShardWriter(partial, self.copies), {name: self.tensors[name] for name in self.copies}
            dcp.save(own, storage_writer=writer, process_group=self.group, no_dist=self.group is None)
            if main:
                if model is not None:
                    self._write_model(partial, model)
                (partial / RUN).write_text(about)
                shutil.rmtree(target, ignore_errors=True)
                partial.rename(target)
                for older in set(target.parent.glob("state-*")) - {target}:  # one that a kill left half deleted, too
                    shutil.rmtree(older, ignore_errors=True)
        except (CheckpointException, OSError, RuntimeError, ValueError) as error:
            cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
            raise ValueError(f"{target} was not saved ({cause}): --resume goes on from the last good state") from error
        finally:
            if main:
                shutil.rmtree(partial, ignore_errors=True)

    def _write_model(self, folder: Path, config: ModelConfig) -> None:
        """Write the network `ema`, whose parts processes have just written to `folder`, as the run's model."""
        ema = {name: t for name, t in self.tensors.items() if name.startswith("ema.")}
        tensors = {name: torch.empty(t.shape, dtype=t.dtype) for name, t in ema.items()}
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
        save_tensors(self.run.folder / "model", {name[4:]: t for name, t in tensors.items()}, config)

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
            dcp.load(self.tensors, storage_reader=HuggingFaceStorageReader(str(newest)), no_dist=workers.mesh is None)
        except (CheckpointException, Exception) as error:  # safetensors and torch raise many kinds here
            raise ValueError(f"{damaged} ({type(error).__name__})") from error
        if workers.main:
            cut_log(folder / LOG, update)
        workers.barrier()
        return update, extra


def check_finite(where: str, tensors: Mapping[str, Tensor], workers: Workers) -> None:
    """Refuse NaN and infinity before anything is overwritten; every process must ask."""
    # A sum is finite where all its terms are, and takes a tenth of the time of `isfinite` of each.
    sums = {name: tensor.sum(dtype=torch.float32) for name, tensor in tensors.items() if tensor.is_floating_point()}
    bad = {name: total.isfinite().logical_not() for name, total in sums.items()}
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
