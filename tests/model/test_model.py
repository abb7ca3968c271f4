"""The networks: sizes of the presets, what the context may depend on, dtypes and strict loading."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

from marval.config import Chain, MARConfig, ModelConfig
from marval.io.checkpoint import load_model, save_model
from marval.model import MAR
from marval.runtime.rng import generator
from small import CHANNELS, SPACE, randn, small_model

BATCH = 2


def other_width():
    """Two blocks a stack, and a decoder of another width than the encoder's."""
    return small_model(decoder_dim=24, depth=2)


def inputs():
    rng = generator("test inputs")
    tokens = torch.randn(BATCH, 12, CHANNELS, generator=rng)
    order = torch.rand(BATCH, 12, generator=rng).argsort(dim=1)
    return tokens, order[:, :5], order[:, 5:], torch.tensor([1, 4])


@pytest.mark.parametrize(("size", "millions"), [("base", 208), ("large", 479), ("huge", 943)])
def test_presets_have_the_published_number_of_parameters(size, millions):
    with torch.device("meta"):
        model = MAR(MARConfig.imagenet256(size))
    count = sum(p.numel() for p in model.parameters())
    assert abs(count / (millions * 1e6) - 1) < 0.005


def test_contexts_depend_on_every_visible_token_and_on_no_hidden_one():
    model, (tokens, visible, positions, labels) = other_width(), inputs()
    condition = model.embed(labels)
    expected = model.context(tokens, visible, positions, condition)
    hidden = torch.ones(BATCH, 12, dtype=torch.bool).scatter(1, visible, False)
    spoiled = torch.where(hidden[..., None], torch.nan, tokens)
    assert torch.equal(model.context(spoiled, visible, positions, condition), expected)
    for place in range(visible.shape[1]):
        changed = tokens.clone()
        changed[torch.arange(BATCH), visible[:, place]] += 1.0
        difference = (model.context(changed, visible, positions, condition) - expected).abs().amax(dim=-1)
        assert (difference > 1e-4).all()


def test_images_of_a_batch_and_the_order_of_visible_positions_do_not_matter():
    model, (tokens, visible, positions, labels) = other_width(), inputs()
    condition = model.embed(labels)
    expected = model.context(tokens, visible, positions, condition)
    for row in (slice(0, 1), slice(1, 2)):
        alone = model.context(tokens[row], visible[row], positions[row], condition[row])
        torch.testing.assert_close(alone, expected[row], rtol=1e-5, atol=1e-5)
    for shuffle in (visible.flip(1), visible.roll(2, dims=1), visible.sort(dim=1).values):
        torch.testing.assert_close(model.context(tokens, shuffle, positions, condition), expected, rtol=0, atol=1e-5)
    asked = model.context(tokens, visible, positions.flip(1), condition)
    torch.testing.assert_close(asked, expected.flip(1), rtol=0, atol=1e-5)
    assert (asked - expected).abs().max() > 0.01  # positions do differ


def test_advance_gives_the_contexts_of_every_condition():
    model, (tokens, visible, positions, labels) = other_width(), inputs()
    conditions = model.embed(labels), model.null_condition(BATCH)
    contexts, state = model.advance(model.start(*conditions), tokens, visible[:, :2], positions)
    contexts, _ = model.advance(state, tokens, visible, positions)
    for found, condition in zip(contexts, conditions, strict=True):
        expected = model.context(tokens, visible, positions, condition).flatten(0, 1)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_in_a_joint_draw_noise_changes_the_contexts_of_all_that_are_drawn_together():
    model, (tokens, visible, positions, labels) = other_width(), inputs()
    joint, condition = copy.deepcopy(model).draw_jointly(generator("noise")), model.embed(labels)
    noise = randn(BATCH, 7, CHANNELS)
    expected = model.context(tokens, visible, positions, condition)
    assert torch.equal(joint.context(tokens, visible, positions, condition, 0 * noise), expected)
    with pytest.raises(ValueError, match="draws tokens jointly: expected the noise"):
        joint.context(tokens, visible, positions, condition)
    own = joint.context(tokens, visible, positions, condition, noise)
    for place in range(7):
        other = noise.clone()
        other[:, place] += 1.0
        difference = (joint.context(tokens, visible, positions, condition, other) - own).abs().amax(dim=-1)
        assert (difference > 1e-4).all()
    contexts, _ = joint.advance(joint.start(condition, condition), tokens, visible, positions, noise=noise)
    torch.testing.assert_close(contexts, own.flatten(0, 1).expand(2, -1, -1), rtol=1e-4, atol=1e-5)


def test_label_drop_gives_the_null_class_and_only_there():
    model = small_model()
    labels = torch.tensor([1, 4])
    found = model.embed(labels, torch.tensor([0.0, 1.0]))
    assert torch.equal(found[0], model.class_emb.weight[1])
    assert torch.equal(found[1], model.null_condition(1)[0])
    assert not torch.equal(found[1], model.class_emb.weight[4])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.bfloat16, 0.1)])
def test_context_and_head_run_in_other_dtypes(dtype, tolerance):
    tokens, visible, positions, labels = inputs()
    t, outputs = torch.tensor([3.0, 990.0]).repeat_interleave(7), {}
    for kind in (torch.float32, dtype):
        model = other_width().to(kind)
        context = model.context(tokens.to(kind), visible, positions, model.embed(labels)).flatten(0, 1)
        x_t = torch.randn(14, CHANNELS, generator=generator("x_t")).to(kind)
        outputs[kind] = (context, model.head(x_t, t, context))
    for single, other in zip(outputs[torch.float32], outputs[dtype], strict=True):
        assert other.dtype == dtype
        assert (single - other.float()).abs().max() < tolerance * single.abs().max()


def test_the_untrained_head_answers_zero():
    model = MAR(small_model().config).initialize(generator("fresh"))
    x_t, context = torch.randn(7, CHANNELS, generator=generator("x_t")), torch.ones(7, 16)
    assert torch.equal(model.head(x_t, torch.arange(7.0), context), torch.zeros(7, 2 * CHANNELS))


def test_initialize_sets_every_parameter_from_its_generator():
    config, states = small_model().config, []
    for global_seed in (1, 2):
        with torch.random.fork_rng():
            torch.manual_seed(global_seed)
            states.append(MAR(config).initialize(generator("fresh")).state_dict())
    other = MAR(config).initialize(generator("another")).state_dict()
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
    assert not torch.equal(other["mask_token"], states[0]["mask_token"])
    assert not torch.equal(other["encoder_blocks.0.attn.qkv.weight"], states[0]["encoder_blocks.0.attn.qkv.weight"])


def saved_model(folder):
    save_model(folder, small_model(), ModelConfig(small_model().config, SPACE, Chain(), tuple("abcde"), 4))
    return folder / "model.safetensors"


def rewrite(file, change):
    """Apply `change` to the tensors of `file`; its metadata stays."""
    from safetensors import safe_open

    tensors = load_file(file)
    with safe_open(file, framework="pt") as content:
        metadata = content.metadata()
    change(tensors)
    save_file(tensors, file, metadata=metadata)


def test_loading_gives_back_what_was_saved(tmp_path):
    saved_model(tmp_path)
    loaded, config = load_model(tmp_path)
    assert config.class_names == tuple("abcde")
    for name, value in small_model().state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("decoder_blocks.0.mlp.fc2.bias"), "decoder_blocks.0.mlp.fc2.bias is missing"),
        (lambda tensors: tensors.pop("fake_latent"), "fake_latent is missing"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "unknown tensor extra"),
        (lambda tensors: tensors.update(fake_latent=torch.zeros(1, 8)), r"fake_latent has shape \(1, 8\)"),
    ],
)
def test_a_strict_load_rejects_missing_unknown_and_misshapen_tensors(tmp_path, change, message):
    file = saved_model(tmp_path)
    rewrite(file, change)
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)
