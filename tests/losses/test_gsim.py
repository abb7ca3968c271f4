"""GSIM's losses: their identities, where gradients flow, and that they move a student onto a guided teacher."""

import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from marval.config import Objective
from marval.losses.gsim import (
    HUBER_RADIUS,
    gsim_terms,
    phi_loss,
    pseudo_huber,
    squared,
    theta_loss,
)
from marval.model import NoiseSchedule
from marval.model.head import timestep_features
from marval.runtime.rng import generator
from marval.sampling import guided_eps

FULL = NoiseSchedule.full()
OBJECTIVES = get_args(Objective)
seeds = st.integers(0, 10_000)


def randn(*shape, seed, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def predictions(seed, n=32, c=5):
    """A teacher's, phi's and the true noise, in float64."""
    return randn(n, c, seed=seed), randn(n, c, seed=seed + 1), randn(n, c, seed=seed + 2)


# --- identities ---


@settings(deadline=None, max_examples=30)
@given(seed=seeds, weight=st.sampled_from([-0.4, -0.2, 0.0, 1.0, 2.0]), t=st.integers(20, 980))
def test_squared_distance_gives_sids_loss(seed, weight, t):
    """SiD (Zhou et al. 2024): `(1 - alpha) |f_T - f_phi|^2 + (f_T - f_phi)^T (f_phi - x_0)`, where `f` predicts x_0.

    A gap between predictions of x_0 is -sigma / a times that of noise; the factor 2 comes from `d'(y) = 2 y`.
    """
    alpha = 1 - weight / 2
    teacher_eps, phi_eps, eps = predictions(seed)
    a, sigma = FULL.alpha[t].double(), FULL.sigma[t].double()
    x_0 = randn(32, 5, seed=seed + 3)
    x_t = a * x_0 + sigma * eps
    f_teacher, f_phi = (x_t - sigma * teacher_eps) / a, (x_t - sigma * phi_eps) / a
    gap = f_teacher - f_phi
    sid = (1 - alpha) * gap.square().sum(1) + (gap * (f_phi - x_0)).sum(1)
    l1, l2 = gsim_terms(teacher_eps, phi_eps, eps, squared)
    found = l1 + weight * l2
    torch.testing.assert_close(found, 2 * (a / sigma) ** 2 * sid, rtol=1e-6, atol=1e-6)


@settings(deadline=None, max_examples=30)
@given(seed=seeds, scale=st.sampled_from([1.0, 1e-3, 1e-5, 1e-7]))
def test_pseudo_huber_terms_sum_to_the_teachers_projection_within_r(seed, scale):
    """`L1 + L2 = -d'(y)^T (s_T - grad log p)`, also for gaps `y` around the radius r."""
    teacher_eps, gap, eps = predictions(seed)
    phi_eps = teacher_eps - scale * gap
    l1, l2 = gsim_terms(teacher_eps, phi_eps, eps)
    y = teacher_eps - phi_eps
    slope = y / (y.square().sum(1, keepdim=True) + HUBER_RADIUS**2).sqrt()
    expected = -(slope * (eps - teacher_eps)).sum(1)
    # d(y) falls short of d'(y)^T y by r - r^2 / root, which lies between 0 and r
    shortfall = expected - (l1 + l2)
    assert shortfall.min() >= -1e-12
    assert shortfall.max() <= HUBER_RADIUS + 1e-12


@pytest.mark.parametrize("distance", [pseudo_huber, squared])
@pytest.mark.parametrize("scale", [1.0, 1e-5, 1e-6])
def test_returned_gradients_of_the_distances_equal_autograds(distance, scale):
    y = (scale * randn(32, 5, seed=0)).requires_grad_(True)
    value, slope = distance(y)
    (expected,) = torch.autograd.grad(value.sum(), y)
    torch.testing.assert_close(slope, expected, rtol=1e-9, atol=1e-15)


def test_named_objectives_are_their_terms():
    teacher_eps, phi_eps, eps = predictions(0)
    y = teacher_eps - phi_eps
    unit = y / (y.square().sum(1, keepdim=True) + HUBER_RADIUS**2).sqrt()
    distance = (y.square().sum(1) + HUBER_RADIUS**2).sqrt() - HUBER_RADIUS
    projected = -(unit * (eps - phi_eps)).sum(1)
    expected = {
        "gsim": projected + distance,
        "sim": projected,
        "sid": -2 * (y * (eps - phi_eps)).sum(1) - 0.2 * y.square().sum(1),  # twice SiD's with alpha = 1.1
    }
    assert set(expected) == set(OBJECTIVES)
    for objective, per_token in expected.items():
        loss, *_ = theta_loss(objective, teacher_eps, phi_eps, eps)
        torch.testing.assert_close(loss, per_token.mean(), rtol=1e-9, atol=1e-12)


# --- Gaussians, whose scores are known ---


def gaussian_eps(x_t, t, mean, std):
    """The exact `E[eps | x_t]` where `x_0` is normal with `mean` and standard deviation `std`."""
    alpha, sigma = FULL.alpha[t, None].double(), FULL.sigma[t, None].double()
    return sigma * (x_t - alpha * mean) / ((alpha * std) ** 2 + sigma**2)


def noised(x_0, seed):
    """Noisy tokens as in a step of theta: `x_t`, the levels and the noise."""
    rng = torch.Generator().manual_seed(seed)
    t = torch.randint(20, 981, (len(x_0),), generator=rng)
    eps = torch.randn(x_0.shape, generator=rng, dtype=torch.float64)
    return FULL.alpha[t, None].double() * x_0 + FULL.sigma[t, None].double() * eps, t, eps


def standard_errors_from_zero(values):
    """How many standard errors the mean over the rows lies from 0, for each column."""
    return values.mean(0) / (values.std(0) / len(values) ** 0.5)


@pytest.mark.parametrize("dimensions", [1, 2])
@pytest.mark.parametrize("distance", [pseudo_huber, squared])
def test_l1_is_zero_on_average_when_phi_is_exact_and_only_then(dimensions, distance):
    mean, std, tokens = 0.7, 0.4, 100_000
    x_t, t, eps = noised(mean + std * randn(tokens, dimensions, seed=0), seed=1)
    teacher_eps = gaussian_eps(x_t, t, mean - 0.5, 2 * std)

    def deviation(phi_eps):
        return standard_errors_from_zero(gsim_terms(teacher_eps, phi_eps, eps, distance)[0][:, None]).item()

    assert abs(deviation(gaussian_eps(x_t, t, mean, std))) < 4
    assert abs(deviation(gaussian_eps(x_t, t, mean - 0.1, std))) > 8  # stale


def student_gradients(objective, mean, std, teacher_mean, teacher_std, tokens=40_000, channels=4):
    """Per-token gradients by the student's mean and scale, `x_0 = mean + std z`, with both scores exact."""
    z = randn(tokens, channels, seed=0)
    x_0 = (mean + std * z).requires_grad_(True)
    x_t, t, eps = noised(x_0, seed=1)
    teacher_eps, phi_eps = gaussian_eps(x_t, t, teacher_mean, teacher_std), gaussian_eps(x_t, t, mean, std)
    loss, *_ = theta_loss(objective, teacher_eps, phi_eps, eps)
    (gradient,) = torch.autograd.grad(loss * tokens, x_0)
    return torch.stack([gradient.mean(1), (gradient * z).mean(1)], dim=1)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_descent_moves_a_shifted_and_a_scaled_student_to_the_teacher_and_leaves_it_there(objective):
    gradients = student_gradients(objective, 0.5, 0.8, 0.5, 0.8)
    assert (gradients.mean(0).abs() < 4 * gradients.std(0) / len(gradients) ** 0.5 + 1e-6).all()
    for side in (-1, 1):
        shifted = student_gradients(objective, 0.5 + 0.4 * side, 0.8, 0.5, 0.8)
        scaled = student_gradients(objective, 0.5, 0.8 * 1.5**side, 0.5, 0.8)
        assert side * standard_errors_from_zero(shifted)[0] > 8
        assert side * standard_errors_from_zero(scaled)[1] > 8


def test_gradient_of_l1_is_that_of_the_distance_through_the_students_score():
    """Score implicit matching (Luo et al. 2024, theorem 3.1): theta enters `E[d(y)]` through its score alone."""
    mean, std = 1.0, 0.6
    found = student_gradients("sim", mean, std, 0.5, 0.8, tokens=100_000)
    parameters = torch.tensor([mean, std], dtype=torch.float64, requires_grad=True)
    x_t, t, _ = noised(mean + std * randn(100_000, 4, seed=0), seed=1)
    gap = gaussian_eps(x_t, t, 0.5, 0.8) - gaussian_eps(x_t, t, parameters[0], parameters[1])
    (expected,) = torch.autograd.grad(pseudo_huber(gap)[0].mean(), parameters)
    found = found * 4  # the sum over channels, not their mean
    error = (found.mean(0) - expected).abs()
    assert (error < 4 * found.std(0) / len(found) ** 0.5).all()
    assert (expected.abs() > 20 * found.std(0) / len(found) ** 0.5).all()  # so the check has teeth


# --- a toy that must learn ---

RING = torch.tensor([[math.cos(k * math.pi / 3), math.sin(k * math.pi / 3)] for k in range(6)])
RING_STD = 0.15
GUIDANCE = 1.5


def mixture_eps(x_t, alpha, sigma, means):
    """The exact `E[eps | x_t]` of an even mixture of Gaussians."""
    variance = (alpha * RING_STD) ** 2 + sigma**2
    differences = x_t[:, None] - alpha[:, None] * means
    weights = (-differences.square().sum(-1) / (2 * variance)).softmax(dim=1)
    return sigma * (weights[..., None] * differences).sum(1) / variance


def ring_teacher(x_t, alpha, sigma):
    """Guided: the class is two of six Gaussians on a ring, the null class is all of them."""
    return guided_eps(torch.stack([mixture_eps(x_t, alpha, sigma, means) for means in (RING[:2], RING)]), GUIDANCE)


def ring_teacher_samples(count, seed):
    """Ancestral sampling with 100 steps."""
    schedule, rng = NoiseSchedule.respaced(100), generator("ring", seed)
    x_t = torch.randn(count, 2, generator=rng)
    for i in reversed(range(100)):
        alpha, sigma = (table[i].expand(count, 1) for table in (schedule.alpha, schedule.sigma))
        x_0 = schedule.x0_from_eps(x_t, ring_teacher(x_t, alpha, sigma), i)
        x_t = schedule.posterior_mean(x_0, x_t, i)
        if i > 0:
            x_t = x_t + (0.5 * schedule.log_posterior_variance[i]).exp() * torch.randn(count, 2, generator=rng)
    return x_t


def energy_distance(a, b):
    """Unbiased: 0 on average for samples of one distribution."""

    def within(x):
        return torch.cdist(x, x).sum() / (len(x) * (len(x) - 1))

    return (2 * torch.cdist(a, b).mean() - within(a) - within(b)).item()


def small_mlp(inputs, name):
    """A two-layer network with weights of its own."""
    net = nn.Sequential(nn.Linear(inputs, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))
    rng = generator("mlp", name)
    with torch.no_grad():
        for layer in (net[0], net[2], net[4]):
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=rng) / layer.in_features**0.5)
            layer.bias.zero_()
    return net


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_toy_student_learns_the_guided_teacher(objective):
    steps, batch, learning_rate = 600, 256, 2e-3
    rng = generator("toy")
    student, phi = small_mlp(2, "student"), small_mlp(2 + 16, "phi")
    student_optimizer = torch.optim.Adam(student.parameters(), learning_rate, (0.0, 0.999))
    phi_optimizer = torch.optim.Adam(phi.parameters(), 2 * learning_rate, (0.0, 0.999))

    def phi_eps(x_t, t):
        return phi(torch.cat([x_t, timestep_features(t.float(), 16)], dim=1))

    def noise(x_0, low, high):
        t, eps = torch.randint(low, high, (batch,), generator=rng), torch.randn(batch, 2, generator=rng)
        return FULL.add_noise(x_0, eps, t), t, eps

    target, z = ring_teacher_samples(1500, 0), torch.randn(1500, 2, generator=generator("z"))
    assert energy_distance(target, ring_teacher_samples(1500, 1)) < 0.01  # what the distance calls equal

    def distance():
        with torch.no_grad():
            return energy_distance(z + student(z), target)

    start = distance()
    for step in range(steps):
        noise_in = torch.randn(batch, 2, generator=rng)
        x_0 = noise_in + student(noise_in)
        if step >= 100:
            student_optimizer.param_groups[0]["lr"] = learning_rate * min(1, 2 * (1 - step / steps))
            phi.requires_grad_(False)
            x_t, t, eps = noise(x_0, 20, 981)
            teacher_eps = ring_teacher(x_t, FULL.alpha[t, None], FULL.sigma[t, None])
            theta_loss(objective, teacher_eps, phi_eps(x_t, t), eps)[0].backward()
            student_optimizer.step()
            student_optimizer.zero_grad()
            phi.requires_grad_(True)
        for _ in range(2):
            x_t, t, eps = noise(x_0.detach(), 0, 1000)
            phi_loss(phi_eps(x_t, t), eps).backward()
            phi_optimizer.step()
            phi_optimizer.zero_grad()
    assert start > 0.3
    assert distance() < start / 10
