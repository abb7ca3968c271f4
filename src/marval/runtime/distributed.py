"""The processes of a run: one, or several under torchrun that share batches and networks.

Every process makes the same random draws for the whole batch and takes its own rows of them, so that N processes
do what one does.
"""

import contextlib
import functools
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, ParamSpec, TypeVar, cast

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from marval.model import MAR, TokenHead
from marval.model.blocks import Block

GROWING = "expandable_segments:True"  # torch's name for memory that grows in place
GLOO_SECONDS = 0.3  # for Gloo's threads to let go of their last tensors

Value = TypeVar("Value")
P = ParamSpec("P")

# What is called besides `forward`, of a MAR and of its head: FSDP gathers the weights at these calls.
CALLED = (
    "advance", "context", "embed", "null_condition", "denoise", "embed_context", "embed_guidance", "embed_time",
    "modulate",
)  # fmt: skip


@dataclass(frozen=True)
class Workers:
    """The processes of a run, seen from one of them."""

    rank: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    mesh: DeviceMesh | None = None
    stop: threading.Event = field(default_factory=threading.Event)  # set by SIGTERM and, in training, by Ctrl-C
    training: threading.Event = field(default_factory=threading.Event)  # set from the first of the `updates` on
    shard: bool = False  # split networks over the processes; else each has them whole

    @property
    def main(self) -> bool:
        """True for the process that writes and prints."""
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        """Whether each process holds a part of every network."""
        return self.shard and self.mesh is not None

    def parts(self, batch: int, accumulate: int = 1) -> list[slice]:
        """Cut a batch: this process's rows, in `accumulate` parts of nearly equal size."""
        pieces = self.count * accumulate
        if batch < pieces:
            raise ValueError(
                f"a batch of {batch} cannot be split over {self.count} processes x {accumulate} parts: enlarge it"
            )
        cuts = [batch * i // pieces for i in range(pieces + 1)]
        own = range(self.rank * accumulate, (self.rank + 1) * accumulate)
        return [slice(cuts[i], cuts[i + 1]) for i in own]

    def share(self, rows: slice, batch: int) -> float:
        """The weight of a part's mean in the batch's; times the number of processes, whose gradients are averaged."""
        return (rows.stop - rows.start) * self.count / batch

    def place(self, network: MAR | TokenHead, autocast: bool = False) -> None:
        """Bring a network to the device or, where it is `sharded`, shard it (`fully_shard`, block by block).

        Args:
            autocast: whether its blocks compute in bf16.
        """
        if not self.sharded:
            network.to(self.device)
            return
        # What autocast would cast to bf16 is gathered in bf16. Resharding after every forward lets `requires_grad` take
        # effect at the next one.
        half = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # of results that are changed in place: ours are not
        shard = functools.partial(fully_shard, mesh=self.mesh, reshard_after_forward=True)
        for module in network.modules():
            if isinstance(module, Block) and autocast:
                shard([module.attn, module.mlp], mp_policy=half)
        for module in [m for m in network.modules() if isinstance(m, Block | TokenHead) and m is not network] + [
            network
        ]:
            shard(module)
            for name in CALLED:
                if hasattr(module, name):
                    register_fsdp_forward_method(module, name)

    def average_gradients(self, network: nn.Module) -> None:
        """Average the gradients of a network that each process has whole; FSDP averages those of sharded ones."""
        gradients = [p.grad for p in network.parameters() if p.grad is not None]
        if self.mesh is None or self.shard or not gradients:
            return
        together = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(together)
        parts = (together / self.count).split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])

    def mean(self, figures: dict[str, Tensor | float]) -> dict[str, float]:
        """Average figures over the processes, with one read from the device."""
        on_device = [torch.as_tensor(value, dtype=torch.float32, device=self.device) for value in figures.values()]
        values = torch.stack(on_device).detach().cpu().double()
        if self.mesh is not None:
            dist.all_reduce(values)
            values /= self.count
        return dict(zip(figures, values.tolist(), strict=True))

    def gather(self, rows: Shaped[Tensor, "n *rest"]) -> Shaped[Tensor, "total *rest"]:
        """Every process's rows, in order, on the CPU."""
        parts = self.collect(rows.cpu())
        return self.agree(torch.cat(parts) if parts else rows)

    def agree(self, value: Value) -> Value:
        """The main process's value, on every process."""
        if self.mesh is None:
            return value
        box: list[Any] = [value]
        dist.broadcast_object_list(box)
        return box[0]

    def collect(self, value: Value) -> list[Value]:
        """Every process's value by rank, on the main process; nothing on the others."""
        if self.mesh is None:
            return [value]
        values: list[Any] = [None] * self.count if self.main else []
        dist.gather_object(value, values if self.main else None)
        return values

    def together(self, job: Callable[P, Value], *args: P.args, **kwargs: P.kwargs) -> Value:
        """Do a job that every process does; a ValueError of one is raised on all of them."""
        if self.mesh is None:
            return job(*args, **kwargs)
        result, problem = None, ""
        try:
            result = job(*args, **kwargs)
        except ValueError as error:
            problem = str(error) or type(error).__name__
        if problem := next(filter(None, self.agree(self.collect(problem))), ""):
            raise ValueError(problem)
        return cast(Value, result)

    def updates(self, start: int, end: int) -> Iterator[int]:
        """The updates of a training loop that asks `stopping` after each: from here on Ctrl-C lets it save first."""
        self.training.set()
        yield from range(start, end)

    def stopping(self) -> bool:
        """Tell whether any process was asked to stop (SIGTERM, Ctrl-C); all of them get the same answer."""
        if self.mesh is None:
            return self.stop.is_set()
        asked = torch.tensor(int(self.stop.is_set()))
        dist.all_reduce(asked)
        return bool(asked)

    def barrier(self) -> None:
        """Wait for the other processes."""
        if self.mesh is not None:
            dist.barrier()


def whole(tensor: Tensor) -> Tensor:
    """Gather a tensor that may be sharded; every process must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextlib.contextmanager
def start_workers(device: str, shard: bool = False) -> Iterator[Workers]:
    """Start this process's `Workers`: under torchrun they find each other, else there is one.

    SIGTERM asks them to stop. So does Ctrl-C while they train (`Workers.updates`), and KeyboardInterrupt follows once
    that is done; a second Ctrl-C, or one before, interrupts at once. On "cuda" each process takes a device of its own.

    Args:
        shard: split networks over the processes (FSDP), for those that do not fit one device.
    """
    stop, training, place = threading.Event(), threading.Event(), torch.device(device)
    with _stopped_by_signals(stop, training):
        if place.type == "cuda":
            grow_memory()
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            yield Workers(device=place, stop=stop, training=training)
            return
        if place.type == "cuda":
            place = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(place)
        backends = "gloo" if place.type == "cpu" else f"cpu:gloo,{place.type}:nccl"
        dist.init_process_group(backends, timeout=timedelta(minutes=30))
        count = dist.get_world_size()
        yield Workers(dist.get_rank(), count, place, init_device_mesh(place.type, (count,)), stop, training, shard)
        # Not after an error: the others would notice, and end, before this process has said what is wrong.
        dist.destroy_process_group()
        # Gloo's threads outlive the group (DTensor's caches hold it) and may still be letting go of the last
        # collective's tensors; one that asks for the GIL of a finished interpreter aborts the process.
        time.sleep(GLOO_SECONDS)


def grow_memory() -> None:
    """Let a GPU's memory grow in place, unless torch is told otherwise; before anything is there.

    Tensors have other sizes in every update, as masks have. Torch would reserve memory for each size anew, slowly,
    until all is cut into pieces that fit no other.
    """
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name
        os.environ.setdefault("PYTORCH_ALLOC_CONF", GROWING)


@contextlib.contextmanager
def _stopped_by_signals(stop: threading.Event, training: threading.Event) -> Iterator[None]:
    """Set `stop` at SIGTERM and, while `training`, at the first Ctrl-C."""
    interrupted = threading.Event()

    def interrupt(*_: Any) -> None:
        if not training.is_set():
            raise KeyboardInterrupt
        if interrupted.is_set():
            raise KeyboardInterrupt("at once: what it did since its last saved state is lost")
        interrupted.set()
        stop.set()

    handlers = {signal.SIGTERM: lambda *_: stop.set(), signal.SIGINT: interrupt}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
        if interrupted.is_set():
            raise KeyboardInterrupt("what it did is saved, go on with --resume")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
