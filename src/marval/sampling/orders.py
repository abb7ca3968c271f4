"""The order in which an image's tokens are drawn, and how many of them in each AR iteration."""

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Int, Integer
from torch import Tensor

from marval.runtime.rng import generator

OrderFunction = Callable[[tuple[int, int], int], Int[Tensor, " l"]]
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
