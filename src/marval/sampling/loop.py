"""The AR loop over tokens (MAR, section 3.3), which teacher and student share."""

import collections
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from marval.model import MAR
from marval.model.mar import State
from marval.runtime.philox import standard_normal, stream_keys
from marval.runtime.rng import Seeds, image_seeds
from marval.sampling.draw import DrawTokens, Guidance, guidance_at
from marval.sampling.fast import prepare_for_drawing
from marval.sampling.orders import Orders, draw_counts, drawing_orders


def image_noise(
    seeds: Sequence[int], draws: int, tokens: int, channels: int, device: torch.device | str = "cpu"
) -> Float[Tensor, "s b l c"]:
    """Draw images' noise: a start for each position (the same for every `draws`), then `draws - 1` steps."""
    keys = stream_keys(((seed, "image") for seed in seeds), device)
    return standard_normal(keys, (draws, tokens, channels)).transpose(0, 1)


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
    draw: DrawTokens,
    *,
    iterations: int,
    seeds: Sequence[int],
    orders: Orders = "random",
    known: tuple[Float[Tensor, "b l c"], Bool[Tensor, "b l"]] | None = None,
    noise: Float[Tensor, "s b l c"] | None = None,
) -> Start:
    """Check what is asked for, and bring what the AR loop reads to the model's device.

    Tokens and noise are float32 (float64 with such weights): half precision would spoil the diffusion.

    Args:
        iterations: K, from 1 to the number of tokens to draw.
        seeds: one for each image, which depends on it, its condition and its order, and not on its batch.
        orders: see `drawing_orders`.
        known: tokens and a mask of those to keep (inpainting); every image keeps the same number.
        noise: the Gaussian draws for every position, instead of those that the seeds give.

    Raises:
        ValueError: too many iterations, a bad order, or a bad mask.
    """
    config, device, shape = model.config, model.mask_token.device, (len(seeds), model.config.num_tokens)
    dtype = torch.promote_types(model.mask_token.dtype, torch.float32)
    tokens, shown = torch.zeros(*shape, config.token_dim, device=device, dtype=dtype), 0
    order = drawing_orders(orders, config.token_grid, seeds)
    if known is not None:
        keep = known[1].cpu()
        if keep.shape != shape:
            raise ValueError(f"a mask of shape {tuple(keep.shape)}: expected {shape}, images and tokens")
        shown = int(keep[0].sum())
        if (keep.sum(dim=1) != shown).any():
            raise ValueError("every image of a batch must keep the same number of tokens: draw the others apart")
        order = order.gather(1, keep.gather(1, order).int().argsort(dim=1, descending=True, stable=True))
        tokens = torch.where(keep.to(device)[..., None], known[0].to(tokens), tokens)
        if not tokens.isfinite().all():
            raise ValueError("the known tokens hold values that are not finite: expected the tokens of real images")
    counts = draw_counts(config.num_tokens - shown, iterations)
    if noise is None:
        noise = image_noise(seeds, draw.noise_draws, config.num_tokens, config.token_dim, device)
    return Start(tokens, order.to(device), shown, counts, noise.to(device, dtype))


def run(
    model: MAR,
    draw: DrawTokens,
    condition: Float[Tensor, "b d"],
    start: Start,
    *,
    null_condition: Float[Tensor, "b d"] | None = None,
    guidance: float | Float[Tensor, " b"] | None = None,
    gradient_iterations: int = 0,
    autocast: bool = False,
) -> Iterator[tuple[Float[Tensor, "b l c"], Int[Tensor, "b v"]]]:
    """Run the AR loop; yield the tokens after each iteration, and the positions that are known or drawn.

    It copies nothing between devices and waits for none.

    Args:
        condition: such as `model.embed(labels)`.
        null_condition: what guidance leads away from; the model's own when None.
        guidance: w of all images or of each, where the model takes it; the draw's own when None.
        gradient_iterations: M, the last iterations that gradients flow through; each is checkpointed, so that
            memory holds one iteration's activations at a time (but for a model that recomputes block by block).
        autocast: compute contexts in bf16; the head stays in float32.
    """
    config, tokens, shown = model.config, start.tokens, start.known
    if guidance is not None and not (draw.needs_null or config.guidance_range):
        raise ValueError(f"guidance {guidance}: this model takes none when it draws; expected None")
    guidance = draw.guidance if guidance is None else guidance
    conditions = [condition]
    if draw.needs_null:
        conditions.append(model.null_condition(len(condition)) if null_condition is None else null_condition)
    model = prepare_for_drawing(model, len(start.counts) * draw.noise_draws)
    state, draw_in = model.start(*conditions), draw.bind(model.head)

    def iterate(state: State, tokens: Tensor, visible: Tensor, positions: Tensor, w: Guidance) -> tuple[State, Tensor]:
        index = positions[..., None].expand(-1, -1, tokens.shape[-1])
        noise = start.noise.gather(2, index.expand(len(start.noise), -1, -1, -1))
        joint_noise = draw.joint_noise(noise) if config.joint_draw else None
        # A region of its own in every iteration: autocast's cache must not keep what was cast without gradients.
        with torch.autocast(tokens.device.type, torch.bfloat16) if autocast else contextlib.nullcontext():
            contexts, state = model.advance(state, tokens, visible, positions, noise=joint_noise)
        contexts = contexts.float() if autocast else contexts
        if isinstance(w, Tensor):
            w = w[:, None].expand(positions.shape).flatten()
        drawn = draw_in(contexts, w, noise.flatten(1, 2)).unflatten(0, positions.shape)
        return state, tokens.scatter(1, index, drawn.to(tokens.dtype))

    for k, count in enumerate(start.counts):
        visible = start.order[:, :shown].contiguous()
        positions = start.order[:, shown : shown + count].contiguous()
        shown += count
        # MAR's linear schedule counts one token as hidden in the last iteration.
        w = guidance_at(guidance, draw.guidance_schedule, min(shown, config.num_tokens - 1) / config.num_tokens)
        inputs = (state, tokens, visible, positions, w)
        if k < len(start.counts) - gradient_iterations:
            with torch.no_grad():
                state, tokens = iterate(*inputs)
        elif model.checkpoint_blocks:  # both would compute the context three times
            state, tokens = iterate(*inputs)
        else:
            state, tokens = checkpoint(iterate, *inputs, use_reentrant=False, preserve_rng_state=False)
        yield tokens, start.order[:, :shown]


def sample(
    model: MAR,
    draw: DrawTokens,
    condition: Float[Tensor, "b d"],
    *,
    iterations: int,
    seeds: Seeds,
    guidance: Guidance | None = None,
    gradient_iterations: int = 0,
    autocast: bool = False,
    **settings: Any,
) -> Float[Tensor, "b l c"]:
    """Draw the tokens of a batch of images in `iterations` AR iterations (MAR, algorithm of section 3.3).

    Args:
        seeds: one for each image, or the first image's, from which the next ones count on.
        guidance: see `run`.
        gradient_iterations: see `run`.
        autocast: see `run`.
        settings: `orders`, `known` and `noise`; see `prepare`.

    Raises:
        ValueError: as `prepare`; a wrong number of seeds; or a model that draws values that are not finite.
    """
    seeds = image_seeds(seeds, len(condition))
    start = prepare(model, draw, iterations=iterations, seeds=seeds, **settings)
    how: dict[str, Any] = {"gradient_iterations": gradient_iterations, "autocast": autocast, "guidance": guidance}
    steps = run(model, draw, condition, start, **how)
    ((tokens, _),) = collections.deque(steps, maxlen=1)  # the last iteration's
    check_finite(tokens, [f"seed {seed}" for seed in seeds])
    return tokens


def check_finite(values: Float[Tensor, "b *_"], names: Sequence[str]) -> None:
    """Check that every drawn value is finite: one reduction, and one wait for the device.

    Raises:
        ValueError: some are not; the first such image's name is said.
    """
    finite = values.detach().isfinite().flatten(1).all(dim=1)
    if not finite.all():
        raise ValueError(
            f"the model draws values that are not finite (first: {names[int(finite.int().argmin())]}): its weights are "
            "damaged or its training diverged, or this precision is too low for it (try float32)"
        )
