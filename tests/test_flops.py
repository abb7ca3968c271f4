"""The formulas count what torch counts."""

import dataclasses

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from marval.config import Chain, OneStep
from marval.evaluate.evaluate import flops_per_image
from marval.pipeline import Pipeline
from tiny import tiny_config, tiny_model


@pytest.mark.parametrize("iterations", [1, 3, 16])
@pytest.mark.parametrize(
    "draw", [OneStep(), Chain(guidance=1.0, diffusion_steps=5), Chain(guidance=1.5, diffusion_steps=7)]
)
def test_formulas_agree_with_the_counter(draw, iterations, monkeypatch):
    """The counter knows neither oneDNN's layers nor the CPU's flash attention, so both are off."""
    pipeline = Pipeline(tiny_model(), dataclasses.replace(tiny_config(), draw=draw))
    monkeypatch.setattr("marval.sampling.fast.ONEDNN", False)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        pipeline.sample([0], iterations=iterations)
    assert flops_per_image(pipeline, iterations) == counter.get_total_flops()
