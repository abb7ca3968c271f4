"""The noise schedule: `x_t = alpha_t x_0 + sigma_t eps`, with its conversions and its ancestral posterior.

Cosine schedule of Nichol & Dhariwal 2021 (arXiv 2102.09672), 1000 steps; respaced to fewer steps as there.
"""

import functools
import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

NUM_TIMESTEPS = 1000
Index = int | Int[Tensor, " n"]


@functools.cache
def cosine_betas(steps: int = NUM_TIMESTEPS, max_beta: float = 0.999) -> tuple[float, ...]:
    """`beta_t` from the squared cosine, capped at `max_beta`."""

    def f(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    return tuple(min(1 - f((s + 1) / steps) / f(s / steps), max_beta) for s in range(steps))


def cosine_alpha_bars() -> Float[Tensor, " t"]:
    """`abar_t`, the product of `1 - beta_s` up to step t (float64)."""
    return torch.cumprod(1 - torch.tensor(cosine_betas(), dtype=torch.float64), dim=0)


def respaced_timesteps(steps: int, total: int = NUM_TIMESTEPS) -> Int[Tensor, " s"]:
    """`steps` evenly spaced time steps from 0 to `total - 1`, ascending, both ends included.

    Raises:
        ValueError: `steps` is not between 2 and `total`.
    """
    if not 2 <= steps <= total:
        raise ValueError(f"{steps} diffusion steps: expected a number from 2 to {total}")
    return torch.linspace(0, total - 1, steps, dtype=torch.float64).round().long()


@dataclass(frozen=True)
class NoiseSchedule:
    """The forward process at chosen time steps; entry i of each table belongs to `timesteps[i]`.

    `NoiseSchedule.full()` has all 1000 steps (training), `NoiseSchedule.respaced(T)` the T of a chain. Methods take
    the index i of a step, not its time step: one for each row, or one number for all. Tables are float32 on one
    device; with one number a table on the CPU serves tokens on any device, and none waits for another.
    """

    timesteps: Int[Tensor, " s"]  # as the head knows them, in [0, 999]
    alpha: Float[Tensor, " s"]  # sqrt(abar)
    sigma: Float[Tensor, " s"]  # sqrt(1 - abar)
    log_beta: Float[Tensor, " s"]  # log of the step's forward variance, the upper end of the learned range
    log_posterior_variance: Float[Tensor, " s"]  # its log, the lower end of the range; entry 0 repeats entry 1
    posterior_mean_x0: Float[Tensor, " s"]  # coefficient of x_0 in the posterior mean
    posterior_mean_xt: Float[Tensor, " s"]  # coefficient of x_t in the posterior mean

    @classmethod
    def at(cls, timesteps: Int[Tensor, " s"], device: torch.device | str = "cpu") -> "NoiseSchedule":
        """The schedule at ascending `timesteps` (DDPM, arXiv 2006.11239, equations 4 and 7)."""
        abar = cosine_alpha_bars()[timesteps.cpu()]
        previous = torch.cat([torch.ones(1, dtype=abar.dtype), abar[:-1]])
        beta = 1 - abar / previous
        variance = beta * (1 - previous) / (1 - abar)
        variance[0] = variance[1] if len(variance) > 1 else beta[0]  # it is 0, which has no log
        tables = {
            "alpha": abar.sqrt(),
            "sigma": (1 - abar).sqrt(),
            "log_beta": beta.log(),
            "log_posterior_variance": variance.log(),
            "posterior_mean_x0": beta * previous.sqrt() / (1 - abar),
            "posterior_mean_xt": (1 - previous) * (1 - beta).sqrt() / (1 - abar),
        }
        return cls(timesteps.to(device), **{name: table.float().to(device) for name, table in tables.items()})

    @classmethod
    def full(cls, device: torch.device | str = "cpu") -> "NoiseSchedule":
        """All 1000 steps."""
        return cls.at(torch.arange(NUM_TIMESTEPS), device)

    @classmethod
    def respaced(cls, steps: int, device: torch.device | str = "cpu") -> "NoiseSchedule":
        """`steps` of the 1000, evenly spaced."""
        return cls.at(respaced_timesteps(steps), device)

    def add_noise(self, x_0: Float[Tensor, "n c"], eps: Float[Tensor, "n c"], i: Index) -> Float[Tensor, "n c"]:
        """`x_t = alpha_t x_0 + sigma_t eps`."""
        return _column(self.alpha, i) * x_0 + _column(self.sigma, i) * eps

    def x0_from_eps(self, x_t: Float[Tensor, "n c"], eps: Float[Tensor, "n c"], i: Index) -> Float[Tensor, "n c"]:
        """`x_0 = (x_t - sigma_t eps) / alpha_t`."""
        return (x_t - _column(self.sigma, i) * eps) / _column(self.alpha, i)

    def log_variance(self, variance_channel: Float[Tensor, "n c"], i: Index) -> Float[Tensor, "n c"]:
        """Learned range (arXiv 2102.09672, equation 15): channel -1 is the posterior's variance, +1 is beta."""
        fraction = (variance_channel + 1) / 2
        return fraction * _column(self.log_beta, i) + (1 - fraction) * _column(self.log_posterior_variance, i)

    def posterior_mean(self, x_0: Float[Tensor, "n c"], x_t: Float[Tensor, "n c"], i: Index) -> Float[Tensor, "n c"]:
        """The mean of `q(x_{t-1} | x_t, x_0)` (arXiv 2006.11239, equation 7)."""
        return _column(self.posterior_mean_x0, i) * x_0 + _column(self.posterior_mean_xt, i) * x_t


def _column(table: Float[Tensor, " s"], i: Index) -> Tensor:
    """A table's entry for each row; a single one for a single index."""
    return table[i] if isinstance(i, int) else table[i, None]
