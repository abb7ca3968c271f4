"""How a network's weights are updated: clipping, Adam, the learning rate's course and the EMA."""

import contextlib
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from marval.model import TokenHead
from marval.runtime.distributed import Workers, whole

MOST_SKIPPED = 10  # updates in a row with gradients that are not finite, before a run stops


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, updates: int, decay: float) -> None:
    """Move the averaged weights towards the new ones; the decay ramps up as (1 + n) / (10 + n), n = `updates`."""
    rate = 1 - min(decay, (1 + updates) / (10 + updates))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), rate)


def learning_rate_factor(update: int, warmup: int, decay: int, total: int) -> float:
    """Linear warm-up over `warmup` updates, then 1, then linear decay to 0 over the last `decay` updates (or all)."""
    return max(0.0, min(1.0, (update + 1) / max(warmup, 1), (total - update) / max(min(decay, total), 1)))


def decayed(network: nn.Module) -> set[Tensor]:
    """The weights that weight decay shrinks: the transformer's matrices. No bias, norm, embedding, nor any of the head.

    MAR's code leaves out biases, norms and the head; it decays the embeddings, which we leave alone as well.
    """
    head = {id(module) for part in network.modules() if isinstance(part, TokenHead) for module in part.modules()}
    linear = (module for module in network.modules() if isinstance(module, nn.Linear) and id(module) not in head)
    return {module.weight for module in linear}


class Optimizer:
    """AdamW with clipped gradients; weight decay only on the weights that `decayed` names.

    An update whose gradients are not finite is skipped on the device, without waiting for it, and counted.
    """

    def __init__(
        self, network: nn.Module, workers: Workers, clip: float, betas: tuple[float, float], weight_decay: float = 0.0
    ):
        self.network, self.workers, self.clip = network, workers, clip
        parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        matrices = decayed(network) if weight_decay else set()
        groups = [
            {"params": [p for p in parameters if p in matrices], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p not in matrices], "weight_decay": 0.0},
        ]
        self.adam = torch.optim.AdamW([group for group in groups if group["params"]], 0.0, betas, fused=True)
        for parameter in parameters:  # allocated from the start: a resumed run reads into it
            zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            self.adam.state[parameter] = {"step": torch.zeros((), device=parameter.device), **zeros}
        self.skipped, self.in_a_row = (torch.zeros((), device=parameters[0].device) for _ in range(2))

    def step(self, learning_rate: float) -> Tensor:
        """Update the network with its gradients, clear them, and return their norm before clipping."""
        self.workers.average_gradients(self.network)
        for group in self.adam.param_groups:
            group["lr"] = learning_rate
        norm = whole(nn.utils.clip_grad_norm_(self.network.parameters(), self.clip))
        bad = (~norm.isfinite()).float()
        self.adam.found_inf = bad  # type: ignore[attr-defined]  # fused Adam then leaves everything as it was
        self.adam.step()
        self.adam.zero_grad()
        self.skipped.add_(bad)
        self.in_a_row.add_(bad).mul_(bad)
        return norm

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs, by name: views, so that reading into them restores it."""
        tensors = {"skipped": self.skipped, "in_a_row": self.in_a_row}
        for name, parameter in self.network.named_parameters():
            tensors |= {f"{name}.{part}": value for part, value in self.adam.state.get(parameter, {}).items()}
        return {name: value.view(1) if value.ndim == 0 else value for name, value in tensors.items()}


@contextlib.contextmanager
def fast_products(device: torch.device) -> Iterator[None]:
    """Compute an update's products as fast as is precise enough.

    A GPU multiplies float32 numbers (the heads') in TF32, and never attends by cuDNN, which torch prefers on Hopper and
    later: cuDNN plans anew, on the host, for every shape, and each update masks another number of tokens. 64 images of
    MAR-B took an H200 0.45 s with it, 0.15 s without. On a CPU, short sequences train a third faster with the plain
    kernel (measured at 53 tokens).
    """
    if device.type == "cpu":
        with sdpa_kernel(SDPBackend.MATH):
            yield
        return
    before = torch.backends.cuda.matmul.fp32_precision == "tf32"
    set_tf32(True)
    try:
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            yield
    finally:
        set_tf32(before)


def set_tf32(on: bool) -> None:
    """Let a GPU multiply in TF32, or not, by the older of torch's two names, which sets both.

    With the newer name alone set, whoever asks by the older one gets an error: parts of torch's compiler do.
    """
    with warnings.catch_warnings(action="ignore"):  # that it is the older
        torch.backends.cuda.matmul.allow_tf32 = on
