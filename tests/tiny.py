"""The smallest model that does everything: 8x8 pictures in two classes, 16 tokens of 2x2 pixels."""

import torch

from marval.config import Chain, MARConfig, ModelConfig, PixelSpace
from marval.model import MAR
from marval.randomness import generator


def tiny_config():
    """The configuration of a teacher with a few thousand parameters."""
    space = PixelSpace((8, 8), 1, 2, shift=0.3, scale=3.0)
    mar = MARConfig(
        space.token_grid, space.token_dim, 2,
        encoder_dim=16, encoder_depth=1, encoder_heads=2, decoder_dim=16, decoder_depth=2, decoder_heads=2,
        head_width=16, head_depth=2, buffer_size=2, learn_variance=False,
    )  # fmt: skip
    return ModelConfig(mar, space, Chain(guidance=1.5, steps=8, clip=True), ("cross", "square"), 4, "tiny")


def tiny_model(seed=0):
    """A network for it whose head is not all zeros."""
    model = MAR(tiny_config().mar).initialize(generator(seed, "tiny")).eval().requires_grad_(False)
    for parameter in model.head.final_layer.parameters():
        torch.nn.init.normal_(parameter, std=0.05, generator=generator(seed, "head"))
    return model
