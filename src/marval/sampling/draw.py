"""The two ways to draw a token: the teacher's diffusion chain and the student's one step."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributed.tensor import DTensor

from marval.config import Chain, ModelConfig, OneStep, Schedule
from marval.model import NoiseSchedule, TokenHead
from marval.sampling.fast import joined_modulation

GUARDED_STEPS = 1  # T = 100: a chain's first step enlarges an error of eps 316 times, the second 1.5, others lessen it
MODULATED_ROWS = 1024  # tokens x conditions x steps whose modulations are computed, and held, together
Guidance = float | Float[Tensor, " n"]
G = TypeVar("G", bound=Guidance)


Draw = Callable[[Float[Tensor, "g n d"], Guidance, Float[Tensor, "s n c"]], Float[Tensor, "n c"]]


class DrawTokens(ABC):
    """A way to draw tokens given their contexts; everything random is handed in."""

    config: Chain | OneStep
    noise_draws: int  # Gaussian draws for a token
    needs_null: bool  # whether contexts are those of the condition and of the null condition, or the former alone
    guidance: float  # w, unless the caller has another; 1 is no guidance. A student whose head takes none ignores it
    guidance_schedule: Schedule  # how w grows with the revealed fraction

    @abstractmethod
    def bind(self, head: TokenHead) -> Draw:
        """Compute what depends on the head alone, and return the function that draws tokens with it."""

    def joint_noise(self, noise: Float[Tensor, "s b q c"]) -> Float[Tensor, "b q c"] | None:
        """What the context network of a joint draw reads of the noise of the tokens that are drawn now."""
        return None

    def __call__(
        self, head: TokenHead, contexts: Float[Tensor, "g n d"], guidance: Guidance, noise: Float[Tensor, "s n c"]
    ) -> Float[Tensor, "n c"]:
        """Draw tokens in their contexts."""
        return self.bind(head)(contexts, guidance, noise)


class DrawByChain(DrawTokens):
    """The teacher's inner loop: guided ancestral sampling over respaced steps (MAR, section 3.2; DDPM, algorithm 2).

    Args:
        device: where tokens will be drawn; elsewhere works too, but each loop copies the time steps there.
    """

    def __init__(
        self, config: Chain, token_range: tuple[float, float] | None = None, device: torch.device | str = "cpu"
    ):
        self.config, self.clip_range = config, token_range if config.clip else None
        self.schedule = NoiseSchedule.respaced(config.diffusion_steps)
        self.times = self.schedule.timesteps.float().to(device)
        self.temperature = config.temperature
        self.noise_draws = config.diffusion_steps  # the start, and one for each step but the last
        self.needs_null = config.guidance != 1.0
        self.guidance, self.guidance_schedule = config.guidance, config.guidance_schedule

    def bind(self, head: TokenHead) -> Draw:
        """Embed the chain's time steps, in float32 for those of its steps that need it."""
        device, steps, precise = head.input_proj.weight.device, len(self.times), head.in_float32()
        kind, times = device.type, self.times.to(device)
        # In bf16 the first step alone would put x_t a third of a standard deviation off.
        guarded = precise is not head or torch.is_autocast_enabled(kind)
        rest = steps - GUARDED_STEPS if guarded else steps
        with torch.autocast(kind, enabled=False) if guarded else contextlib.nullcontext():
            first = precise.embed_time(times[rest:]) if guarded else None
        embedded = head.embed_time(times[:rest])

        def draw(
            contexts: Float[Tensor, "g n d"], guidance: Guidance, noise: Float[Tensor, "s n c"]
        ) -> Float[Tensor, "n c"]:
            x_t = noise[0]
            if first is not None:
                exact_contexts = contexts.to(torch.promote_types(contexts.dtype, torch.float32))
                with torch.autocast(kind, enabled=False):
                    x_t = self._walk(precise, first, exact_contexts, guidance, noise, x_t, range(rest, steps))
            return self._walk(head, embedded, contexts, guidance, noise, x_t, range(rest))

        return draw

    def _walk(
        self,
        head: TokenHead,
        times: Float[Tensor, "t w"],
        contexts: Float[Tensor, "g n d"],
        guidance: Guidance,
        noise: Float[Tensor, "s n c"],
        x_t: Float[Tensor, "n c"],
        steps: range,
    ) -> Float[Tensor, "n c"]:
        """`x_t` after `steps` of the chain, the last of them first; `times` are these steps' embeddings."""
        embedded = head.embed_context(contexts)
        together = max(1, MODULATED_ROWS // embedded[..., 0].numel())
        for stop in range(steps.stop, steps.start, -together):
            some = range(max(steps.start, stop - together), stop)
            rows = times[some.start - steps.start : some.stop - steps.start, None, None]
            modulations = head.modulate(embedded + rows)
            for row, i in reversed(list(enumerate(some))):
                output = head.denoise(x_t, [m[row] for m in modulations])
                x_t = self._step(x_t, output.split(head.token_dim, dim=-1), guidance, noise, i)
        return x_t

    def _step(
        self,
        x_t: Float[Tensor, "n c"],
        output: tuple[Float[Tensor, "g n c"], ...],
        guidance: Guidance,
        noise: Float[Tensor, "s n c"],
        i: int,
    ) -> Float[Tensor, "n c"]:
        """`x_{t-1}` from the head's noise (and variance channel, where it has one) for `x_t` (DDPM, algorithm 2)."""
        eps = guided_eps(output[0], guidance)
        x_0 = self.schedule.x0_from_eps(x_t, eps, i)
        if self.clip_range is not None:
            x_0 = x_0.clamp(*self.clip_range)
        mean = self.schedule.posterior_mean(x_0, x_t, i)
        if i == 0:
            return mean + 0 * eps  # the same, or NaN where a clip hides that eps is not finite
        if len(output) > 1:
            log_variance = self.schedule.log_variance(output[1][0], i)
        else:
            log_variance = self.schedule.log_posterior_variance[i]
        return mean + (0.5 * log_variance).exp() * (self.temperature * noise[len(self.times) - i])


class DrawInOneStep(DrawTokens):
    """The student's single call (MARVAL, section "GSIM"): from pure noise at the level of `timestep` to `x_0`.

    Args:
        device: where tokens will be drawn; elsewhere works too, but each loop copies the time step there.
    """

    noise_draws, needs_null = 1, False

    def __init__(
        self,
        config: OneStep | None = None,
        token_range: tuple[float, float] | None = None,
        device: torch.device | str = "cpu",
    ):
        self.config = config = config or OneStep()
        self.clip_range = token_range if config.clip else None
        self.schedule = NoiseSchedule.at(torch.tensor([config.timestep]))
        self.times = self.schedule.timesteps.float().to(device)
        self.guidance, self.guidance_schedule = config.guidance, config.guidance_schedule
        self.temperature = config.temperature

    def joint_noise(self, noise: Float[Tensor, "1 b q c"]) -> Float[Tensor, "b q c"]:
        """What tokens start from, at the draw's temperature."""
        return self.temperature * noise[0]

    def bind(self, head: TokenHead) -> Draw:
        """Embed the time step; on a GPU, join the products of all modulations."""
        weight = head.input_proj.weight
        time = head.embed_time(self.times.to(weight.device))
        joined = weight.is_cuda and not isinstance(weight, DTensor) and not torch.is_grad_enabled()
        modulate = joined_modulation(head) if joined else None

        def draw(
            contexts: Float[Tensor, "1 n d"], guidance: Guidance, noise: Float[Tensor, "1 n c"]
        ) -> Float[Tensor, "n c"]:
            x_t = self.temperature * self.schedule.sigma[0] * noise[0]
            y = head.embed_guidance(head.embed_context(contexts[0]) + time, guidance)
            if modulate is None or len(y) > MODULATED_ROWS:  # the modulations of more would fill the memory
                eps = head.denoise(x_t, y)
            else:
                eps = head.denoise(x_t, modulate(y))
            eps = eps[:, : head.token_dim]
            x_0 = self.schedule.x0_from_eps(x_t, eps, 0)
            if self.clip_range is None:
                return x_0
            return x_0.clamp(*self.clip_range) + 0 * eps  # NaN where the clip hides that eps is not finite

        return draw


def draw_function(config: ModelConfig, device: torch.device | str = "cpu") -> DrawByChain | DrawInOneStep:
    """The way that a model's configuration draws tokens on a device."""
    if isinstance(config.draw, Chain):
        return DrawByChain(config.draw, config.space.token_range, device)
    return DrawInOneStep(config.draw, config.space.token_range, device)


def is_guided(guidance: Guidance) -> bool:
    """Tell whether a null context is needed; always for a tensor, which the host does not read."""
    return isinstance(guidance, Tensor) or guidance != 1.0


def guided_eps(eps: Float[Tensor, "g n c"], guidance: Guidance) -> Float[Tensor, "n c"]:
    """`eps_w = eps_null + w (eps_c - eps_null)`, from the two predictions stacked; the first, where it is alone.

    `w` is MAR's: 1 is no guidance. MARVAL writes `(1 + w) S(c) - w S(null)` but labels its unguided row w = 1,
    which fits this convention only.
    """
    if len(eps) == 1:
        return eps[0]
    return torch.lerp(eps[1], eps[0], guidance[:, None].to(eps) if isinstance(guidance, Tensor) else guidance)


def guidance_at(guidance: G, schedule: Schedule, revealed: float) -> G:
    """w at a revealed fraction of the tokens: constant, or `1 + (w - 1) * revealed` (MAR, section 5)."""
    return guidance if schedule == "constant" else 1 + (guidance - 1) * revealed  # type: ignore[return-value]
