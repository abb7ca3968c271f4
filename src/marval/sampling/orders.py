"""The order in which an image's tokens are drawn, and how many of them in each AR iteration."""

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Int, Integer
from torch import Tensor

from marval.runtime.philox import random_words, stream_keys

OrderFunction = Callable[[tuple[int, int], int], Int[Tensor, " l"]]  # of the grid and an image's seed
Orders = str | Integer[Tensor, "..."] | OrderFunction  # positions (L,) or (B, L)


def draw_counts(tokens: int, iterations: int) -> list[int]:
    """Count how many of `tokens` each AR iteration draws: cosine schedule, at least one each (MaskGIT; MAR, section 4).

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


def raster_orders(grid: tuple[int, int], seeds: Sequence[int]) -> Int[Tensor, "b l"]:
    """Row by row."""
    return torch.arange(math.prod(grid)).expand(len(seeds), -1)


def random_orders(grid: tuple[int, int], seeds: Sequence[int]) -> Int[Tensor, "b l"]:
    """A random permutation for each image."""
    return _priorities(grid, seeds).argsort(dim=1, stable=True)


def _priorities(grid: tuple[int, int], seeds: Sequence[int]) -> Int[Tensor, "b l"]:
    """Draw a number below 2^32 for every position of every image."""
    return random_words(stream_keys((seed, "order") for seed in seeds), math.prod(grid))


def halton_orders(grid: tuple[int, int], seeds: Sequence[int]) -> Int[Tensor, "b l"]:
    """Spread out evenly: the Halton sequence in bases 2 and 3 (Besnier et al. 2025), the same for every image."""
    return torch.tensor(_halton(grid)).expand(len(seeds), -1)


@functools.cache
def _halton(grid: tuple[int, int]) -> list[int]:
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
    return list(order)


@functools.cache
def nearness(grid: tuple[int, int]) -> np.ndarray:
    """`1 / distance^4` between any two positions of a grid (0 for a position and itself)."""
    places = np.moveaxis(np.indices(grid), 0, -1).reshape(-1, 2)
    squares = np.square(places[:, None] - places).sum(axis=-1)
    return np.where(squares > 0, 1.0 / np.maximum(squares, 1) ** 2, 0.0)


def spread_orders(grid: tuple[int, int], seeds: Sequence[int]) -> Int[Tensor, "b l"]:
    """Random, but a position waits while those beside it have just been drawn.

    Tokens of one iteration are drawn independently of each other, so neighbours drawn together need not agree where
    they meet. Greedy: the next position has the smallest sum of its random priority in [0, 1] and half its nearness to
    those drawn before, each of which counts 0.8 times as much at every step (weights by measurement, at K = 8).
    """
    near, images = nearness(grid), np.arange(len(seeds))
    priority = _priorities(grid, seeds).numpy() / 2**32
    crowding, order = np.zeros_like(priority), np.zeros_like(priority, dtype=np.int64)
    for step in range(len(near)):
        position = (priority + 0.5 * crowding).argmin(axis=1)
        order[:, step] = position
        priority[images, position] = np.inf
        crowding = 0.8 * crowding + near[position]
    return torch.from_numpy(order)


ORDERS: dict[str, Callable[[tuple[int, int], Sequence[int]], Int[Tensor, "b l"]]] = {
    "random": random_orders, "raster": raster_orders, "halton": halton_orders, "spread": spread_orders,
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
        return ORDERS[orders](grid, seeds)
    rows = orders if isinstance(orders, Tensor) else torch.stack([orders(grid, seed) for seed in seeds])
    whole = not (rows.is_floating_point() or rows.is_complex() or rows.dtype == torch.bool)
    found = rows.to("cpu", torch.int64) if whole and rows.shape in ((count,), (len(seeds), count)) else None
    if found is None or not torch.equal(found.sort(dim=-1).values, torch.arange(count).expand_as(found)):
        raise ValueError(
            f"an order must name each of the {count} positions once, in whole numbers of shape ({count},) or "
            f"({len(seeds)}, {count}): this one has shape {tuple(rows.shape)} and {rows.dtype}"
        )
    return found.expand(len(seeds), count)
