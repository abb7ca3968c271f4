"""Linear layers that draw fast on a CPU."""

import copy
import itertools
from typing import TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)
ONEDNN = torch.backends.mkldnn.is_available()
FEWEST_ROWS = 16  # below, oneDNN's set-up costs more than its kernels save,
LARGE = 2**19  # but for weights of so many elements: reading them takes oneDNN half of MKL's time


def linear(
    x: Float[Tensor, "*n d"], weight: Float[Tensor, "o d"], bias: Float[Tensor, " o"] | None, gelu: bool = False
) -> Float[Tensor, "*n o"]:
    """`x W^T + b`, or its GELU; in inference mode, in float32 on a CPU, by oneDNN.

    torch gives this product to MKL, which took 1.6 to 2.7 times oneDNN's time on a Zen 5 at 53 to 3,392 rows, and 1.6
    to 2.4 times at 1 to 32 rows of 1,024 x 1,024 weights and larger (Intel's own CPUs were not measured). oneDNN's
    operator has no gradient, and neither autocast nor the compiler knows it.
    """
    few = FEWEST_ROWS if weight.numel() < LARGE else 0
    if x.dtype == weight.dtype and x.numel() >= few * x.shape[-1] and for_onednn(weight):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu" if gelu else "none", [], "none")
    y = F.linear(x, weight, bias)
    return F.gelu(y) if gelu else y


def for_onednn(weight: Tensor) -> bool:
    """Whether oneDNN may multiply by a weight: in inference mode, in float32 on a CPU."""
    return (
        not torch.compiler.is_compiling()
        and ONEDNN
        and weight.is_cpu
        and weight.dtype == torch.float32
        and torch.is_inference_mode_enabled()
        and not torch.is_autocast_enabled("cpu")
    )


class Linear(nn.Linear):
    """`nn.Linear` by way of `linear`."""

    packed: Tensor | None = None  # the weight in oneDNN's layout, in copies made by `packed`

    def forward(self, input: Float[Tensor, "*n d"]) -> Float[Tensor, "*n o"]:
        return linear(input, self.weight if self.packed is None else self.packed, self.bias)


def packed(module: M) -> M:
    """A copy of a module for many calls: its large weights lie in oneDNN's layout too, all else is shared.

    Laying them out for every call took 30 % of a product of 32 rows. A copy does not follow later changes of the
    weights, so make it for one task and drop it. Where oneDNN is not used, the module itself.
    """

    def large(layer: nn.Module) -> bool:
        weight = layer.weight.data if isinstance(layer, Linear) else None
        return type(weight) is Tensor and weight.numel() >= LARGE and for_onednn(weight)

    if not any(map(large, module.modules())):
        return module
    shared = {id(tensor): tensor for tensor in itertools.chain(module.parameters(), module.buffers())}
    copied = copy.deepcopy(module, shared)
    for layer in filter(large, copied.modules()):
        layer.packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight)
    return copied
