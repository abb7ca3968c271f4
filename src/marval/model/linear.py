"""Linear layers that draw fast on a CPU."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

ONEDNN = torch.backends.mkldnn.is_available()
FEWEST_ROWS = 16  # below, oneDNN's set-up costs more than its kernels save,
LARGE = 2**19  # but for weights of so many elements: reading them takes oneDNN half of MKL's time


def linear(
    x: Float[Tensor, "*n d"], weight: Float[Tensor, "o d"], bias: Float[Tensor, " o"] | None
) -> Float[Tensor, "*n o"]:
    """`x W^T + b`; in inference mode, in float32 on a CPU, by oneDNN.

    torch gives this product to MKL, which took 1.6 to 2.7 times oneDNN's time on a Zen 5 at 53 to 3,392 rows, and 1.6
    to 2.4 times at 1 to 32 rows of 1,024 x 1,024 weights and larger (Intel's own CPUs were not measured). oneDNN's
    operator has no gradient, and neither autocast nor the compiler knows it.
    """
    if (
        ONEDNN
        and (x.numel() >= FEWEST_ROWS * x.shape[-1] or weight.numel() >= LARGE)
        and x.is_cpu
        and torch.is_inference_mode_enabled()
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    ):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """`nn.Linear` by way of `linear`."""

    def forward(self, input: Float[Tensor, "*n d"]) -> Float[Tensor, "*n o"]:
        return linear(input, self.weight, self.bias)
