"""The energy score is least where a student draws what the teacher draws, in mean, spread and number of modes."""

import pytest
import torch

from marval.losses.energy import energy_score
from marval.runtime.rng import generator


def randn(*shape, seed):
    return torch.randn(shape, generator=generator("energy", seed), dtype=torch.float64)


def expected_score(samples, targets):
    return energy_score(samples, targets).mean().item()


@pytest.mark.parametrize("samples", [2, 5])
def test_the_score_is_what_its_formula_says(samples):
    x, y = randn(samples, 7, 3, seed=0), randn(7, 3, seed=1)
    for token in range(7):
        near = sum((x[i, token] - y[token]).norm() for i in range(samples)) / samples
        pairs = [(i, j) for i in range(samples) for j in range(samples) if i != j]
        apart = sum((x[i, token] - x[j, token]).norm() for i, j in pairs) / len(pairs)
        assert energy_score(x, y)[token].item() == pytest.approx((near - apart / 2).item(), abs=1e-6)


@pytest.mark.parametrize("change", [lambda x: x + 0.3, lambda x: 0.7 * x, lambda x: 1.3 * x, lambda x: 0 * x])
def test_no_other_distribution_has_a_smaller_score(change):
    y, x = randn(100_000, 2, seed=2), randn(3, 100_000, 2, seed=3)
    assert expected_score(x, y) < expected_score(change(x), y) - 0.01


def test_it_finds_both_modes_where_the_mean_would_be_between_them():
    """A generator of two numbers, started near one mode, by gradients of the score alone."""
    rng, weights = generator("modes"), torch.tensor([1.0, 0.1], dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([weights], 0.02)
    for _ in range(400):
        y = torch.randint(2, (512, 1), generator=rng).double() * 2 - 1  # -1 or 1
        x = weights[0] + weights[1] * (torch.randint(2, (4, 512, 1), generator=rng).double() * 2 - 1)
        adam.zero_grad()
        energy_score(x, y).mean().backward()
        adam.step()
    assert abs(weights[0].item()) < 0.05
    assert abs(weights[1].abs().item() - 1) < 0.05


def test_two_equal_samples_have_a_gradient():
    x = torch.zeros(2, 1, 3, requires_grad=True)
    energy_score(x, torch.zeros(1, 3)).sum().backward()
    assert x.grad.isfinite().all()
