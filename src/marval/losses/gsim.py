"""Guided Score Implicit Matching: the losses of theta, the student, and phi, the auxiliary network (MARVAL, "GSIM").

All of it works on noise predictions, that is on scores times `-sigma_t` (weight `w(t) = sigma_t`), in float32:

    y = sigma (s_phi - s_T) = eps_T - eps_phi                        the score gap, one vector per token
    sigma (s_phi - grad log p(x_t | x_0)) = eps - eps_phi
"""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from marval.config import Objective

HUBER_RADIUS = 1e-5  # r

Distance = Callable[[Float[Tensor, "n c"]], tuple[Float[Tensor, " n"], Float[Tensor, "n c"]]]


def pseudo_huber(y: Float[Tensor, "n c"]) -> tuple[Float[Tensor, " n"], Float[Tensor, "n c"]]:
    """`d(y) = sqrt(|y|^2 + r^2) - r` and its gradient `d'(y)`; the norm is per token."""
    root = (y.square().sum(dim=1) + HUBER_RADIUS**2).sqrt()
    return root - HUBER_RADIUS, y / root[:, None]


def squared(y: Float[Tensor, "n c"]) -> tuple[Float[Tensor, " n"], Float[Tensor, "n c"]]:
    """`d(y) = |y|^2` and its gradient; with it, L1 + lambda L2 is SiD's loss with alpha = 1 - lambda / 2."""
    return y.square().sum(dim=1), 2 * y


def gsim_terms(
    teacher_eps: Float[Tensor, "n c"],
    phi_eps: Float[Tensor, "n c"],
    eps: Float[Tensor, "n c"],
    distance: Distance = pseudo_huber,
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """`L1 = -d'(y)^T (s_phi - grad log p(x_t | x_0))` and `L2 = d(y)` of every token.

    `teacher_eps` (guided) and `phi_eps` are predictions at the same `x_t`, whose noise is `eps`. Gradients must reach
    `x_t` through both, so neither may be detached; their networks' weights are frozen. The mean of L1 is 0 when phi is
    exact: it says how stale phi is. L2 says how far the student is from the teacher.
    """
    l2, direction = distance(teacher_eps - phi_eps)
    return -(direction * (eps - phi_eps)).sum(dim=1), l2


def theta_loss(
    objective: Objective,
    teacher_eps: Float[Tensor, "n c"],
    phi_eps: Float[Tensor, "n c"],
    eps: Float[Tensor, "n c"],
) -> tuple[Float[Tensor, ""], Float[Tensor, " n"], Float[Tensor, " n"]]:
    """The student's loss `mean(L1 + lambda L2)` over tokens, and L1 and L2 to log.

    - `gsim`: pseudo-Huber, lambda = 1, the paper's.
    - `sim`: pseudo-Huber, lambda = 0 (Luo et al. 2024, Score Implicit Matching).
    - `sid`: squared distance, lambda = -0.2, that is SiD with alpha = 1.1 (Zhou et al. 2024).
    """
    l1, l2 = gsim_terms(teacher_eps, phi_eps, eps, squared if objective == "sid" else pseudo_huber)
    weight = {"gsim": 1.0, "sim": 0.0, "sid": -0.2}[objective]  # lambda
    return (l1 + weight * l2).mean(), l1, l2


def phi_loss(phi_eps: Float[Tensor, "n c"], eps: Float[Tensor, "n c"]) -> Float[Tensor, ""]:
    """`|eps_phi(x_t) - eps|^2` on the student's tokens: denoising score matching (MARVAL, the update of phi)."""
    return (phi_eps - eps).square().mean()
