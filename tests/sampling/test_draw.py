"""Drawing a token: the student's one call, the teacher's guided chain, temperature, clips and precision."""

import copy

import pytest
import torch

from marval.config import Chain, LatentSpace, ModelConfig, OneStep
from marval.model import NoiseSchedule
from marval.pipeline import load
from marval.sampling import DrawByChain, DrawInOneStep, guidance_at, guided_eps, sample
from small import CHANNELS, SPACE, randn, small_model

RANGE = SPACE.token_range


def chain(clip=True, **settings):
    return DrawByChain(Chain(**{"diffusion_steps": 6, "clip": clip, **settings}), RANGE)


def test_the_student_is_one_call_of_the_head_at_its_level():
    """`x_0 = (sigma z - sigma eps(sigma z, t*, c)) / alpha`, with the head called in the ordinary way."""
    head, context, z = small_model().head, randn(5, 16), randn(1, 5, CHANNELS, seed=1)
    schedule = NoiseSchedule.full()
    alpha, sigma = schedule.alpha[700], schedule.sigma[700]
    eps = head(sigma * z[0], torch.full((5,), 700.0), context)[:, :CHANNELS]
    expected = sigma * (z[0] - eps) / alpha
    torch.testing.assert_close(DrawInOneStep(OneStep(700))(head, context[None], 1.0, z), expected, rtol=1e-4, atol=1e-4)
    clipped = DrawInOneStep(OneStep(700, clip=True), (-0.5, 0.5))(head, context[None], 1.0, z)
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(clipped, expected.clamp(-0.5, 0.5), rtol=1e-4, atol=1e-4)


def test_guided_prediction():
    conditional, null = randn(3, 4), randn(3, 4, seed=1)
    eps = torch.stack([conditional, null])
    torch.testing.assert_close(guided_eps(eps, 1.0), conditional)
    torch.testing.assert_close(guided_eps(eps, 0.0), null)
    torch.testing.assert_close(guided_eps(eps, 2.5), null + 2.5 * (conditional - null))
    each = guided_eps(eps, torch.tensor([1.0, 0.0, 2.5]))
    assert torch.equal(each, torch.stack([guided_eps(eps, w)[i] for i, w in enumerate((1.0, 0.0, 2.5))]))
    assert torch.equal(guided_eps(conditional[None], 2.5), conditional)


def test_guidance_schedules():
    assert [guidance_at(3.0, "constant", r) for r in (0.0, 0.5, 1.0)] == [3.0, 3.0, 3.0]
    assert [guidance_at(3.0, "linear", r) for r in (0.0, 0.25, 0.5, 1.0)] == [1.0, 1.5, 2.0, 3.0]
    assert guidance_at(1.0, "linear", 0.7) == 1.0


def test_guidance_1_equals_a_chain_without_null_contexts():
    head, contexts, noise = small_model().head, randn(2, 5, 16), randn(6, 5, CHANNELS, seed=1)
    single = chain()(head, contexts[:1], 1.0, noise)
    torch.testing.assert_close(chain()(head, contexts, 1.0, noise), single, rtol=1e-4, atol=1e-4)
    assert (chain()(head, contexts, 2.0, noise) - single).abs().max() > 0.01
    assert (chain().needs_null, chain(guidance=0.0).needs_null, DrawInOneStep().needs_null) == (False, True, False)


@pytest.mark.parametrize("learn_variance", [True, False])
def test_temperature_scales_the_step_noise_and_not_the_start(learn_variance):
    head, contexts = small_model(learn_variance=learn_variance).head, randn(1, 5, 16)
    noise, other = randn(6, 5, CHANNELS, seed=1), randn(6, 5, CHANNELS, seed=2)

    def run(temperature, noise):
        return chain(temperature=temperature)(head, contexts, 1.0, noise)

    mixed, scaled = torch.cat([noise[:1], other[1:]]), torch.cat([noise[:1], 0.7 * noise[1:]])
    assert torch.equal(run(0.0, noise), run(0.0, mixed))
    assert (run(0.0, noise) - run(0.0, other)).abs().max() > 1e-4
    torch.testing.assert_close(run(0.7, noise), run(1.0, scaled), rtol=1e-4, atol=1e-5)
    assert (run(0.7, noise) - run(1.0, noise)).abs().max() > 0.01


def test_clipping_keeps_tokens_in_range_and_is_off_by_default():
    head, contexts, noise = small_model().head, randn(1, 5, 16), randn(6, 5, CHANNELS, seed=1)
    low, high = RANGE
    clipped = chain()(head, contexts, 1.0, noise)
    assert low - 1e-6 <= clipped.min()
    assert clipped.max() <= high + 1e-6
    free = DrawByChain(Chain(diffusion_steps=6))(head, contexts, 1.0, noise)
    assert free.abs().max() > 10 * high  # 1 / alpha is 2e4 at the first step


def test_latents_have_no_range_to_clip_to():
    mar, space = small_model().config, LatentSpace((48, 64), "vae", latent_channels=4)
    for config in (Chain(clip=True), OneStep(clip=True)):
        with pytest.raises(ValueError, match="clip"):
            ModelConfig(mar, space, config, tuple("abcde"), 4)
    saved = ModelConfig(mar, space, Chain(), tuple("abcde"), 4).to_dict()
    saved["draw"] = {**saved["draw"], "clip": True}  # as an older checkpoint may have it
    assert ModelConfig.from_dict(saved).draw == Chain()


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("tokens", [1, 40])
def test_steps_whose_modulations_are_computed_together_are_the_same(tokens, groups, monkeypatch):
    head, draw = small_model().head, chain(diffusion_steps=20)
    contexts, noise = randn(groups, tokens, 16), randn(20, tokens, CHANNELS, seed=1)
    together = draw(head, contexts, 2.0, noise)
    monkeypatch.setattr("marval.sampling.draw.MODULATED_ROWS", 0)
    torch.testing.assert_close(together, draw(head, contexts, 2.0, noise), rtol=0, atol=1e-5)


def test_a_chain_without_a_clip_in_half_precision():
    """The trained teacher, whose tokens nothing clips: bf16 costs less than 1 % of a standard deviation.

    With the first step in bf16, too, it is 7 % under autocast and 4 % with bf16 weights.
    """
    model, draw = load("fashion-teacher").model, DrawByChain(Chain(guidance=1.0))
    half = copy.deepcopy(model).bfloat16()
    single = copy.deepcopy(half).float()  # rounded weights draw other pictures: the arithmetic alone is compared

    @torch.inference_mode()
    def draws(model, autocast=False):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return sample(model, draw, model.embed(torch.arange(3)), iterations=1, seeds=range(3))

    def deviations(found, expected):
        return ((found - expected).abs().mean() / expected.std()).item()

    assert deviations(draws(model, autocast=True), draws(model)) < 0.01
    assert deviations(draws(half), draws(single)) < 0.01


def test_half_precision_weights_do_not_round_x_t():
    """What changes x_t by less than bf16's rounding changes the head's output, as it does in float32."""
    head = small_model().head
    half = copy.deepcopy(head).bfloat16()
    x_t, y = randn(5, CHANNELS), randn(5, 16, seed=1)
    change = 1e-4 * randn(5, CHANNELS, seed=2)
    expected = head.input_proj(x_t + change) - head.input_proj(x_t)
    found = half.input_proj(x_t + change) - half.input_proj(x_t)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.05, atol=1e-6)
    assert half.denoise(x_t, y.bfloat16()).dtype == torch.float32
