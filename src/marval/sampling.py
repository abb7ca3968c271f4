"""Drawing images: the AR loop over tokens, shared by teacher and student, and the two ways to draw a token."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from marval.config import Chain, ModelConfig, OneStep, Schedule
from marval.model import MAR, NoiseSchedule, TokenHead
from marval.model.linear import packed
from marval.randomness import Seeds, generator, image_seeds

OrderFunction = Callable[[tuple[int, int], int], Int[Tensor, " l"]]
Orders = str | Integer[Tensor, "..."] | OrderFunction  # positions (L,) or (B, L)
FEWEST_CALLS = 25  # of the head, from which on `packed` saves more than it takes
GUARDED_STEPS = (
    1  # a chain's first enlarges an error of eps 316 times at T = 100, the second 1.5 times, others lessen it
)
MODULATED_ROWS = 1024  # tokens x conditions x steps whose modulations are computed, and held, together
Hook = Callable[[int, Float[Tensor, "b l c"], Bool[Tensor, "b l"]], None]


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
        object.__setattr__(self, "schedule", NoiseSchedule.respaced(self.config.steps))

    @property
    def noise_draws(self) -> int:
        """The start and one draw for each step but the last, which adds none."""
        return self.config.steps

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
        x_t, steps, kind = noise[0], self.config.steps, context.device.type
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
        schedule, steps = self.schedule, self.config.steps
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


def draw_counts(tokens: int, iterations: int) -> list[int]:
    """How many of `tokens` each AR iteration draws: cosine schedule, at least one each (MaskGIT; MAR, section 4).

    Raises:
        ValueError: `iterations` is not between 1 and `tokens`.
    """
    if not 1 <= iterations <= tokens:
        raise ValueError(f"{iterations} iterations for {tokens} tokens: expected a number from 1 to {tokens}")
    counts, masked = [], tokens
    for k in range(iterations - 1):
        target = math.floor(tokens * math.cos(math.pi / 2 * (k + 1) / iterations))
        remaining = max(1, min(masked - 1, target))
        counts.append(masked - remaining)
        masked = remaining
    return [*counts, masked]


def raster_order(grid: tuple[int, int], seed: int) -> Int[Tensor, " l"]:
    """Row by row."""
    return torch.arange(math.prod(grid))


def random_order(grid: tuple[int, int], seed: int) -> Int[Tensor, " l"]:
    """A random permutation for each image."""
    return torch.randperm(math.prod(grid), generator=generator(seed, "order"))


def halton_order(grid: tuple[int, int], seed: int) -> Int[Tensor, " l"]:
    """Spread out evenly: the Halton sequence in bases 2 and 3 (Besnier et al. 2025), the same for every image."""

    def radical_inverse(n: int, base: int) -> float:
        value, scale = 0.0, 1.0
        while n:
            scale /= base
            n, digit = divmod(n, base)
            value += digit * scale
        return value

    order: dict[int, None] = {}
    n = 1
    while len(order) < math.prod(grid):
        row, column = int(radical_inverse(n, 2) * grid[0]), int(radical_inverse(n, 3) * grid[1])
        order[row * grid[1] + column] = None
        n += 1
    return torch.tensor(list(order))


@functools.cache
def nearness(grid: tuple[int, int]) -> np.ndarray:
    """`1 / distance^4` between any two positions of a grid (0 for a position and itself)."""
    places = np.moveaxis(np.indices(grid), 0, -1).reshape(-1, 2)
    squares = np.square(places[:, None] - places).sum(axis=-1)
    return np.where(squares > 0, 1.0 / np.maximum(squares, 1) ** 2, 0.0)


def spread_order(grid: tuple[int, int], seed: int) -> Int[Tensor, " l"]:
    """Random, but a position waits while those beside it have just been drawn.

    Tokens of one iteration are drawn independently of each other, so neighbours drawn together need not agree where
    they meet. Greedy: the next position has the smallest sum of its random priority in [0, 1] and half its nearness to
    those drawn before, each of which counts 0.8 times as much at every step (weights by measurement, at K = 8).
    """
    near = nearness(grid)
    priority = torch.rand(len(near), generator=generator(seed, "order"), dtype=torch.float64).numpy()
    crowding, order = np.zeros(len(near)), []
    for _ in range(len(near)):
        position = int((priority + 0.5 * crowding).argmin())
        order.append(position)
        priority[position] = np.inf
        crowding = 0.8 * crowding + near[position]
    return torch.tensor(order)


ORDERS: dict[str, OrderFunction] = {
    "random": random_order, "raster": raster_order, "halton": halton_order, "spread": spread_order,
}  # fmt: skip


def drawing_orders(orders: Orders, grid: tuple[int, int], seeds: Sequence[int]) -> Int[Tensor, "b l"]:
    """The positions of each image in the order in which they are drawn (the reverse of the official code's `orders`).

    Args:
        orders: "random", "raster", "halton" or "spread"; a function of (grid, seed); or positions (L,) or (B, L).

    Raises:
        ValueError: an unknown name, or rows that do not hold every position once.
    """
    count = math.prod(grid)
    if isinstance(orders, str):
        if orders not in ORDERS:
            raise ValueError(f"unknown order {orders!r}: expected one of {', '.join(ORDERS)}")
        orders = ORDERS[orders]
    rows = orders if isinstance(orders, Tensor) else torch.stack([orders(grid, seed) for seed in seeds])
    whole = not (rows.is_floating_point() or rows.is_complex() or rows.dtype == torch.bool)
    found = rows.to("cpu", torch.int64) if whole and rows.shape in ((count,), (len(seeds), count)) else None
    if found is None or not torch.equal(found.sort(dim=-1).values, torch.arange(count).expand_as(found)):
        raise ValueError(
            f"an order must name each of the {count} positions once, in whole numbers of shape ({count},) or "
            f"({len(seeds)}, {count}): this one has shape {tuple(rows.shape)} and {rows.dtype}"
        )
    return found.expand(len(seeds), count)


def image_noise(seed: int, draws: int, tokens: int, channels: int) -> Float[Tensor, "s l c"]:
    """One image's noise: a start for each position (the same for every `draws`), then `draws - 1` steps."""
    rng = generator(seed, "image")
    start = torch.randn(1, tokens, channels, generator=rng)
    return torch.cat([start, torch.randn(draws - 1, tokens, channels, generator=rng)])


@dataclass(frozen=True)
class Start:
    """What the AR loop reads: known tokens (0 elsewhere), the order of drawing, how many to draw at a time, noise."""

    tokens: Float[Tensor, "b l c"]
    order: Int[Tensor, "b l"]  # known positions first
    known: int  # how many tokens of each image are known
    counts: list[int]
    noise: Float[Tensor, "s b l c"]


def prepare(
    model: MAR,
    draw_tokens: DrawTokens,
    *,
    iterations: int,
    seeds: Sequence[int],
    orders: Orders = "random",
    known: tuple[Float[Tensor, "b l c"], Bool[Tensor, "b l"]] | None = None,
    noise: Float[Tensor, "s b l c"] | None = None,
) -> Start:
    """Check what is asked for, and put what the AR loop needs on the model's device; arguments are those of `sample`.

    Tokens and noise are float32 (or float64 with such weights): in half precision the diffusion would lose itself.
    """
    config, device, batch = model.config, model.mask_token.device, len(seeds)
    shape, dtype = (batch, config.num_tokens), torch.promote_types(model.mask_token.dtype, torch.float32)
    order = drawing_orders(orders, config.token_grid, seeds)
    tokens, shown = torch.zeros(*shape, config.token_dim, device=device, dtype=dtype), 0
    if known is not None:
        given, keep = known[0].to(tokens), known[1].cpu()
        if keep.shape != shape:
            raise ValueError(f"a mask of shape {tuple(keep.shape)}: expected {shape}, images and tokens")
        shown = int(keep[0].sum())
        if (keep.sum(dim=1) != shown).any():
            raise ValueError("every image of a batch must keep the same number of tokens: draw the others apart")
        kept_first = keep.gather(1, order).int().argsort(dim=1, descending=True, stable=True)
        order = order.gather(1, kept_first)
        tokens = torch.where(keep.to(device)[..., None], given, tokens)
        if not tokens.isfinite().all():
            raise ValueError("the known tokens hold values that are not finite: expected the tokens of real images")
    counts = draw_counts(config.num_tokens - shown, iterations)
    if noise is None:
        draws = [image_noise(seed, draw_tokens.noise_draws, config.num_tokens, config.token_dim) for seed in seeds]
        noise = torch.stack(draws, dim=1)
    return Start(tokens, order.to(device), shown, counts, noise.to(device, dtype))


def run(
    model: MAR,
    draw_tokens: DrawTokens,
    labels: Int[Tensor, " b"],
    start: Start,
    gradient_iterations: int = 0,
    autocast: bool = False,
) -> Iterator[tuple[Float[Tensor, "b l c"], Int[Tensor, "b v"]]]:
    """The AR loop: after each iteration the tokens, and the positions of those that are known or drawn.

    It copies nothing between devices and waits for none.
    """
    config, tokens, shown = model.config, start.tokens, start.known
    calls = len(start.counts) * draw_tokens.noise_draws
    head = packed(model.head) if calls >= FEWEST_CALLS else model.head

    def iterate(tokens: Tensor, visible: Tensor, positions: Tensor, guidance: float) -> Tensor:
        # A region of its own in every iteration: autocast's cache must not keep what was cast without gradients.
        with torch.autocast(tokens.device.type, torch.bfloat16) if autocast else contextlib.nullcontext():
            context = model_contexts(model, tokens, visible, positions, labels, guided=draw_tokens.guidance != 1.0)
        context = context.float() if autocast else context
        index = positions[..., None].expand(-1, -1, config.token_dim)
        local_noise = start.noise.gather(2, index.expand(len(start.noise), -1, -1, -1)).flatten(1, 2)
        null = context[1] if len(context) > 1 else None
        drawn = draw_tokens(head, context[0], null, guidance, local_noise)
        return tokens.scatter(1, index, drawn.unflatten(0, positions.shape).to(tokens.dtype))

    for k, count in enumerate(start.counts):
        visible = start.order[:, :shown].contiguous()
        positions = start.order[:, shown : shown + count].contiguous()
        shown += count
        # MAR's linear schedule counts one token as hidden in the last iteration.
        revealed = min(shown, config.num_tokens - 1) / config.num_tokens
        guidance = guidance_at(draw_tokens.guidance, draw_tokens.guidance_schedule, revealed)
        if k < len(start.counts) - gradient_iterations:
            with torch.no_grad():
                tokens = iterate(tokens, visible, positions, guidance)
        elif model.checkpoint_blocks:  # both would compute the context three times
            tokens = iterate(tokens, visible, positions, guidance)
        else:
            tokens = checkpoint(
                iterate, tokens, visible, positions, guidance, use_reentrant=False, preserve_rng_state=False
            )
        yield tokens, start.order[:, :shown]


def sample(
    model: MAR,
    draw_tokens: DrawTokens,
    labels: Int[Tensor, " b"],
    *,
    iterations: int,
    seeds: Seeds,
    orders: Orders = "random",
    known: tuple[Float[Tensor, "b l c"], Bool[Tensor, "b l"]] | None = None,
    noise: Float[Tensor, "s b l c"] | None = None,
    on_iteration: Hook | None = None,
    gradient_iterations: int = 0,
    autocast: bool = False,
) -> Float[Tensor, "b l c"]:
    """Draw the tokens of a batch of images in `iterations` AR iterations (MAR, algorithm of section 3.3).

    Args:
        labels: classes.
        iterations: K, from 1 to the number of tokens to draw.
        seeds: one per image, or the first image's; an image depends on its own seed, class and order, not on its batch.
        orders: see `drawing_orders`.
        known: tokens and a mask of those to keep (inpainting); every image keeps the same number.
        noise: the Gaussian draws for every position, instead of those that the seeds give.
        on_iteration: called after each iteration with its number (from 1), the tokens (0 where not yet drawn)
            and the mask of those that are known or drawn.
        gradient_iterations: M, the last iterations that gradients flow through; each is checkpointed, so that
            memory holds one iteration's activations at a time (but for a model that recomputes block by block).
        autocast: compute contexts in bf16; the head stays in float32.

    Raises:
        ValueError: too many iterations, a bad order, a wrong number of seeds, kept counts that
            differ within the batch, or a model that draws values that are not finite.
    """
    seeds = image_seeds(seeds, len(labels))
    start = prepare(model, draw_tokens, iterations=iterations, seeds=seeds, orders=orders, known=known, noise=noise)
    labels, tokens = labels.to(start.tokens.device), start.tokens
    for k, (tokens, places) in enumerate(run(model, draw_tokens, labels, start, gradient_iterations, autocast)):
        if on_iteration is not None:
            drawn = torch.zeros(start.order.shape, dtype=torch.bool, device=places.device)
            on_iteration(k + 1, tokens.detach(), drawn.scatter(1, places, True))
    check_finite(tokens, seeds, labels)
    return tokens


def check_finite(values: Float[Tensor, "b *_"], seeds: Sequence[int], labels: Sequence[int] | Tensor) -> None:
    """Whether every drawn value is a finite number: one reduction, and one wait for the device.

    Raises:
        ValueError: some are not; the first such image is named.
    """
    finite = values.detach().isfinite().flatten(1).all(dim=1)
    if not finite.all():
        first = int(finite.int().argmin())
        raise ValueError(
            f"the model draws values that are not finite (first: seed {seeds[first]}, class {int(labels[first])}): "
            "its weights are damaged or its training diverged, or this precision is too low for it (try float32)"
        )


def model_contexts(
    model: MAR,
    tokens: Float[Tensor, "b l c"],
    visible: Int[Tensor, "b v"],
    positions: Int[Tensor, "b q"],
    labels: Int[Tensor, " b"],
    guided: bool,
) -> Float[Tensor, "g n d"]:
    """The contexts at `positions`, flattened over the batch: conditional and, when `guided`, null, in one pass."""
    embedding = model.class_embedding(labels)
    if guided:
        embedding = torch.cat([embedding, model.null_embedding(len(labels))])
        tokens, visible, positions = (torch.cat([x, x]) for x in (tokens, visible, positions))
    context = model.context(tokens, visible, positions, embedding)
    return context.unflatten(0, (2 if guided else 1, -1)).flatten(1, 2)
