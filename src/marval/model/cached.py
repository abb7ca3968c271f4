"""A context that is computed once: MAR's network with block-causal attention, and a cache of keys and values.

A token reads the buffer and what was revealed before it or together with it, and is computed once. A mask token reads
all that is revealed and those that are drawn together with it; other hidden positions have none. So an image costs
the same at any K. Any order, any visible part and any K stay possible, as in ARPG (Li et al. 2025, arXiv 2503.10568).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from marval.model.blocks import KeyValues, gather_rows

if TYPE_CHECKING:
    from marval.model.mar import MAR


class Groups(NamedTuple):
    """What is drawn together: the sizes of the groups of new visible tokens, in turn, and of those of hidden tokens.

    The groups of hidden tokens do not see each other: each is what could be drawn next.
    """

    visible: Sequence[int]
    hidden: Sequence[int]


class Cache(NamedTuple):
    """The state of images: their conditions, how many tokens were read, and the keys and values of every layer.

    Without gradients, the next state is written into the same memory: go on from the newest alone.
    """

    conditions: Float[Tensor, "g b d"]
    read: int = 0
    layers: tuple[KeyValues, ...] = ()  # of the encoder, then of the decoder; none before the first call


def advance(
    model: "MAR",
    cache: Cache,
    tokens: Float[Tensor, "n l c"],
    visible: Int[Tensor, "n v"],
    positions: Int[Tensor, "n q"],
    groups: Groups | None = None,
    noise: Float[Tensor, "n q c"] | None = None,
) -> tuple[Float[Tensor, "n q e"], Cache]:
    """`MAR.advance` with a cache, of n = g b rows; all groups that are new in `visible` are read in one pass."""
    new, first = visible[:, cache.read :], not cache.layers
    batch, hidden = positions.shape  # `len` would be a fixed number in an ONNX graph
    depth, buffer = len(model.encoder_blocks), model.config.buffer_size
    groups = groups or Groups([new.shape[1]], [hidden])
    before = 0 if first else buffer + cache.read
    sizes = [buffer if first else 0, *groups.visible]
    room = buffer + model.config.num_tokens
    past = cache.layers or (KeyValues(room),) * (depth + len(model.decoder_blocks))
    layers = list[KeyValues]()

    x = model.embed_tokens(tokens, new, cache.conditions.flatten(0, 1) if first else None)
    mask = reading_mask(before, sizes, [], x.device)
    for block, known in zip(model.encoder_blocks, past[:depth], strict=True):
        x, known = model.run(block, x, None, known, mask)
        layers.append(known)

    x = model.decoder_embed(model.encoder_norm(x))
    places = model.decoder_pos_embed_learned.expand(batch, -1, -1)
    own = gather_rows(places, torch.cat([new, positions], dim=1) + buffer)
    x = torch.cat([x, model.mask_tokens(x, hidden, noise)], dim=1)
    x = x + (torch.cat([places[:, :buffer], own], dim=1) if first else own)
    mask = reading_mask(before, sizes, groups.hidden, x.device)
    for i, (block, known) in enumerate(zip(model.decoder_blocks, past[depth:], strict=True)):
        last = i == len(model.decoder_blocks) - 1  # of which no more than the contexts is needed
        rows, own_mask = (x[:, -hidden:], None if mask is None else mask[-hidden:]) if last else (None, mask)
        x, known = model.run(block, x, rows, known, own_mask)
        layers.append(known._replace(length=known.length - hidden))  # mask tokens are not kept
    x = model.decoder_norm(x)
    x = x + gather_rows(model.diffusion_pos_embed_learned.expand(batch, -1, -1), positions)
    return x, Cache(cache.conditions, visible.shape[1], tuple(layers))


def reading_mask(
    before: int, visible: Sequence[int], hidden: Sequence[int], device: torch.device
) -> Bool[Tensor, "r k"] | None:
    """Which tokens each new one reads, for groups of such sizes; None where it is all.

    That is all earlier tokens and groups, and its own group: groups of hidden tokens do not see each other.

    Args:
        before: how many tokens were read earlier.
    """
    if sum(size > 0 for size in (*visible, *hidden)) == 1:
        return None
    sizes = (before, *visible, *hidden)
    group = torch.cat([torch.full((size,), i, device=device) for i, size in enumerate(sizes)])
    time = group.clamp(max=1 + len(visible))
    return (time < time[before:, None]) | (group == group[before:, None])
