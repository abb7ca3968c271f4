"""Token spaces: how an image becomes tokens and tokens become an image."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from marval.config import LatentSpace, PixelSpace
from marval.io.vae import load_vae, vae_hash

DECODED = 16  # latents that a VAE decodes at a time: its activations are the largest of all


def patchify(x: Float[Tensor, "b c h w"], patch: int) -> Float[Tensor, "b l d"]:
    """Cut into `patch` x `patch` squares, row by row; a token lists its channels, then its rows, then its columns."""
    return F.pixel_unshuffle(x, patch).flatten(2).mT


def unpatchify(tokens: Float[Tensor, "b l d"], grid: tuple[int, int], patch: int) -> Float[Tensor, "b c h w"]:
    """The inverse of `patchify`; `grid` is (rows, columns) of tokens."""
    return F.pixel_shuffle(tokens.mT.unflatten(2, grid), patch)


class Pixels:
    """Pixel patches, for small images."""

    def __init__(self, config: PixelSpace):
        self.config = config

    def encode(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b l d"]:
        """Images in [0, 1] to tokens."""
        return patchify((images - self.config.shift) * self.config.scale, self.config.patch)

    def decode(self, tokens: Float[Tensor, "b l d"]) -> Float[Tensor, "b c h w"]:
        """Tokens to images, clamped to [0, 1]."""
        images = unpatchify(tokens, self.config.token_grid, self.config.patch)
        return (images / self.config.scale + self.config.shift).clamp(0, 1)

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> "Pixels":
        """The space itself: it holds nothing."""
        return self


class Latents:
    """Latents of a frozen VAE, for large images; the VAE is loaded when it is first needed."""

    def __init__(self, config: LatentSpace, device: torch.device | str = "cpu", vae: Any = None):
        self.config, self.device, self.dtype = config, torch.device(device), torch.float32
        self.loaded = None if vae is None else vae.eval().requires_grad_(False)

    @property
    def vae(self) -> Any:
        """The VAE (diffusers' `AutoencoderKL`); a ValueError where it is not there or has other weights."""
        if self.loaded is None:
            name = self.config.vae
            found, expected = vae_hash(name), self.config.vae_sha256
            if found and expected and found != expected:
                raise ValueError(
                    f"the VAE {name} has other weights (SHA-256 {found[:12]}...) than the model was trained "
                    f"with ({expected[:12]}...): put that one back"
                )
            with torch.inference_mode(False):  # whoever asks first: gradients may pass through it later
                self.loaded = self._place(load_vae(name, self.device))
        return self.loaded

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> "Latents":
        """The space itself, its VAE moved and in another precision."""
        self.device, self.dtype = torch.device(device), dtype or self.dtype
        if self.loaded is not None:
            self._place(self.loaded)
        return self

    def _place(self, vae: Any) -> Any:
        """The VAE where it computes; in the memory layout that a GPU's convolutions are fastest in."""
        nn.Module.to(vae, self.device, self.dtype)  # the VAE's own method warns
        return vae.to(memory_format=torch.channels_last) if self.device.type == "cuda" else vae

    def tokens(self, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b l d"]:
        """Latents to tokens."""
        return patchify((latents - self.config.shift) * self.config.scale, self.config.patch)

    def encode(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b l d"]:
        """Images in [0, 1] to tokens, by the mean of the VAE's posterior."""
        return self.tokens(self.vae.encode((images * 2 - 1).to(self.dtype)).latent_dist.mean.float())

    def decode(self, tokens: Float[Tensor, "b l d"]) -> Float[Tensor, "b c h w"]:
        """Tokens to images, clamped to [0, 1]; `DECODED` at a time."""
        latents = unpatchify(tokens, self.config.token_grid, self.config.patch) / self.config.scale + self.config.shift
        images = [self.vae.decode(some).sample.float() for some in latents.to(self.dtype).split(DECODED)]
        return (torch.cat(images) / 2 + 0.5).clamp(0, 1)


TokenSpace = Pixels | Latents  # images in [0, 1] to tokens, row by row, and back


def token_space(config: PixelSpace | LatentSpace, device: torch.device | str = "cpu") -> TokenSpace:
    """The token space of a configuration."""
    return Pixels(config) if isinstance(config, PixelSpace) else Latents(config, device)
