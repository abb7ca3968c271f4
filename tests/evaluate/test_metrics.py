"""Figures of features against float64 references (numpy, scipy) and known answers."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from marval.data import load_fashion_sample
from marval.evaluate.features import (
    RealSample,
    Statistics,
    diversity_within_class,
    extract,
    frechet_distance,
    kernel_distance,
    precision_and_recall,
)
from marval.rewards.efficientnet import EfficientNetFeatures
from marval.runtime.rng import generator


def reference_kid(x, y):
    """The unbiased estimate of MMD^2 under (x.y / d + 1)^3, in numpy's float64."""
    n, m, d = len(x), len(y), x.shape[1]
    kernel = lambda a, b: (a @ b.T / d + 1) ** 3  # noqa: E731
    xx, yy, xy = kernel(x, x), kernel(y, y), kernel(x, y)
    within = (xx.sum() - np.trace(xx)) / (n * (n - 1)) + (yy.sum() - np.trace(yy)) / (m * (m - 1))
    return within - 2 * xy.mean()


def figures_between(drawn, real):
    return precision_and_recall(drawn, RealSample.of(real))


@pytest.mark.parametrize("count", [300, 9])  # more and fewer images than features
def test_frechet_distance_equals_scipy_in_float64(count):
    rng = np.random.default_rng(0)
    real, drawn = rng.normal(size=(500, 12)), rng.normal(size=(count, 12)) @ rng.normal(size=(12, 12)) + 0.3
    difference = real.mean(0) - drawn.mean(0)
    first, second = np.cov(real, rowvar=False), np.cov(drawn, rowvar=False)
    root = scipy.linalg.sqrtm(first @ second + 1e-14 * np.eye(12)).real
    expected = difference @ difference + np.trace(first + second - 2 * root)
    statistics = Statistics.of(torch.from_numpy(real).split(70))
    found = frechet_distance(torch.from_numpy(drawn), statistics)
    assert found == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(torch.from_numpy(real), statistics) == pytest.approx(0, abs=1e-6)


def test_features_tell_real_images_from_blurred_ones_and_noise():
    network, some = EfficientNetFeatures(), load_fashion_sample().images
    real = Statistics.of([extract(network, some[::5])])
    images = some[1::10]
    blurred = torch.nn.functional.avg_pool2d(images.float(), 5, 1, 2).byte()
    noise = torch.randint(0, 256, images.shape, generator=generator("noise"), dtype=torch.uint8)
    distances = [frechet_distance(extract(network, x), real) for x in (images, blurred, noise)]
    assert distances[0] * 1.5 < distances[1]
    assert distances[1] * 1.5 < distances[2]


def test_diversity_is_the_mean_distance_within_a_class_over_every_image():
    features = torch.tensor([[0.0, 0.0], [3.0, 4.0], [10.0, 0.0], [10.0, 1.0]])
    assert diversity_within_class(features, torch.tensor([0, 0, 1, 1])) == pytest.approx((5 + 1) / 2)
    assert diversity_within_class(features, torch.tensor([0, 0, 1, 2])) == pytest.approx(5)  # one image has no pair
    assert math.isnan(diversity_within_class(features, torch.tensor([0, 1, 2, 3])))
    many = torch.randn(2300, 3, generator=generator("rows"))  # more rows than are done at a time
    many[:400] = 0  # those of the first images alone are alike
    expected = float(torch.pdist(many.double()).mean())
    assert diversity_within_class(many, torch.zeros(2300)) == pytest.approx(expected, rel=1e-9)
    assert diversity_within_class(torch.full((50, 3), 7.1), torch.zeros(50)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("counts", [(120, 120), (1100, 70), (30, 1500)])  # fewer and more rows than are done at a time
def test_kid_equals_a_float64_reference(counts):
    rng = np.random.default_rng(0)
    drawn, real = 1.2 * rng.normal(size=(counts[0], 9)) + 0.3, rng.normal(size=(counts[1], 9))
    found = kernel_distance(torch.from_numpy(drawn), RealSample.of(torch.from_numpy(real)))
    assert found == pytest.approx(reference_kid(drawn, real), rel=1e-6)


def test_kid_is_unbiased_where_a_frechet_distance_is_not():
    """Two samples of one distribution: 0 on average at any number of images, so sometimes below it."""
    rng = np.random.default_rng(2)
    pairs = [(rng.normal(size=(40, 6)), rng.normal(size=(90, 6))) for _ in range(60)]
    found = np.array([kernel_distance(torch.from_numpy(x), RealSample.of(torch.from_numpy(y))) for x, y in pairs])
    assert abs(found.mean()) < 3 * found.std() / len(found) ** 0.5
    assert found.min() < 0 < found.max()


def test_precision_asks_whether_drawn_images_are_real_and_recall_whether_real_ones_are_drawn():
    rng = generator("two islands")
    here, there = torch.randn(40, 4, generator=rng), torch.randn(40, 4, generator=rng) + 100
    both, one = torch.cat([here, there]), torch.randn(60, 4, generator=rng) * 0.5
    precision, recall = figures_between(one, both)  # draws one of the two kinds, and draws it well
    assert precision > 0.95
    assert recall <= 0.5
    precision, recall = figures_between(both, one)  # half of what it draws is of no kind
    assert precision <= 0.5
    assert recall > 0.95
    assert figures_between(both, both) == (1.0, 1.0)


def test_precision_and_recall_equal_their_definitions_in_numpy():
    rng = np.random.default_rng(1)
    real, drawn = rng.normal(size=(1100, 3)), 0.8 * rng.normal(size=(70, 3)) + 0.2  # more rows than are done at a time
    between = np.linalg.norm(drawn[:, None] - real[None], axis=2)

    def radius(x):
        return np.sort(np.linalg.norm(x[:, None] - x[None], axis=2), axis=1)[:, 3]

    expected = (between <= radius(real)).any(axis=1).mean(), (radius(drawn) >= between.T).any(axis=1).mean()
    assert figures_between(torch.from_numpy(drawn), torch.from_numpy(real)) == pytest.approx(expected, abs=1e-9)
