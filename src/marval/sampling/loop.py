"""The AR loop over tokens (MAR, section 3.3), which teacher and student share."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from marval.model import MAR
from marval.runtime.rng import Seeds, generator, image_seeds
from marval.sampling.draw import DrawTokens, guidance_at
from marval.sampling.fast import prepare_for_drawing
from marval.sampling.orders import Orders, draw_counts, drawing_orders

Hook = Callable[[int, Float[Tensor, "b l c"], Bool[Tensor, "b l"]], None]


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
    model = prepare_for_drawing(model, len(start.counts) * draw_tokens.noise_draws)

    def iterate(tokens: Tensor, visible: Tensor, positions: Tensor, guidance: float) -> Tensor:
        # A region of its own in every iteration: autocast's cache must not keep what was cast without gradients.
        with torch.autocast(tokens.device.type, torch.bfloat16) if autocast else contextlib.nullcontext():
            context = model_contexts(model, tokens, visible, positions, labels, guided=draw_tokens.guidance != 1.0)
        context = context.float() if autocast else context
        index = positions[..., None].expand(-1, -1, config.token_dim)
        local_noise = start.noise.gather(2, index.expand(len(start.noise), -1, -1, -1)).flatten(1, 2)
        null = context[1] if len(context) > 1 else None
        drawn = draw_tokens(model.head, context[0], null, guidance, local_noise)
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
