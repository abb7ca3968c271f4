"""The two ways to draw a token: the teacher's diffusion chain and the student's one step."""

import math
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from marval.config import Chain, ModelConfig, OneStep, Schedule
from marval.model import NoiseSchedule, TokenHead

GUARDED_STEPS = (
    1  # a chain's first enlarges an error of eps 316 times at T = 100, the second 1.5 times, others lessen it
)
MODULATED_ROWS = 1024  # tokens x conditions x steps whose modulations are computed, and held, together


@runtime_checkable
class DrawTokens(Protocol):
    """Draws tokens given their contexts. `noise_draws` Gaussian draws per token are handed in, never drawn inside."""

    @property
    def noise_draws(self) -> int: ...

    @property
    def guidance(self) -> float: ...

    @property
    def guidance_schedule(self) -> Schedule: ...

    def __call__(
        self,
        head: TokenHead,
        context: Float[Tensor, "n d"],
        null_context: Float[Tensor, "n d"] | None,
        guidance: float,
        noise: Float[Tensor, "s n c"],
    ) -> Float[Tensor, "n c"]: ...


@dataclass(frozen=True)
class DrawByChain:
    """The teacher's inner loop: guided ancestral sampling over respaced steps (MAR, section 3.2; DDPM, algorithm 2)."""

    config: Chain
    token_range: tuple[float, float] | None = None
    schedule: NoiseSchedule = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_clip(self.config, self.token_range)
        object.__setattr__(self, "schedule", NoiseSchedule.respaced(self.config.diffusion_steps))

    @property
    def noise_draws(self) -> int:
        """The start and one draw for each step but the last, which adds none."""
        return self.config.diffusion_steps

    @property
    def guidance(self) -> float:
        """w; 1 is no guidance."""
        return self.config.guidance

    @property
    def guidance_schedule(self) -> Schedule:
        """How w grows with the revealed fraction."""
        return self.config.guidance_schedule

    def __call__(
        self,
        head: TokenHead,
        context: Float[Tensor, "n d"],
        null_context: Float[Tensor, "n d"] | None,
        guidance: float,
        noise: Float[Tensor, "s n c"],
    ) -> Float[Tensor, "n c"]:
        contexts = context[None] if null_context is None else torch.stack([context, null_context])
        x_t, steps, kind = noise[0], self.config.diffusion_steps, context.device.type
        precise = head.in_float32()
        if precise is not head or torch.is_autocast_enabled(kind):
            # In bf16 the first step alone would put x_t a third of a standard deviation off.
            guarded = range(steps - GUARDED_STEPS, steps)
            exact_contexts = contexts.to(torch.promote_types(contexts.dtype, torch.float32))
            with torch.autocast(kind, enabled=False):
                x_t = self._walk(precise, exact_contexts, guidance, noise, x_t, guarded)
            steps -= GUARDED_STEPS
        return self._walk(head, contexts, guidance, noise, x_t, range(steps))

    def _walk(
        self,
        head: TokenHead,
        contexts: Float[Tensor, "g n d"],
        guidance: float,
        noise: Float[Tensor, "s n c"],
        x_t: Float[Tensor, "n c"],
        steps: range,
    ) -> Float[Tensor, "n c"]:
        """`x_t` after `steps` of the chain, the last of them first."""
        embedded = head.embed_context(contexts)
        times = head.embed_time(self.schedule.times_on(contexts.device)[steps.start : steps.stop])
        together = max(1, MODULATED_ROWS // embedded[..., 0].numel())
        for stop in range(steps.stop, steps.start, -together):
            some = range(max(steps.start, stop - together), stop)
            levels = times[some.start - steps.start : some.stop - steps.start, None, None]
            modulations = head.modulate(embedded + levels)
            for row, i in reversed(list(enumerate(some))):
                output = head.denoise(x_t, [m[row] for m in modulations])
                x_t = self._step(x_t, output, head.token_dim, guidance, noise, i)
        return x_t

    def _step(
        self,
        x_t: Float[Tensor, "n c"],
        output: Float[Tensor, "g n o"],
        token_dim: int,
        guidance: float,
        noise: Float[Tensor, "s n c"],
        i: int,
    ) -> Float[Tensor, "n c"]:
        """`x_{t-1}` from the head's output for `x_t` (DDPM, algorithm 2)."""
        schedule, steps = self.schedule, self.config.diffusion_steps
        eps = guided_eps(output[..., :token_dim], guidance)
        x_0 = schedule.x0_from_eps(x_t, eps, i)
        if self.config.clip and self.token_range is not None:
            x_0 = x_0.clamp(*self.token_range)
        x_t = schedule.posterior_mean(x_0, x_t, i)
        if i == 0:
            return x_t + 0 * eps  # the same, or NaN where a clip hides that eps is not finite
        step_noise = self.config.temperature * noise[steps - i]
        if output.shape[-1] > token_dim:
            return x_t + (0.5 * schedule.log_variance(output[0, :, token_dim:], i)).exp() * step_noise
        return x_t + math.exp(0.5 * schedule.numbers["log_posterior_variance"][i]) * step_noise


@dataclass(frozen=True)
class DrawInOneStep:
    """The student's single call (MARVAL, section "GSIM"): from pure noise at the level of `timestep` to `x_0`."""

    config: OneStep = field(default_factory=OneStep)
    token_range: tuple[float, float] | None = None
    noise_draws: int = 1
    guidance: float = 1.0  # guidance is baked into the student
    guidance_schedule: Schedule = "constant"
    schedule: NoiseSchedule = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_clip(self.config, self.token_range)
        object.__setattr__(self, "schedule", NoiseSchedule.at(torch.tensor([self.config.timestep])))

    def __call__(
        self,
        head: TokenHead,
        context: Float[Tensor, "n d"],
        null_context: Float[Tensor, "n d"] | None,
        guidance: float,
        noise: Float[Tensor, "s n c"],
    ) -> Float[Tensor, "n c"]:
        x_t = self.schedule.numbers["sigma"][0] * noise[0]
        time = head.embed_time(self.schedule.times_on(context.device))
        eps = head.denoise(x_t, head.embed_context(context) + time)[:, : head.token_dim]
        x_0 = self.schedule.x0_from_eps(x_t, eps, 0)
        if self.config.clip and self.token_range is not None:
            return x_0.clamp(*self.token_range) + 0 * eps  # NaN where the clip hides that eps is not finite
        return x_0


def check_clip(config: Chain | OneStep, token_range: tuple[float, float] | None) -> None:
    """Raise ValueError where tokens should be clipped that have no range."""
    if config.clip and token_range is None:
        raise ValueError("clip=True needs a range of the tokens, which latents do not have: use clip=False")


def draw_function(config: ModelConfig) -> DrawByChain | DrawInOneStep:
    """The way a model's configuration says its tokens are drawn."""
    if isinstance(config.draw, Chain):
        return DrawByChain(config.draw, config.space.token_range)
    return DrawInOneStep(config.draw, config.space.token_range)


def guided_eps(eps: Float[Tensor, "g n c"], guidance: float) -> Float[Tensor, "n c"]:
    """`eps_w = eps_null + w (eps_c - eps_null)`, from conditional and null predictions stacked; alone, the first.

    `w` is MAR's: 1 is no guidance. MARVAL writes `(1 + w) S(c) - w S(null)` but labels its unguided row w = 1,
    which fits this convention only.
    """
    return eps[0] if len(eps) == 1 else torch.lerp(eps[1], eps[0], guidance)


def guidance_at(guidance: float, schedule: Schedule, revealed: float) -> float:
    """w at a revealed fraction of the tokens: constant, or `1 + (w - 1) * revealed` (MAR, section 5)."""
    return guidance if schedule == "constant" else 1 + (guidance - 1) * revealed
