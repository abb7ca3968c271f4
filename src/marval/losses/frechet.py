"""The Fréchet distance between drawn and real images' features as an objective (FD-loss, arXiv 2604.28190).

Features are written in the real ones' principal directions, from the real mean: there the real moments are 0 and
`diag(variances)`. Covariances count among the first directions, in the others variances alone.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

RIDGE = 1e-3  # of the real covariance, added to both sides: few images vary in few directions


class Moments(NamedTuple):
    """Mean, covariance among the first directions, and variances along the others."""

    mean: Float[Tensor, " f"]
    covariance: Float[Tensor, "d d"]
    others: Float[Tensor, " e"]


class FrechetDistance(NamedTuple):
    """A distance, and its derivatives in the drawn images' moments."""

    distance: Float[Tensor, ""]
    slopes: Moments


def frechet_distance(drawn: Moments, real: Float[Tensor, " f"]) -> FrechetDistance:
    """`FD = |m|^2 + tr(S + R) - 2 tr((R^1/2 S R^1/2)^1/2)` (Heusel et al. 2017), and its derivatives.

    `dFD/dm = 2 m`, and `dFD/dS = I - R^1/2 (R^1/2 S R^1/2)^-1/2 R^1/2`.

    Args:
        drawn: m and S, in float64.
        real: the variances of which R is the diagonal.
    """
    size = len(drawn.covariance)
    target = (1 + RIDGE) * real
    s, root = drawn.covariance + RIDGE * real[:size].diag(), target[:size].sqrt()
    values, vectors = torch.linalg.eigh(root[:, None] * s * root)
    values = values.clamp(min=1e-14 * float(values[-1]) + 1e-200)  # 0 but for rounding where no real image varies
    inverse_root = (vectors * values.rsqrt()) @ vectors.mT
    slope = torch.eye(size, dtype=s.dtype) - root[:, None] * inverse_root * root
    others = drawn.others + RIDGE * real[size:]
    ratio = (target[size:] / others.clamp(min=1e-200)).sqrt()
    distance = drawn.mean.square().sum() + s.trace() + target[:size].sum() - 2 * values.sqrt().sum()
    distance = distance + (others.sqrt() - target[size:].sqrt()).square().sum()
    return FrechetDistance(distance, Moments(2 * drawn.mean, slope, 1 - ratio))


def frechet_first_order(features: Float[Tensor, "b f"], drawn: Moments, at: FrechetDistance) -> Float[Tensor, " b"]:
    """Return, for each image, what FD would be to first order if the drawn images' moments were this image's.

    `FD + dFD/dm . (f - m) + (f - m)^T dFD/dS (f - m) - tr(dFD/dS S)`. Its mean over a batch has the gradient of FD in
    the batch's features, divided by the batch's weight in the moments: so there is one number per image, and no
    gradient passes through a decomposition.
    """
    size, slopes = len(drawn.covariance), at.slopes
    centred = features - drawn.mean
    first, others = centred[:, :size], centred[:, size:]
    change = (slopes.mean * centred).sum(dim=1)
    change = change + ((first @ slopes.covariance) * first).sum(dim=1) - (slopes.covariance * drawn.covariance).sum()
    change = change + (slopes.others * (others.square() - drawn.others)).sum(dim=1)
    return at.distance + change
