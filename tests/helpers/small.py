"""A small MAR in which nothing is zero, so that every output depends on every input that it may depend on."""

import torch

from marval.config import Chain, MARConfig, ModelConfig, OneStep, PixelSpace
from marval.model import MAR
from marval.pipeline import Pipeline
from marval.runtime.rng import generator
from marval.sampling import DrawByChain, DrawInOneStep, prepare, run

TOKENS, CHANNELS = 12, 4
SPACE = PixelSpace((6, 8), 1, 2, shift=0.5, scale=2.0)  # 3 x 4 tokens of 4 channels in [-1, 1]
CHAIN = Chain(guidance=2.0, diffusion_steps=6, clip=True)
DRAWS = {"chain": DrawByChain(CHAIN, SPACE.token_range), "one_step": DrawInOneStep()}


def small_model(grid=(3, 4), channels=CHANNELS, learn_variance=True, decoder_dim=16, depth=1, **others):
    config = MARConfig(
        grid, channels, 5,
        encoder_dim=16, encoder_depth=depth, encoder_heads=2,
        decoder_dim=decoder_dim, decoder_depth=depth, decoder_heads=2,
        head_width=16, head_depth=2, buffer_size=3, learn_variance=learn_variance, **others,
    )  # fmt: skip
    model = MAR(config).initialize(generator("test model"))
    rng = generator("test model", "noise")
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.15 * torch.randn(weight.shape, generator=rng)
    return model.eval().requires_grad_(False)


def small_pipeline(kind):
    """A teacher ("chain"), a student ("one_step"), or one that takes w ("dial") or draws jointly ("joint")."""
    draw = {"chain": CHAIN, "one_step": OneStep(), "dial": OneStep(guidance=1.5), "joint": OneStep()}[kind]
    model = small_model(guidance_range=(1.0, 3.0) if kind == "dial" else None, joint_draw=kind == "joint")
    return Pipeline(model, ModelConfig(model.config, SPACE, draw, tuple("abcde"), 4))


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def kept_mask(*rows):
    """A mask that keeps these positions of each image."""
    return torch.stack([torch.zeros(TOKENS, dtype=torch.bool).index_fill(0, torch.tensor(row), True) for row in rows])


def drawn(model, draw, labels, *, guidance=None, null_condition=None, gradient_iterations=0, **settings):
    """The tokens after the AR loop, for settings of `prepare`."""
    start = prepare(model, draw, **settings)
    steps = run(
        model, draw, model.embed(torch.tensor(labels)), start, guidance=guidance, null_condition=null_condition,
        gradient_iterations=gradient_iterations,
    )  # fmt: skip
    *_, (tokens, _) = steps
    return tokens
