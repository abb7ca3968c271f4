"""The Fréchet distance as an objective: its value, and its gradient against autograd through a plain implementation."""

import pytest
import torch

from marval.evaluate.features import Statistics
from marval.evaluate.features import frechet_distance as measured_distance
from marval.losses.frechet import RIDGE, Moments, frechet_distance, frechet_first_order
from marval.runtime.rng import generator

WIDTH, WEIGHT = 7, 0.03  # of the features, and of the batch in the moments
REAL = torch.linspace(2.0, 0.01, WIDTH, dtype=torch.float64)


def randn(*shape, seed):
    return torch.randn(shape, generator=generator("frechet", seed), dtype=torch.float64)


def root_of(matrix):
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.sqrt()) @ vectors.mT


def plain_distance(mean, covariance, real):
    """Between Gaussians, by square roots of matrices."""
    root = root_of(real)
    between = root_of(root @ covariance @ root)
    return mean.square().sum() + torch.trace(covariance) + torch.trace(real) - 2 * torch.trace(between)


def mixed(features, old):
    """Mean and covariance of old images and a batch that has `WEIGHT`."""
    parts = ((old, 1 - WEIGHT), (features, WEIGHT))
    mean = sum(share * x.mean(dim=0) for x, share in parts)
    products = sum(share * x.mT @ x / len(x) for x, share in parts)
    return mean, products - mean[:, None] * mean


def moments(features, old, size):
    mean, covariance = mixed(features, old)
    return Moments(mean, covariance[:size, :size], covariance.diagonal()[size:])


@pytest.mark.parametrize("size", [WIDTH, 4])
@pytest.mark.parametrize("images", [200, 3])  # old ones: enough, and fewer than features
def test_the_gradient_is_that_of_the_distance_without_a_gradient_through_a_decomposition(size, images):
    old, features = 0.7 * randn(images, WIDTH, seed=0) + 0.4, randn(5, WIDTH, seed=1).requires_grad_(True)
    drawn = moments(features.detach(), old, size)
    values = frechet_first_order(features, drawn, frechet_distance(drawn, REAL))
    (found,) = torch.autograd.grad(values.mean() * WEIGHT, features)

    mean, covariance = mixed(features, old)
    covariance, target = covariance + RIDGE * REAL.diag(), (1 + RIDGE) * REAL
    first = plain_distance(mean[:size], covariance[:size, :size], target[:size].diag())
    others = [
        plain_distance(mean[i : i + 1], covariance[i, i].view(1, 1), target[i].view(1, 1)) for i in range(size, WIDTH)
    ]
    (expected,) = torch.autograd.grad(first + sum(others), features)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9 * float(expected.abs().max()))


def test_the_value_is_the_distance_that_is_measured():
    real, drawn = randn(500, WIDTH, seed=2), 0.8 * randn(400, WIDTH, seed=3) + 0.2
    statistics = Statistics.of([real])
    values, axes = torch.linalg.eigh(statistics.covariance)
    y = (drawn - statistics.mean) @ axes
    at = frechet_distance(here := Moments(y.mean(dim=0), y.mT.cov(), torch.zeros(0)), values)
    assert float(at.distance) == pytest.approx(measured_distance(drawn, statistics), rel=2 * RIDGE)
    assert float(frechet_first_order(y, here, at).mean()) == pytest.approx(float(at.distance), rel=0.01)


@pytest.mark.parametrize("size", [WIDTH, 4])
def test_equal_moments_have_no_distance_and_no_gradient(size):
    real = REAL * (REAL > 0.5)  # some directions in which no real image differs from another
    equal = Moments(torch.zeros(WIDTH, dtype=torch.float64), real[:size].diag(), real[size:])
    at = frechet_distance(equal, real)
    assert float(at.distance) == pytest.approx(0, abs=1e-6)
    slope = torch.cat([at.slopes.covariance.diagonal(), at.slopes.others])
    assert slope[real > 0].abs().max() < 1e-6
    assert torch.equal(
        slope[real == 0], torch.ones(int((real == 0).sum()), dtype=torch.float64)
    )  # variance costs there
