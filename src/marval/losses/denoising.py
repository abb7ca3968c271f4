"""The diffusion loss that trains a MAR teacher (MAR, equation 1; learned variance as in arXiv 2102.09672)."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from marval.config import Weighting
from marval.model import NoiseSchedule, TokenHead

MOST = 30.0  # the largest of the weights 1 / alpha_t^2


def level_weights(schedule: NoiseSchedule, weighting: Weighting) -> Float[Tensor, " t"] | None:
    """The weight of each level's error of eps, of mean 1; None where all are the same.

    `v` gives 1 / alpha_t^2, at most `MOST`: the error of v = alpha eps - sigma x_0 (arXiv 2202.00512), in which that of
    x_0 counts as much as that of eps. Plain errors of eps are mostly those of small levels, of details.
    """
    if weighting == "eps":
        return None
    weights = (1 / schedule.alpha.square()).clamp(max=MOST)
    return weights / weights.mean()


def denoising_loss(
    head: TokenHead,
    schedule: NoiseSchedule,
    x_0: Float[Tensor, "n c"],
    context: Float[Tensor, "n d"],
    t: Int[Tensor, " n"],
    eps: Float[Tensor, "n c"],
    weights: Float[Tensor, " t"] | None = None,
) -> Float[Tensor, " n"]:
    """`|eps - eps_theta(x_t, t, c)|^2` per token, averaged over channels; plus the variance bound where learned.

    Args:
        weights: of every level's error; None: 1.
    """
    x_t = schedule.add_noise(x_0, eps, t)
    output = head(x_t, t.float(), context).float()
    predicted, variance_channel = output[:, : head.token_dim], output[:, head.token_dim :]
    loss = (predicted - eps).square().mean(dim=1)
    loss = loss if weights is None else loss * weights[t]
    if variance_channel.shape[1] == 0:
        return loss
    return loss + variance_bound(schedule, x_0, x_t, t, predicted.detach(), variance_channel)


def variance_bound(
    schedule: NoiseSchedule,
    x_0: Float[Tensor, "n c"],
    x_t: Float[Tensor, "n c"],
    t: Int[Tensor, " n"],
    predicted_eps: Float[Tensor, "n c"],
    variance_channel: Float[Tensor, "n c"],
) -> Float[Tensor, " n"]:
    """One term of the variational bound (arXiv 2102.09672, equations 4 to 7) in bits, averaged over channels.

    The mean comes in detached, so that this term trains the variance channel alone.
    """
    true_mean = schedule.posterior_mean(x_0, x_t, t)
    true_log_variance = schedule.log_posterior_variance[t, None]
    mean = schedule.posterior_mean(schedule.x0_from_eps(x_t, predicted_eps, t), x_t, t)
    log_variance = schedule.log_variance(variance_channel, t)
    gap = log_variance - true_log_variance
    kl = 0.5 * (gap - 1 + (-gap).exp() + (true_mean - mean).square() * (-log_variance).exp())
    first_step = -discretized_log_likelihood(x_0, mean, log_variance)
    return torch.where(t[:, None] == 0, first_step, kl).mean(dim=1) / math.log(2)


def discretized_log_likelihood(
    x: Float[Tensor, "n c"], mean: Float[Tensor, "n c"], log_variance: Float[Tensor, "n c"]
) -> Float[Tensor, "n c"]:
    """Log-probability of 8-bit values in [-1, 1] under a Gaussian (DDPM, equation 13), by the tanh form of its CDF."""

    def cdf(u: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))

    inverse_scale = (-0.5 * log_variance).exp()
    upper = cdf(inverse_scale * (x - mean + 1 / 255))
    lower = cdf(inverse_scale * (x - mean - 1 / 255))
    probability = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return probability.clamp(min=1e-12).log()
