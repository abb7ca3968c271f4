"""A context network with a cache: who reads whom, and that what it keeps is what one pass computes."""

import dataclasses

import pytest
import torch

from marval.model import MAR
from marval.model.cached import Groups
from marval.runtime.rng import generator
from marval.sampling import DrawInOneStep, draw_counts, sample
from small import CHANNELS, TOKENS, drawn, kept_mask, randn, small_model

BATCH, DRAW = 2, DrawInOneStep()


def cached_model():
    return small_model(decoder_dim=24, depth=2, cached=True)


def inputs(model):
    """Tokens, an order, and the condition and the null condition."""
    order = torch.rand(BATCH, TOKENS, generator=generator("orders")).argsort(dim=1)
    return randn(BATCH, TOKENS, CHANNELS), order, (model.embed(torch.tensor([1, 4])), model.null_condition(BATCH))


def in_one_pass(model, tokens, order, conditions, visible, hidden):
    """The contexts of the next tokens of an order, for groups of these sizes: (condition, image, token, channel)."""
    shown = sum(visible)
    places = order[:, :shown], order[:, shown : shown + sum(hidden)]
    contexts, _ = model.advance(model.start(*conditions), tokens, *places, Groups(visible, hidden))
    return contexts.unflatten(1, (len(tokens), -1))


def gradients(model, tensor):
    """The gradient of a tensor's square by every parameter."""
    weights = list(model.parameters())
    found = torch.autograd.grad(tensor.square().sum(), weights, allow_unused=True, retain_graph=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(found, weights, strict=True)])


def assert_near(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * max(1.0, expected.abs().max().item()))


@pytest.mark.parametrize("sizes", [[0], [5], [0, 7], [2, 0, 3, 1], [1] * 9])
def test_step_by_step_equals_one_pass(sizes):
    model = cached_model().requires_grad_(True)
    tokens, order, conditions = inputs(model)
    state, shown = model.start(*conditions), 0
    for size in sizes:
        shown += size
        contexts, state = model.advance(state, tokens, order[:, :shown], order[:, shown : shown + 3])
    expected = in_one_pass(model, tokens, order, conditions, sizes, [3])
    assert_near(contexts, expected.flatten(1, 2))
    assert_near(gradients(model, contexts), gradients(model, expected))


def test_one_group_without_a_buffer_is_read_as_by_the_network_without_a_cache():
    """In one block, which has no earlier one to bring hidden tokens' places to the visible ones."""
    config = dataclasses.replace(small_model().config, buffer_size=0)
    model = MAR(config).initialize(generator("one group"))
    tokens, order, conditions = inputs(model)
    expected = model.context(tokens, order[:, :5], order[:, 5:], conditions[0])
    model.config = dataclasses.replace(config, cached=True)
    assert_near(in_one_pass(model, tokens, order, conditions[:1], [5], [TOKENS - 5])[0], expected)


def test_a_token_reads_its_own_group_and_earlier_ones_and_a_mask_token_all_of_them():
    model = cached_model()
    tokens, order, conditions = inputs(model)
    sizes, buffer = [2, 3, 1], model.config.buffer_size

    def read(tokens):
        """The contexts of three hidden tokens, and the keys of the last block of either stack at every token."""
        places = order[:, :6], order[:, 6:9]
        contexts, state = model.advance(model.start(*conditions), tokens, *places, Groups(sizes, [3]))
        keys = [state.layers[i].pair()[0].transpose(1, 2).flatten(2) for i in (1, 3)]
        return contexts.unflatten(1, (BATCH, 3)), torch.cat(keys, dim=-1)

    contexts, keys = read(tokens)
    groups = torch.tensor([0] * buffer + [1, 1, 2, 2, 2, 3])
    for place in range(6):
        changed = tokens.clone()
        changed[torch.arange(BATCH), order[:, place]] += 1.0
        other_contexts, other_keys = read(changed)
        assert ((other_contexts - contexts).abs().amax(dim=-1) > 1e-4).all()
        moved = (other_keys - keys).abs().amax(dim=(0, 2)) > 1e-5
        assert torch.equal(moved, groups >= groups[buffer + place])
    hidden = torch.ones(BATCH, TOKENS, dtype=torch.bool).scatter(1, order[:, :6], False)
    assert torch.equal(read(torch.where(hidden[..., None], torch.nan, tokens))[0], contexts)


def test_groups_of_hidden_tokens_and_images_of_a_batch_do_not_see_each_other():
    model = cached_model()
    tokens, order, conditions = inputs(model)
    contexts = in_one_pass(model, tokens, order, conditions, [2, 2], [3, 1, 2])
    for first, count in ((0, 3), (3, 1), (4, 2)):
        own = torch.cat([order[:, :4], order[:, 4 + first :]], dim=1)
        assert_near(in_one_pass(model, tokens, own, conditions, [2, 2], [count]), contexts[:, :, first : first + count])
    together = in_one_pass(model, tokens, order, conditions, [2, 2], [6])
    assert (together - contexts).abs().amax(dim=-1).min() > 1e-3
    for row in (slice(0, 1), slice(1, 2)):
        alone = in_one_pass(model, tokens[row], order[row], [c[row] for c in conditions], [2, 2], [3, 1, 2])
        assert_near(alone, contexts[:, row])


def spelled_out(model, noise, order, known, iterations, last):
    """The tokens of two images by the AR loop: contexts in one pass, from the first token on, without checkpoints."""
    tokens, counts = torch.zeros(BATCH, TOKENS, CHANNELS), draw_counts(TOKENS - known.shape[1], iterations)
    tokens[:, : known.shape[1]] = known
    tokens, sizes = tokens.gather(1, order.argsort(dim=1)[..., None].expand_as(tokens)), [known.shape[1]]
    for k, count in enumerate(counts):
        positions = order[:, sum(sizes) : sum(sizes) + count]
        index = positions[..., None].expand(-1, -1, CHANNELS)
        with torch.set_grad_enabled(k >= iterations - last):
            conditions = [model.embed(torch.tensor([1, 4]))]
            contexts = in_one_pass(model, tokens, order, conditions, sizes, [count])[0].flatten(0, 1)
            drawn = DRAW(model.head, contexts[None], 1.0, noise.gather(1, index).flatten(0, 1)[None])
            tokens = tokens.scatter(1, index, drawn.unflatten(0, (BATCH, count)))
        sizes.append(count)
    return tokens


@pytest.mark.parametrize("iterations", [1, 4, 7])
@pytest.mark.parametrize("kept", [0, 5])
def test_the_loop_draws_any_order_from_any_known_tokens_at_any_k(iterations, kept):
    model = cached_model()
    tokens, order, _ = inputs(model)
    known = tokens.gather(1, order[:, :kept, None].expand(-1, -1, CHANNELS))
    noise = randn(1, BATCH, TOKENS, CHANNELS, seed=1)
    how = {"iterations": iterations, "seeds": [0, 1], "orders": order, "noise": noise}
    if kept:
        how["known"] = tokens, kept_mask(*order[:, :kept].tolist())
    expected = spelled_out(model, noise[0], order, known, iterations, 0)
    assert_near(drawn(model, DRAW, [1, 4], **how), expected)
    with torch.inference_mode():  # which may take other kernels
        assert_near(sample(model, DRAW, model.embed(torch.tensor([1, 4])), **how), expected)


@pytest.mark.parametrize("checkpoint_blocks", [False, True])
def test_gradients_of_the_loop_are_those_of_one_pass(checkpoint_blocks):
    model = cached_model().requires_grad_(True)
    model.checkpoint_blocks = checkpoint_blocks
    _, order, _ = inputs(model)
    noise = randn(1, BATCH, TOKENS, CHANNELS, seed=1)
    how = {"iterations": 4, "seeds": [0, 1], "orders": order, "noise": noise}
    tokens = drawn(model, DRAW, [1, 4], gradient_iterations=4, **how)
    expected = spelled_out(model, noise[0], order, noise[0][:, :0], 4, 4)
    assert_near(tokens, expected)
    whole = gradients(model, expected)
    scale = 1e-4 * whole.abs().max().item()
    torch.testing.assert_close(gradients(model, tokens), whole, rtol=1e-3, atol=scale)
    last = gradients(model, drawn(model, DRAW, [1, 4], gradient_iterations=1, **how))
    assert last.isfinite().all()
    assert 0.01 < (last - whole).abs().max() / whole.abs().max() < 10


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.bfloat16, 0.1)])
def test_a_cache_has_the_precision_of_the_weights(dtype, tolerance):
    found = []
    for kind in (torch.float32, dtype):
        model = cached_model().to(kind)
        tokens, order, conditions = inputs(model)
        state = model.start(*conditions)
        for shown in (0, 4, 6):
            contexts, state = model.advance(state, tokens, order[:, :shown], order[:, shown : shown + 2])
        assert {layer.rows.dtype for layer in state.layers} == {kind}
        found.append(contexts)
    assert found[1].dtype == dtype
    assert (found[0] - found[1].float()).abs().max() < tolerance * found[0].abs().max()
