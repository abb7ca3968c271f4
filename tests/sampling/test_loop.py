"""The AR loop: each token once, in order, with its own noise; guidance, known tokens, gradients and precision."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from marval.config import Chain
from marval.model import NoiseSchedule
from marval.presets import TrainConfig
from marval.sampling import (
    ORDERS,
    DrawByChain,
    DrawInOneStep,
    DrawTokens,
    draw_counts,
    drawing_orders,
    image_noise,
    prepare,
    run,
    sample,
)
from small import CHAIN, CHANNELS, DRAWS, SPACE, TOKENS, drawn, kept_mask, randn, small_model, small_pipeline


class StartNoise(DrawTokens):
    """Draws a token's start noise, which is known in advance, and remembers what it was given."""

    noise_draws, guidance_schedule = 1, "linear"

    def __init__(self, guidance=1.0):
        self.guidance, self.needs_null, self.seen = guidance, guidance != 1.0, []

    def bind(self, head):
        def draw(contexts, guidance, noise):
            self.seen.append((guidance, len(contexts), contexts.dtype, noise.dtype))
            return noise[0]

        return draw


@settings(deadline=None, max_examples=25)
@given(grid=st.tuples(st.integers(1, 4), st.integers(1, 4)), order=st.sampled_from(sorted(ORDERS)), data=st.data())
def test_every_token_is_drawn_once_in_order_with_its_own_noise(grid, order, data):
    total, seeds, model = math.prod(grid), [3, 4], small_model(grid, 2)
    iterations = data.draw(st.integers(1, total))
    start = prepare(model, StartNoise(), iterations=iterations, seeds=seeds, orders=order)
    expected = image_noise(seeds, 1, total, 2)[0]
    orders, counts, shown = drawing_orders(order, grid, seeds), draw_counts(total, iterations), 0
    for k, (tokens, places) in enumerate(run(model, StartNoise(), model.embed(torch.tensor([0, 1])), start)):
        shown += counts[k]
        assert torch.equal(places, orders[:, :shown])
        mask = torch.zeros(2, total, dtype=torch.bool).scatter(1, places, True)
        assert torch.equal(tokens, torch.where(mask[..., None], expected, 0.0))
    assert (k + 1, shown) == (iterations, total)


def test_student_and_teacher_start_from_the_same_noise():
    start = image_noise([11], 1, TOKENS, CHANNELS)
    for draws in (2, 50, 100):
        noise = image_noise([12, 11], draws, TOKENS, CHANNELS)
        assert noise.shape == (draws, 2, TOKENS, CHANNELS)
        assert torch.equal(noise[:1, 1:], start)
        assert not torch.equal(noise[:1, :1], start)
    assert (DRAWS["one_step"].noise_draws, DRAWS["chain"].noise_draws) == (1, CHAIN.diffusion_steps)


# --- guidance ---


@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize(("guidance", "rows"), [(None, 3), (1.0, 3), (2.5, 6), (0.0, 6)])
def test_only_guidance_needs_null_rows(guidance, rows, inference):
    """With None a student draws."""
    model, sizes = small_model(), []
    model.encoder_norm.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    draw = DrawInOneStep()
    if guidance is not None:
        draw = DrawByChain(Chain(guidance=guidance, diffusion_steps=2, clip=True), SPACE.token_range)
    with torch.inference_mode(inference):
        sample(model, draw, model.embed(torch.tensor([0, 1, 2])), iterations=4, seeds=0)
    assert sizes == [rows] * 4


def test_the_loop_hands_the_scheduled_guidance_to_the_draw():
    draw = StartNoise(3.0)
    drawn(small_model(), draw, [0], iterations=3, seeds=[0])
    shown = [12 - 10, 12 - 6, 11]  # 12 cos(pi/6) = 10.4, 12 cos(pi/3) = 6; the last counts one as hidden
    assert [w for w, *_ in draw.seen] == pytest.approx([1 + 2 * n / 12 for n in shown])
    assert [groups for _, groups, *_ in draw.seen] == [2, 2, 2]


def test_every_image_may_have_its_own_guidance_and_null_condition():
    model, draw, how = small_model(), DRAWS["chain"], {"iterations": 3, "seeds": [5, 6]}
    null = model.embed(torch.tensor([4, 3]))
    own = drawn(model, draw, [0, 1], guidance=torch.tensor([1.5, 4.0]), null_condition=null, **how)
    for i, w in enumerate((1.5, 4.0)):
        each = drawn(model, draw, [0, 1], guidance=w, null_condition=null, **how)
        torch.testing.assert_close(own[i], each[i], rtol=0, atol=1e-5)
        other = drawn(model, draw, [0, 1], guidance=w, **how)
        assert (each[i] - other[i]).abs().max() > 0.01
    with pytest.raises(ValueError, match="takes none"):
        drawn(model, DRAWS["one_step"], [0, 1], guidance=2.0, **how)


# --- known tokens and given noise ---


@pytest.mark.parametrize("kind", DRAWS)
@pytest.mark.parametrize("orders", ["random", "raster"])
def test_known_tokens_stay_bit_identical(kind, orders):
    given, keep, model = randn(2, TOKENS, CHANNELS), kept_mask([0, 5, 11], [1, 2, 3]), small_model()
    start = prepare(model, DRAWS[kind], iterations=4, seeds=[0, 1], orders=orders, known=(given, keep))
    for k, (tokens, places) in enumerate(run(model, DRAWS[kind], model.embed(torch.tensor([0, 1])), start)):
        assert torch.equal(tokens[keep], given[keep])
        assert places.shape[1] == 3 + sum(draw_counts(9, 4)[: k + 1])
        assert torch.zeros_like(keep).scatter(1, places, True)[keep].all()
    assert (tokens[~keep] != given[~keep]).all()


def test_only_known_tokens_are_read_and_they_are_read():
    given, keep, model = randn(1, TOKENS, CHANNELS), kept_mask([0, 5, 11]), small_model()

    def draw(given):
        return drawn(model, DRAWS["one_step"], [0], iterations=4, seeds=[0], known=(given, keep))

    expected = draw(given)
    assert torch.equal(draw(torch.where(keep[..., None], given, torch.nan)), expected)
    other = draw(torch.where(keep[..., None], given + 1, given))
    assert (other - expected)[~keep].abs().max() > 0.01


@pytest.mark.parametrize("kind", DRAWS)
def test_given_noise_replaces_the_seeds(kind):
    model, draw = small_model(), DRAWS[kind]
    noise = image_noise([5, 6], draw.noise_draws, TOKENS, CHANNELS)
    common = {"iterations": 3, "orders": "raster"}
    expected = drawn(model, draw, [0, 1], seeds=[5, 6], **common)
    assert torch.equal(drawn(model, draw, [0, 1], seeds=[0, 0], noise=noise, **common), expected)
    assert not torch.equal(drawn(model, draw, [0, 1], seeds=[0, 0], **common), expected)


# --- tokens that are drawn together ---


@pytest.mark.parametrize("cached", [False, True])
def test_in_a_joint_draw_noise_reaches_all_tokens_of_its_iteration_and_none_before(cached):
    model, draw, how = (
        small_model(joint_draw=True, cached=cached),
        DRAWS["one_step"],
        {"iterations": 3, "orders": "raster"},
    )
    noise, counts = randn(1, 2, TOKENS, CHANNELS), draw_counts(TOKENS, 3)
    expected = drawn(model, draw, [0, 1], seeds=[0, 1], noise=noise, **how)
    for place in range(TOKENS):
        other = noise.clone()
        other[:, :, place] += 1.0
        changed = (drawn(model, draw, [0, 1], seeds=[0, 1], noise=other, **how) != expected).any(dim=-1)
        first = max(shown for shown in (0, counts[0], sum(counts[:2])) if shown <= place)  # of its iteration
        assert changed[:, first:].all()
        assert not changed[:, :first].any()


def test_a_joint_draw_is_of_its_image_alone_scaled_by_the_temperature_and_keeps_known_tokens():
    pipeline, keep = small_pipeline("joint"), kept_mask([0, 5, 11], [1, 2, 3])
    together = pipeline.sample_tokens([0, 3], seeds=[5, 6], iterations=3)
    for i in range(2):
        alone = pipeline.sample_tokens([[0, 3][i]], seeds=[[5, 6][i]], iterations=3)
        torch.testing.assert_close(alone, together[i : i + 1], rtol=1e-4, atol=1e-5)
    still = pipeline.with_draw(temperature=0.0)
    first, second = (still.sample_tokens([0, 3], seeds=s, iterations=1) for s in ([5, 6], [7, 8]))
    assert torch.equal(first, second)
    given = randn(2, TOKENS, CHANNELS)
    assert torch.equal(pipeline.sample_tokens([0, 3], seeds=0, iterations=3, known=(given, keep))[keep], given[keep])


# --- gradients ---


def spelled_out(model, draw, labels, noise, iterations, gradient_iterations):
    """The same images in raster order, without the loop and without checkpointing."""
    tokens, shown = torch.zeros(len(labels), TOKENS, CHANNELS), 0
    for k, count in enumerate(draw_counts(TOKENS, iterations)):
        places = torch.arange(TOKENS).expand(len(labels), -1)
        visible, positions = places[:, :shown], places[:, shown : shown + count]
        with torch.set_grad_enabled(k >= iterations - gradient_iterations):
            context = model.context(tokens, visible, positions, model.embed(torch.tensor(labels))).flatten(0, 1)
            new = draw(model.head, context[None], 1.0, noise[:, :, shown : shown + count].flatten(1, 2))
            new = new.unflatten(0, (len(labels), count))
            tokens = torch.cat([tokens[:, :shown], new, tokens[:, shown + count :]], dim=1)
        shown += count
    return tokens


def gradients(model, tokens):
    """The gradient of the squared tokens by every parameter; zeros where there is none."""
    found = torch.autograd.grad(tokens.square().sum(), list(model.parameters()), allow_unused=True)
    zipped = zip(found, model.parameters(), strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in zipped])


@pytest.mark.parametrize("last", [1, 2, 3])
def test_gradients_flow_through_the_last_iterations_only(last):
    model, draw, noise = small_model().requires_grad_(True), DrawInOneStep(), randn(1, 2, TOKENS, CHANNELS)
    tokens = drawn(
        model, draw, [0, 1], iterations=3, seeds=[0, 1], orders="raster", noise=noise, gradient_iterations=last
    )
    manual = spelled_out(model, draw, [0, 1], noise, 3, last)
    torch.testing.assert_close(tokens, manual, rtol=1e-4, atol=1e-5)
    found, expected = gradients(model, tokens), gradients(model, manual)
    scale = expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * scale)
    for other in {1, 2, 3} - {last}:
        truncated = gradients(model, spelled_out(model, draw, [0, 1], noise, 3, other))
        assert (found - truncated).abs().max() > 0.01 * scale


@pytest.mark.parametrize("kind", DRAWS)
def test_checkpointing_changes_no_gradient(kind, monkeypatch):
    model, how = small_model().requires_grad_(True), {"iterations": 3, "seeds": [0, 1], "gradient_iterations": 3}
    condition = model.embed(torch.tensor([0, 1]))
    checkpointed = sample(model, DRAWS[kind], condition, **how)
    found, calls = gradients(model, checkpointed), []

    def plain(function, *arguments, **_):
        calls.append(function)
        return function(*arguments)

    monkeypatch.setattr("marval.sampling.loop.checkpoint", plain)
    tokens = sample(model, DRAWS[kind], model.embed(torch.tensor([0, 1])), **how)
    assert len(calls) == 3
    assert torch.equal(checkpointed, tokens)
    expected = gradients(model, tokens)
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item())


def test_a_draw_used_in_inference_mode_serves_training():
    model, draw = small_model().requires_grad_(True), DrawInOneStep()
    with torch.inference_mode():
        expected = sample(model, draw, model.embed(torch.tensor([0])), iterations=3, seeds=[0])
    assert not drawn(model, draw, [0], iterations=3, seeds=[0]).requires_grad
    tokens = drawn(model, draw, [0], iterations=3, seeds=[0], gradient_iterations=3)
    torch.testing.assert_close(tokens, expected)
    tokens.sum().backward()
    assert model.head.time_embed.mlp[0].weight.grad.abs().max() > 0
    assert model.class_emb.weight.grad[0].abs().max() > 0


# --- randomness and precision ---


def test_the_global_random_state_is_neither_read_nor_changed():
    from marval.train.draws import teacher_draws
    from marval.train.teacher import teacher_loss

    model, results = small_model(), []
    for seed in (1, 2):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            state = torch.get_rng_state()
            outputs = [drawn(model, draw, [0, 1], iterations=3, seeds=[0, 1]) for draw in DRAWS.values()]
            draws = teacher_draws(TrainConfig(batch_size=2), model.config, 3).part(slice(None))
            loss = teacher_loss(model, NoiseSchedule.full(), outputs[0], torch.tensor([0, 1]), draws, autocast=False)
            assert torch.equal(torch.get_rng_state(), state)
            results.append([*outputs, loss])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", DRAWS)
def test_tokens_are_float32_whatever_the_weights_are(kind, dtype):
    own, watched = small_model(), StartNoise()
    model = copy.deepcopy(own).to(dtype)
    tokens = drawn(model, DRAWS[kind], [0, 1], iterations=2, seeds=[0, 1])
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert tokens.dtype == wide
    drawn(model, watched, [0, 1], iterations=2, seeds=[0, 1])
    assert [seen[2:] for seen in watched.seen] == [(dtype, wide)] * 2
    expected = drawn(own, DRAWS[kind], [0, 1], iterations=2, seeds=[0, 1])
    assert (tokens - expected).abs().mean() < (1e-4 if dtype == torch.float64 else 0.05) * expected.std()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", DRAWS)
def test_a_gpus_loop_waits_for_nothing(kind):
    model, draw = small_model().cuda(), copy.copy(DRAWS[kind])
    draw.times = draw.times.cuda()
    with torch.inference_mode():
        condition = model.embed(torch.tensor([0, 1], device="cuda"))
        start = prepare(model, draw, iterations=4, seeds=[0, 1])
        torch.cuda.set_sync_debug_mode("error")
        try:
            list(run(model, draw, condition, start))
        finally:
            torch.cuda.set_sync_debug_mode("default")
