"""Linear layers that draw fast on a CPU."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

FEWEST_ROWS = 16  # below, oneDNN's set-up costs more than its kernels save


def linear(
    x: Float[Tensor, "*n d"], weight: Float[Tensor, "o d"], bias: Float[Tensor, " o"] | None
) -> Float[Tensor, "*n o"]:
    """`x W^T + b`; without gradients, in float32 on a CPU, by oneDNN.

    torch gives this product to MKL, which reaches half of oneDNN's speed on CPUs that are not Intel's (1.6 to 2.7
    times the time at 53 to 3,392 rows on a Zen 5) and none that is higher elsewhere. oneDNN's operator has no
    gradient, and torch's own product is what autocast and the compiler know.
    """
    if (
        not torch.is_grad_enabled()
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() >= FEWEST_ROWS * x.shape[-1]
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.enabled
        and torch.backends.mkldnn.is_available()
        and not torch.compiler.is_compiling()
    ):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """`nn.Linear` by way of `linear`."""

    def forward(self, input: Float[Tensor, "*n d"]) -> Float[Tensor, "*n o"]:
        return linear(input, self.weight, self.bias)
