"""The diffusion loss of a teacher: its weights of noise levels."""

import pytest
import torch

from marval.losses.denoising import MOST, denoising_loss, level_weights
from marval.model import NoiseSchedule
from marval.runtime.rng import generator
from tiny import tiny_model


def test_weights_of_v_make_the_error_of_eps_that_of_v():
    schedule, head = NoiseSchedule.full(), tiny_model().head
    rng = generator("tokens")
    x_0, eps = torch.randn(2, 64, head.token_dim, generator=rng)
    context = torch.randn(64, 16, generator=rng)
    t = torch.randint(0, 800, (64,), generator=rng)  # where no weight is cut
    weights = level_weights(schedule, "v")
    assert weights.mean().item() == pytest.approx(1)
    assert weights.max() / weights.min() == pytest.approx(MOST, rel=0.01)
    assert weights.diff().min() >= 0
    alpha, sigma = schedule.alpha[t, None], schedule.sigma[t, None]
    x_t = schedule.add_noise(x_0, eps, t)
    predicted = head(x_t, t.float(), context)[:, : head.token_dim]
    v = alpha * predicted - sigma * (x_t - sigma * predicted) / alpha
    expected = (v - (alpha * eps - sigma * x_0)).square().mean(dim=1)
    found = denoising_loss(head, schedule, x_0, context, t, eps, weights)
    torch.testing.assert_close(found / expected, (found / expected)[:1].expand(64), rtol=1e-3, atol=0)


def test_errors_of_eps_count_the_same_at_every_level():
    assert level_weights(NoiseSchedule.full(), "eps") is None
