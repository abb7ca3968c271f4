"""Low-rank tuning (LoRA, Hu et al. 2021): `W + B A` for the weight of every linear layer.

Not by peft: it wraps a layer's `forward`, but the last decoder block multiplies by slices of `qkv.weight` (it needs
queries at some rows only), and would go on without the adapter, silently. torch's parametrisations change the weight
itself, whoever reads it, and merge back into plain weights under the official names.
"""

from operator import attrgetter

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from marval.model import MAR
from marval.runtime.rng import generator


class LowRank(nn.Module):
    """`W + B A`, with `B` zero at first."""

    def __init__(self, weight: Float[Tensor, "o i"], rank: int, rng: torch.Generator):
        super().__init__()
        outputs, inputs = weight.shape
        self.a = nn.Parameter((torch.randn(rank, inputs, generator=rng) / inputs**0.5).to(weight))
        self.b = nn.Parameter(torch.zeros(outputs, rank).to(weight))

    def forward(self, weight: Float[Tensor, "o i"]) -> Float[Tensor, "o i"]:
        return weight + self.b @ self.a


def add_low_rank(network: MAR, rank: int, seed: int) -> MAR:
    """Freeze a network and give every linear layer trainable factors of this rank; it computes what it did."""
    network.requires_grad_(False)
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Linear):
            factors = LowRank(module.weight, rank, generator(seed, "low rank", name))
            parametrize.register_parametrization(module, "weight", factors)
    return network


def merged(network: MAR) -> MAR:
    """A network with plain weights: itself, or a new one with the low-rank factors multiplied into them."""
    if not any(parametrize.is_parametrized(module) for module in network.modules()):
        return network
    # `remove_parametrizations` is of no use: it would change the class that the network's copies share.
    with torch.device("meta"):
        plain = MAR(network.config)
    plain.load_state_dict(
        {name: attrgetter(name)(network).detach() for name in plain.state_dict()}, strict=True, assign=True
    )
    return plain.eval().requires_grad_(False)
