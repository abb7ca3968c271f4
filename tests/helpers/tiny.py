"""The smallest model that does everything: 8x8 pictures in two classes, 16 tokens of 2x2 pixels."""

import dataclasses

import torch

from marval.config import Chain, MARConfig, ModelConfig, PixelSpace
from marval.data import ImageData
from marval.model import MAR
from marval.runtime.rng import generator


def tiny_config():
    """The configuration of a teacher with a few thousand parameters."""
    space = PixelSpace((8, 8), 1, 2, shift=0.3, scale=3.0)
    mar = MARConfig(
        space.token_grid, space.token_dim, 2,
        encoder_dim=16, encoder_depth=1, encoder_heads=2, decoder_dim=16, decoder_depth=2, decoder_heads=2,
        head_width=16, head_depth=2, buffer_size=2, learn_variance=False,
    )  # fmt: skip
    return ModelConfig(mar, space, Chain(guidance=1.5, diffusion_steps=8, clip=True), ("cross", "square"), 4, "tiny")


def tiny_model(seed=0, **network):
    """A network for it, or one that differs in its configuration, whose head is not all zeros."""
    model = MAR(dataclasses.replace(tiny_config().mar, **network))
    model.initialize(generator(seed, "tiny")).eval().requires_grad_(False)
    for parameter in model.head.final_layer.parameters():
        torch.nn.init.normal_(parameter, std=0.05, generator=generator(seed, "head"))
    return model


def tiny_data():
    """64 images of 8x8 pixels in its two classes."""
    images = torch.randint(0, 40, (64, 1, 8, 8), generator=generator("tiny data"), dtype=torch.uint8)
    labels = torch.arange(64) % 2
    images[labels == 0, :, 3:5] += 200
    images[labels == 1, :, 2:6, 2:6] += 200
    return ImageData(images, labels, tiny_config().class_names)
