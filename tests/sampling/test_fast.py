"""A model prepared for a CPU draws the same, shares its weights, and follows them."""

from pathlib import Path

import pytest
import torch

from marval.config import MARConfig
from marval.model import MAR
from marval.runtime.rng import generator
from marval.sampling import fast
from marval.sampling.fast import (
    FastLinear,
    cast_frozen,
    few_threads,
    joined_modulation,
    linear,
    prepare_for_drawing,
    use_onednn,
)
from tiny import tiny_model


@pytest.fixture
def onednn(monkeypatch):
    """Products are oneDNN's, whoever made this processor."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch was built without oneDNN")
    monkeypatch.setattr(fast, "use_onednn", lambda: True)


def randn(*shape):
    return torch.randn(shape, generator=generator("fast"))


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("rows", [1, 15, 16, 53])
def test_products_are_the_same_in_inference_mode(rows):
    """There oneDNN multiplies, from 16 rows on."""
    layer = torch.nn.Linear(24, 40)
    x = randn(2, rows, 24)
    expected = torch.nn.functional.linear(x, layer.weight, layer.bias)
    with torch.inference_mode():
        torch.testing.assert_close(linear(x, layer.weight, layer.bias), expected)
        curved = linear(x, layer.weight, layer.bias, gelu=True)
        torch.testing.assert_close(curved, torch.nn.functional.gelu(expected))
        columns = randn(24, 2 * rows).T  # not contiguous
        torch.testing.assert_close(
            linear(columns, layer.weight, layer.bias), linear(columns.contiguous(), layer.weight, layer.bias)
        )
        torch.testing.assert_close(linear(x, layer.weight[8:], layer.bias[8:]), expected[..., 8:])


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("head_calls", [1, 100])
def test_a_prepared_model_computes_the_same_with_the_same_parameters(head_calls):
    """With weights that are large enough to be packed."""
    config = MARConfig(
        (2, 2), 4, 2, encoder_dim=64, encoder_depth=1, encoder_heads=2, decoder_dim=64, decoder_depth=2,
        decoder_heads=2, head_width=768, head_depth=1, buffer_size=20,
    )  # fmt: skip
    model = MAR(config).initialize(generator("fast")).eval().requires_grad_(False)
    torch.nn.init.normal_(model.head.final_layer.linear.weight, std=0.1, generator=generator("final"))
    tokens, visible, positions = randn(3, 4, 4), torch.tensor([[2, 1]] * 3), torch.tensor([[0, 3]] * 3)
    with torch.inference_mode():
        prepared = prepare_for_drawing(model, head_calls)
        assert prepared is not model
        assert all(a is b for a, b in zip(prepared.parameters(), model.parameters(), strict=True))
        packed = [layer for layer in prepared.modules() if isinstance(layer, FastLinear) and layer.packed is not None]
        assert bool(packed) == (head_calls == 100)
        contexts = [m.context(tokens, visible, positions, model.class_emb.weight[[0, 1, 1]]) for m in (prepared, model)]
        torch.testing.assert_close(*contexts, rtol=1e-4, atol=1e-5)
        outputs = [m.head(randn(6, 4), torch.arange(6.0), contexts[1].flatten(0, 1)) for m in (prepared, model)]
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
        assert outputs[0].abs().max() > 0.1


def test_nothing_is_prepared_where_onednn_is_of_no_use():
    model = tiny_model()
    assert prepare_for_drawing(model, 100) is model, "gradients may be asked for"
    with torch.inference_mode():
        with torch.autocast("cpu", torch.bfloat16):
            assert prepare_for_drawing(model, 100) is model
        assert prepare_for_drawing(model.bfloat16(), 100) is model


def test_joined_modulations_are_those_of_every_layer():
    head, y = tiny_model().head, randn(2, 5, 16)
    for joined, each in zip(joined_modulation(head)(y), head.modulate(y), strict=True):
        torch.testing.assert_close(joined, each)


def test_on_a_processor_that_mkl_is_for_mkl_multiplies(monkeypatch):
    model = tiny_model()
    for vendor, other in (("GenuineIntel", False), ("AuthenticAMD", torch.backends.mkldnn.is_available())):
        monkeypatch.setattr(Path, "read_text", lambda path, vendor=vendor: f"vendor_id : {vendor}\n")
        use_onednn.cache_clear()
        with torch.inference_mode():
            assert (prepare_for_drawing(model, 100) is not model) == other
    use_onednn.cache_clear()


def test_small_batches_are_drawn_by_one_thread_where_threads_wait_passively(monkeypatch):
    threads, seen = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        for policy, batch in (("passive", 1), ("PASSIVE", 400), ("ACTIVE", 1)):
            monkeypatch.setenv("OMP_WAIT_POLICY", policy)
            with few_threads(tiny_model().config, batch, torch.device("cpu")):
                seen.append(torch.get_num_threads())
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert seen == [1, 2, 2]


def test_a_frozen_model_computes_under_autocast_what_it_did_before_it_was_cast():
    model, tokens, visible, positions = tiny_model(), randn(2, 16, 4), torch.tensor([[2, 1]] * 2), torch.arange(9)
    cast = cast_frozen(model)
    condition = model.embed(torch.tensor([0, 1]))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        before, after = (m.context(tokens, visible, positions.expand(2, -1), condition) for m in (model, cast))
    assert torch.equal(before, after)
    assert cast.decoder_embed.weight.dtype == torch.bfloat16
    assert {p.dtype for p in cast.head.parameters()} == {torch.float32}
    assert model.decoder_embed.weight.dtype == torch.float32
