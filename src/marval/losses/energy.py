"""The energy score, a strictly proper scoring rule: least where a student draws from the teacher's distribution."""

import torch
from jaxtyping import Float
from torch import Tensor


def energy_score(samples: Float[Tensor, "m n c"], target: Float[Tensor, "n c"]) -> Float[Tensor, " n"]:
    """`mean_i |x_i - y| - 1/2 mean_{i != j} |x_i - x_j|` for m samples of every token and one target (m at least 2).

    Its expected value over y exceeds the least one by half the energy distance of the two distributions (Gneiting and
    Raftery 2007, section 4.3; Székely and Rizzo 2013). The first term draws samples to where the teacher's are, the
    second keeps them apart, so modes are not lost as by score matching.
    """
    first, second = torch.triu_indices(len(samples), len(samples), 1, device=samples.device)
    return distance(samples, target).mean(0) - distance(samples[first], samples[second]).mean(0) / 2


def distance(x: Float[Tensor, "m n c"], y: Float[Tensor, "*m n c"]) -> Float[Tensor, "m n"]:
    """Euclidean, with a gradient where both are the same."""
    return ((x - y).square().sum(-1) + 1e-8).sqrt()
