"""Token spaces: cutting images into tokens and putting them together again."""

from types import SimpleNamespace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from marval.config import LatentSpace, PixelSpace
from marval.spaces import Latents, Pixels, patchify

sizes = st.integers(1, 4)


def test_a_token_lists_its_channels_then_rows_then_columns():
    """The official layout."""
    images = torch.arange(2 * 4 * 4).float().reshape(1, 2, 4, 4)
    # The second token is the upper right square: rows 0 and 1, columns 2 and 3.
    assert patchify(images, 2)[0, 1].tolist() == [2, 3, 6, 7, 18, 19, 22, 23]


@settings(deadline=None, max_examples=40)
@given(st.sampled_from([1, 3]), sizes, sizes, sizes, st.floats(-1, 1, width=32), st.floats(0.25, 8, width=32))
def test_pixels_encode_and_decode_are_inverse(channels, rows, columns, patch, shift, scale):
    space = Pixels(PixelSpace((rows * patch, columns * patch), channels, patch, shift, scale))
    images = torch.rand(2, channels, rows * patch, columns * patch)
    tokens = space.encode(images)
    assert tokens.shape[1:] == (rows * columns, space.config.token_dim)
    torch.testing.assert_close(space.decode(tokens), images, rtol=0, atol=1e-6)


def test_token_range_is_what_black_and_white_become():
    config = PixelSpace((4, 8), 3, 2, shift=0.3, scale=2.5)
    space = Pixels(config)
    black, white = space.encode(torch.zeros(1, 3, 4, 8)), space.encode(torch.ones(1, 3, 4, 8))
    low, high = config.token_range
    assert low < high
    torch.testing.assert_close(black, torch.full_like(black, low))
    torch.testing.assert_close(white, torch.full_like(white, high))


def test_latents_scale_shift_and_cut_what_a_vae_gives():
    """A stand-in VAE of stride 1: its latents are the pixels in [-1, 1]."""
    vae = torch.nn.Identity()
    vae.encode = lambda x: SimpleNamespace(latent_dist=SimpleNamespace(mean=x))
    vae.decode = lambda x: SimpleNamespace(sample=x)
    config = LatentSpace((4, 6), "stand-in", vae_stride=1, latent_channels=3, patch=2, shift=0.25, scale=0.5)
    images = torch.rand(2, 3, 4, 6)
    space = Latents(config, vae=vae)
    tokens = space.encode(images)
    torch.testing.assert_close(tokens, patchify((images * 2 - 1 - 0.25) * 0.5, 2))
    torch.testing.assert_close(space.decode(tokens), images)
    assert space.to(torch.device("cpu")) is space
