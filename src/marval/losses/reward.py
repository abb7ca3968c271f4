"""The reward objective: `L_RL = -E[R(x, prompt)]` with `x = G_theta(z, class, K)` (MARVAL, section "MARVAL-RL")."""

from collections.abc import Callable, Sequence

from jaxtyping import Float
from torch import Tensor


def policy_loss(
    reward: Callable[[Tensor, Sequence[str]], Tensor], images: Float[Tensor, "b c h w"], prompts: Sequence[str]
) -> tuple[Float[Tensor, ""], Float[Tensor, " b"]]:
    """`-mean R(x, prompt)`, differentiable in `images`, and the rewards themselves (detached)."""
    rewards = reward(images, prompts)
    return -rewards.mean(), rewards.detach()
