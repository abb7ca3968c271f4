"""The noise schedule against diffusers' DDPMScheduler, against closed forms, and against itself."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from marval.config import Chain
from marval.model import NoiseSchedule, TokenHead
from marval.model.diffusion import cosine_alpha_bars, respaced_timesteps
from marval.sampling import DrawByChain

FULL = NoiseSchedule.full()
TOKENS, CHANNELS = 6, 3


def relative_error(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


def randn(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run_chain(outputs, noise):
    """The teacher's chain with a head that answers `outputs` step by step: the `x_t` it is shown, and its result."""
    steps, width = len(outputs), 4
    learned = outputs.shape[-1] > CHANNELS
    head = TokenHead(CHANNELS, 2, width, 1, learned)
    shown = []

    def denoise(x_t, y):
        shown.append(x_t)
        return outputs[len(shown) - 1][None]

    head.denoise = denoise
    result = DrawByChain(Chain(diffusion_steps=steps))(head, torch.zeros(1, TOKENS, 2), 1.0, noise)
    return [*shown, result]


@pytest.mark.parametrize("variance_type", ["learned_range", "fixed_small"])
@pytest.mark.parametrize("steps", [10, 100])
def test_every_step_of_the_chain_equals_diffusers(steps, variance_type, monkeypatch):
    import diffusers
    from diffusers.schedulers import scheduling_ddpm as module

    scheduler = diffusers.DDPMScheduler(
        1000, beta_schedule="squaredcos_cap_v2", variance_type=variance_type, clip_sample=False,
        timestep_spacing="linspace",
    )  # fmt: skip
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.flip(0).tolist() == respaced_timesteps(steps).tolist()

    channels = 2 * CHANNELS if variance_type == "learned_range" else CHANNELS
    outputs = randn(steps, TOKENS, channels, seed=steps).clamp(-1, 1)
    noise = randn(steps, TOKENS, CHANNELS, seed=steps + 1)
    step_noise = iter(noise[1:])
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: next(step_noise))
    expected = [noise[0]]
    for t, output in zip(scheduler.timesteps, outputs, strict=True):
        expected.append(scheduler.step(output, t, expected[-1]).prev_sample)
    assert next(step_noise, None) is None  # diffusers used as many draws as the chain asks for

    found = run_chain(outputs, noise)
    assert len(found) == len(expected) == steps + 1
    for ours, theirs in zip(found, expected, strict=True):
        assert relative_error(ours, theirs) < 4e-5


def test_cosine_alpha_bars_follow_the_squared_cosine_until_the_cap():
    t = torch.arange(1, 981, dtype=torch.float64)  # entry t - 1 is abar after t steps
    cosine = ((t / 1000 + 0.008) / 1.008 * math.pi / 2).cos() ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    alpha_bars = cosine_alpha_bars()
    torch.testing.assert_close(alpha_bars[:980], cosine, rtol=1e-9, atol=0)
    ratios = alpha_bars[1:] / alpha_bars[:-1]
    assert (ratios >= 0.001 - 1e-12).all()  # beta <= 0.999, also at the very end
    assert abs(ratios[-1].item() - 0.001) < 1e-9


@pytest.mark.parametrize("schedule", [FULL, NoiseSchedule.respaced(100), NoiseSchedule.respaced(10)])
def test_posterior_variance_and_beta_equal_their_closed_forms(schedule):
    abar = cosine_alpha_bars()[schedule.timesteps]
    beta = 1 - abar[1:] / abar[:-1]
    variance = beta * (1 - abar[:-1]) / (1 - abar[1:])
    torch.testing.assert_close(schedule.log_posterior_variance[1:].double(), variance.log(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(schedule.log_beta[1:].double(), beta.log(), rtol=1e-6, atol=1e-6)
    assert schedule.log_posterior_variance[0] == schedule.log_posterior_variance[1]


def test_posterior_mean_is_the_precision_weighted_mean():
    """`q(x_s | x_t, x_0)` is the product of `N(x_s; alpha_s x_0, sigma_s^2)` and `N(x_t; a x_s, beta)`, by Bayes."""
    schedule = NoiseSchedule.respaced(20)
    x_0, x_t = randn(5, 3, seed=0).double(), randn(5, 3, seed=1).double()
    abar = cosine_alpha_bars()[schedule.timesteps]
    for i in range(1, 20):
        a, prior_variance = (abar[i] / abar[i - 1]).sqrt(), 1 - abar[i - 1]
        beta = 1 - a**2
        precision = 1 / prior_variance + a**2 / beta
        expected = (abar[i - 1].sqrt() * x_0 / prior_variance + a * x_t / beta) / precision
        torch.testing.assert_close(schedule.posterior_mean(x_0, x_t, i), expected, rtol=1e-4, atol=1e-6)


def test_variance_channel_spans_the_posterior_variance_and_beta():
    channel = torch.tensor([[-1.0, 0.0, 1.0]])
    for i in (1, 500, 999):
        low, high = FULL.log_posterior_variance[i], FULL.log_beta[i]
        expected = torch.stack([low, (low + high) / 2, high])[None]
        torch.testing.assert_close(FULL.log_variance(channel, i), expected)
        torch.testing.assert_close(FULL.log_variance(channel, torch.tensor([i])), expected)


def test_noise_is_added_and_removed_at_a_batch_of_levels_as_at_each():
    t, x_0, eps = torch.tensor([0, 20, 755, 990]), randn(4, 3, seed=0), randn(4, 3, seed=1)
    x_t = FULL.add_noise(x_0, eps, t)
    abar = cosine_alpha_bars()[t, None]
    torch.testing.assert_close(x_t.double(), abar.sqrt() * x_0 + (1 - abar).sqrt() * eps, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(FULL.x0_from_eps(x_t, eps, t), x_0, rtol=1e-4, atol=1e-4)
    for convert in (FULL.add_noise, FULL.x0_from_eps, FULL.posterior_mean):
        alone = torch.cat([convert(x_0[i : i + 1], eps[i : i + 1], int(t[i])) for i in range(4)])
        torch.testing.assert_close(convert(x_0, eps, t), alone)


@settings(deadline=None, max_examples=50)
@given(steps=st.integers(2, 1000))
def test_respaced_time_steps_ascend_evenly_and_include_both_ends(steps):
    found = respaced_timesteps(steps)
    assert len(found) == steps
    assert found[0] == 0
    assert found[-1] == 999
    gaps = found.diff()
    assert (gaps >= 1).all()
    assert gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize("steps", [-1, 0, 1, 1001])
def test_impossible_numbers_of_steps_are_rejected(steps):
    with pytest.raises(ValueError, match=f"{steps} diffusion steps.* 2 to 1000"):
        respaced_timesteps(steps)
    with pytest.raises(ValueError, match="from 2 to 1000"):
        DrawByChain(Chain(diffusion_steps=steps))


def test_respacing_to_all_steps_is_the_full_schedule_and_fewer_steps_share_its_levels():
    fewer = NoiseSchedule.respaced(10)
    assert torch.equal(NoiseSchedule.respaced(1000).timesteps, FULL.timesteps)
    for name in ("alpha", "sigma"):
        assert torch.equal(getattr(fewer, name), getattr(FULL, name)[fewer.timesteps])
    torch.testing.assert_close(FULL.alpha**2 + FULL.sigma**2, torch.ones(1000))
    assert abs(FULL.sigma[755] / FULL.alpha[755] - 2.5) < 0.05  # the student's level
