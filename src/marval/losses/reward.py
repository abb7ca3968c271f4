"""The reward objective: `L_RL = -E[R(x, prompt)]` with `x = G_theta(z, class, K)` (MARVAL, section "MARVAL-RL")."""

from collections.abc import Callable, Sequence

from jaxtyping import Float
from torch import Tensor


def policy_loss(
    reward: Callable[[Tensor, Sequence[str]], Tensor],
    images: Float[Tensor, "b c h w"],
    prompts: Sequence[str],
    hinge: float | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, " b"]]:
    """`-mean min(R(x, prompt), hinge)`, differentiable in `images`, and the rewards themselves (detached).

    Images whose reward is above the hinge push no further (ReFL, Xu et al. 2023, section 4); None: no hinge.
    """
    rewards = reward(images, prompts)
    return -(rewards if hinge is None else rewards.clamp(max=hinge)).mean(), rewards.detach()
