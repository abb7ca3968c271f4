"""How many tokens each iteration draws, and in which order."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from marval.sampling import ORDERS, draw_counts, drawing_orders

grids = st.tuples(st.integers(1, 9), st.integers(1, 9))


@given(tokens=st.integers(1, 300), data=st.data())
def test_draw_counts_are_positive_and_sum_to_the_tokens(tokens, data):
    iterations = data.draw(st.integers(1, tokens))
    counts = draw_counts(tokens, iterations)
    assert len(counts) == iterations
    assert sum(counts) == tokens
    assert min(counts) >= 1


def test_draw_counts_follow_the_cosine():
    assert draw_counts(256, 1) == [256]
    assert draw_counts(5, 5) == [1, 1, 1, 1, 1]
    # 256 cos(pi/2 k/4) = 236.5, 181.0, 97.97, 0
    assert draw_counts(256, 4) == [256 - 236, 236 - 181, 181 - 97, 97]


@given(tokens=st.integers(0, 50), iterations=st.integers(-3, 60))
def test_impossible_numbers_of_iterations_are_rejected(tokens, iterations):
    assume(not 1 <= iterations <= tokens)
    with pytest.raises(ValueError, match=f"{iterations} iterations for {tokens} tokens"):
        draw_counts(tokens, iterations)


@given(grid=grids, name=st.sampled_from(sorted(ORDERS)), seed=st.integers(0, 100))
def test_named_orders_are_permutations(grid, name, seed):
    rows = drawing_orders(name, grid, [seed, seed + 1])
    assert rows.sort(dim=1).values.tolist() == [list(range(math.prod(grid)))] * 2


@given(grid=grids, seed=st.integers(0, 100))
def test_positions_and_functions_are_orders_too(grid, seed):
    one = torch.randperm(math.prod(grid), generator=torch.Generator().manual_seed(seed))
    assert drawing_orders(one, grid, [0, 1, 2]).tolist() == [one.tolist()] * 3
    rows = torch.stack([one, one.flip(0)])
    assert torch.equal(drawing_orders(rows.to(torch.int16), grid, [0, 1]), rows)
    found = drawing_orders(lambda asked, seed: torch.arange(math.prod(asked)).roll(seed), grid, [0, 1])
    assert torch.equal(found[1], torch.arange(math.prod(grid)).roll(1))


def test_what_each_named_order_is():
    seeds = list(range(4))
    assert drawing_orders("raster", (3, 4), seeds).tolist() == [list(range(12))] * 4
    random = drawing_orders("random", (3, 4), seeds)
    assert len({tuple(row.tolist()) for row in random}) == 4
    assert torch.equal(random[2], drawing_orders("random", (3, 4), [2])[0])
    halton = drawing_orders("halton", (8, 8), seeds)
    assert torch.equal(halton[0], halton[3])
    # The first points of the sequence: (1/2, 1/3), (1/4, 2/3), (3/4, 1/9), (1/8, 4/9).
    assert halton[0, :4].tolist() == [4 * 8 + 2, 2 * 8 + 5, 6 * 8 + 0, 1 * 8 + 3]
    quadrants = (halton[0, :16] // 8 // 4) * 2 + halton[0, :16] % 8 // 4
    assert quadrants.bincount(minlength=4).tolist() == pytest.approx([4, 4, 4, 4], abs=1)


def test_spread_draws_neighbours_in_different_iterations():
    """Far fewer pairs of neighbours in one iteration than random orders have; every image has an order of its own."""
    grid, seeds = (7, 7), range(40)
    places = torch.stack([torch.arange(49) // 7, torch.arange(49) % 7], dim=1).float()
    beside = torch.cdist(places, places) == 1

    def pairs(name):
        orders = drawing_orders(name, grid, seeds)
        return sum(int(beside[part][:, part].sum()) for order in orders for part in order.split(draw_counts(49, 8)))

    assert pairs("spread") < 0.5 * pairs("random")
    assert len({tuple(order.tolist()) for order in drawing_orders("spread", grid, seeds)}) == 40


@pytest.mark.parametrize(
    "orders",
    [
        torch.tensor([0, 1, 2, 2]),
        torch.tensor([0, 1, 2]),
        torch.tensor([1, 2, 3, 4]),
        torch.tensor([[0, 1, 2, 3], [0, 1, 1, 3]]),
        lambda grid, seed: torch.zeros(4, dtype=torch.long),
    ],
)
def test_orders_that_are_no_permutations_are_rejected(orders):
    with pytest.raises(ValueError, match="each of the 4 positions once"):
        drawing_orders(orders, (2, 2), [0, 1])


def test_unknown_orders_are_rejected_with_the_known_names():
    with pytest.raises(ValueError, match=r"'spiral'.*random, raster, halton, spread"):
        drawing_orders("spiral", (2, 2), [0])
