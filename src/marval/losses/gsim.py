"""Guided Score Implicit Matching: the losses of generator and auxiliary network (MARVAL, section "GSIM").

All of it works on noise predictions, that is on scores times `-sigma_t` (weight `w(t) = sigma_t`), in float32:

    y = sigma (s_phi - s_T) = eps_T - eps_phi                        the score gap, one vector per token
    sigma (s_phi - grad log p(x_t | x_0)) = eps - eps_phi
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

HUBER_RADIUS = 1e-5  # r

Objective = Literal["gsim", "sim", "sid", "dmd"]
OBJECTIVES: tuple[Objective, ...] = ("gsim", "sim", "sid", "dmd")


def pseudo_huber(y: Float[Tensor, "n c"], r: float = HUBER_RADIUS) -> tuple[Float[Tensor, " n"], Float[Tensor, "n c"]]:
    """`d(y) = sqrt(|y|^2 + r^2) - r` and its gradient `d'(y)`; the norm is per token."""
    root = (y.square().sum(dim=1) + r * r).sqrt()
    return root - r, y / root[:, None]


def squared(y: Float[Tensor, "n c"]) -> tuple[Float[Tensor, " n"], Float[Tensor, "n c"]]:
    """`d(y) = |y|^2` and its gradient; with it, L1 + lambda L2 is SiD's loss with alpha = 1 - lambda / 2."""
    return y.square().sum(dim=1), 2 * y


Distance = Callable[[Float[Tensor, "n c"]], tuple[Float[Tensor, " n"], Float[Tensor, "n c"]]]


@dataclass(frozen=True)
class Terms:
    """Per-token terms of the generator's loss."""

    l1: Float[Tensor, " n"]  # its mean is 0 when phi is exact: how stale phi is
    l2: Float[Tensor, " n"]  # d(y): how far the student is


def gsim_terms(
    teacher_eps: Float[Tensor, "n c"],
    auxiliary_eps: Float[Tensor, "n c"],
    eps: Float[Tensor, "n c"],
    distance: Distance = pseudo_huber,
) -> Terms:
    """`L1 = -d'(y)^T (s_phi - grad log p(x_t | x_0))` and `L2 = d(y)` (GSIM's loss is `L1 + lambda L2`).

    `teacher_eps` (guided) and `auxiliary_eps` are predictions at the same `x_t`, whose noise is `eps`. Gradients
    must reach `x_t` through both predictions, so neither may be detached; their networks' weights are frozen.
    """
    l2, direction = distance(teacher_eps - auxiliary_eps)
    return Terms(-(direction * (eps - auxiliary_eps)).sum(dim=1), l2)


def distribution_matching_loss(
    teacher_eps: Float[Tensor, "n c"], auxiliary_eps: Float[Tensor, "n c"], x_t: Float[Tensor, "n c"]
) -> Float[Tensor, " n"]:
    """`stop_gradient(y / |y|)^T x_t`: descends the KL without a gradient through the scores (the DMD baseline)."""
    y = (teacher_eps - auxiliary_eps).detach()
    return (pseudo_huber(y)[1] * x_t).sum(dim=1)


def generator_loss(
    objective: Objective,
    teacher_eps: Float[Tensor, "n c"],
    auxiliary_eps: Float[Tensor, "n c"],
    eps: Float[Tensor, "n c"],
    x_t: Float[Tensor, "n c"],
) -> tuple[Float[Tensor, ""], Terms]:
    """The named objective, averaged over tokens, and the terms to log.

    - `gsim`: pseudo-Huber, lambda = 1, the paper's.
    - `sim`: pseudo-Huber, lambda = 0 (Luo et al. 2024, Score Implicit Matching).
    - `sid`: squared distance, lambda = -0.2, that is SiD with alpha = 1.1 (Zhou et al. 2024).
    - `dmd`: `distribution_matching_loss` (Yin et al. 2024), a baseline.

    Raises:
        ValueError: an unknown objective.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"unknown objective {objective!r}: expected one of {', '.join(OBJECTIVES)}")
    if objective == "sid":
        terms = gsim_terms(teacher_eps, auxiliary_eps, eps, squared)
        return (terms.l1 - 0.2 * terms.l2).mean(), terms
    terms = gsim_terms(teacher_eps, auxiliary_eps, eps)
    if objective == "dmd":
        return distribution_matching_loss(teacher_eps, auxiliary_eps, x_t).mean(), terms
    return (terms.l1 + (1.0 if objective == "gsim" else 0.0) * terms.l2).mean(), terms


def auxiliary_loss(auxiliary_eps: Float[Tensor, "n c"], eps: Float[Tensor, "n c"]) -> Float[Tensor, ""]:
    """`|eps_phi(x_t) - eps|^2` on the student's samples: denoising score matching (MARVAL, the update of phi)."""
    return (auxiliary_eps - eps).square().mean()
