"""Token spaces: how an image becomes tokens and tokens become an image."""

import dataclasses
import hashlib
import os
import re
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from marval.config import LatentSpace, PixelSpace

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
ELSEWHERE = re.compile(r"[\\/]{2}")  # at the start of a path: another machine, which Windows would log in to


@runtime_checkable
class TokenSpace(Protocol):
    """What samplers and trainers need of a token space. Images are in [0, 1]; tokens run row by row."""

    def encode(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b l d"]: ...

    def decode(self, tokens: Float[Tensor, "b l d"]) -> Float[Tensor, "b c h w"]: ...


def patchify(x: Float[Tensor, "b c h w"], patch: int) -> Float[Tensor, "b l d"]:
    """Cut into `patch` x `patch` squares, row by row; a token lists its channels, then its rows, then its columns."""
    x = x.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # b c rows p columns q
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpatchify(tokens: Float[Tensor, "b l d"], grid: tuple[int, int], patch: int) -> Float[Tensor, "b c h w"]:
    """The inverse of `patchify`; `grid` is (rows, columns) of tokens."""
    x = tokens.unflatten(2, (-1, patch, patch)).unflatten(1, grid)  # b rows columns c p q
    return x.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


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


class Latents:
    """Latents of a frozen VAE, for large images; the VAE is loaded when it is first needed."""

    def __init__(self, config: LatentSpace, device: torch.device | str = "cpu", vae: Any = None):
        self.config, self.device = config, device
        self.loaded = None if vae is None else vae.eval().requires_grad_(False)

    @property
    def vae(self) -> Any:
        """The VAE (diffusers' `AutoencoderKL`).

        Raises:
            ValueError: diffusers is not installed, or the VAE's files are not there or hold other weights.
        """
        if self.loaded is None:
            name = find_vae(self.config.vae)
            with torch.inference_mode(False):  # whoever asks first: gradients may pass through it later
                self.loaded = load_vae(name, self.device)
            found, expected = vae_hash(name), self.config.vae_sha256
            if not same_vae(("", found), ("", expected)):
                raise ValueError(
                    f"the VAE {name} has other weights (SHA-256 {found[:12]}...) than the model was trained "
                    f"with ({expected[:12]}...): put that one back"
                )
        return self.loaded

    def tokens(self, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b l d"]:
        """Latents to tokens."""
        return patchify((latents - self.config.shift) * self.config.scale, self.config.patch)

    def encode(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b l d"]:
        """Images in [0, 1] to tokens, by the mean of the VAE's posterior."""
        return self.tokens(self.vae.encode(images * 2 - 1).latent_dist.mean)

    def decode(self, tokens: Float[Tensor, "b l d"]) -> Float[Tensor, "b c h w"]:
        """Tokens to images, clamped to [0, 1]."""
        latents = unpatchify(tokens, self.config.token_grid, self.config.patch)
        return (self.vae.decode(latents / self.config.scale + self.config.shift).sample / 2 + 0.5).clamp(0, 1)


def load_vae(name: str, device: torch.device | str = "cpu", *, download: bool = False) -> Any:
    """A frozen VAE: a folder in diffusers' form, or a hub id. Its weights must be safetensors, never a pickle.

    Args:
        download: fetch a hub id; only where a person typed it, not where a model's file names it. Without, what
            `hf download` put into the local cache is found.

    Raises:
        ValueError: diffusers is not installed, or the VAE's files are not there.
    """
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise ValueError("this needs a VAE: install diffusers (pip install diffusers transformers)") from error
    if ELSEWHERE.match(name) or not (Path(name).is_dir() or HUB_ID.fullmatch(name)):
        raise ValueError(f"the VAE {name[:200]!r} is no folder here, nor a hub id: name a folder in diffusers' form")
    try:
        vae = AutoencoderKL.from_pretrained(
            name, local_files_only=not download, use_safetensors=True, low_cpu_mem_usage=False
        )
        return vae.to(device).eval().requires_grad_(False)
    except (OSError, ValueError, TypeError, RuntimeError, LookupError) as error:
        told = next(iter(str(error).splitlines()), type(error).__name__)[:200]
        advice = (
            "" if download or Path(name).is_dir() else f"nothing is fetched that a file names: hf download {name}; or "
        )
        raise ValueError(
            f"the VAE {name!r} cannot be loaded ({told}): {advice}name a folder in diffusers' form, such as marval "
            "convert vae makes"
        ) from error


def vae_place(name: str) -> str:
    """Where a VAE lies, for a model or cache to keep: a folder's absolute path, good from anywhere; or a hub id."""
    return os.path.abspath(name) if Path(name).is_dir() else name


def find_vae(place: str) -> str:
    """Where a VAE is now: its place, or else a folder of the same name in the current one."""
    if place[:1] in ("/", "\\") and place[1:2] in ("/", "\\"):  # another machine, which Windows would log in to
        return place
    moved = os.path.isabs(place) and not Path(place).is_dir() and Path(Path(place).name).is_dir()
    return Path(place).name if moved else place


def vae_hash(name: str) -> str:
    """SHA-256 of the weights in a VAE's folder, or of a hub id's in the hub's cache; "" where they are not there."""
    folder = Path(name)
    files = [file for suffix in ("safetensors", "bin") for file in sorted(folder.glob(f"*.{suffix}"))]
    if not files and not folder.is_dir():
        try:
            from huggingface_hub import try_to_load_from_cache

            found = [
                try_to_load_from_cache(name, f"diffusion_pytorch_model.{suffix}") for suffix in ("safetensors", "bin")
            ]
        except (ImportError, ValueError):  # not there, or the name is no hub id
            return ""
        files = [Path(file) for file in found if isinstance(file, str)]
    # diffusers prefers safetensors, of which there may be several
    kind = [file for file in files if file.suffix == files[0].suffix]
    digest = hashlib.sha256()
    for file in kind:
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest() if kind else ""


def same_vae(first: tuple[str, str], second: tuple[str, str]) -> bool:
    """Whether two VAEs, each a name and its hash, are the same; where a hash is unknown, by their folders' names."""
    if first[1] and second[1]:
        return first[1] == second[1]
    return Path(first[0]).name == Path(second[0]).name


def vae_beside(space: PixelSpace | LatentSpace, folder: Path) -> PixelSpace | LatentSpace:
    """The token space of a model in `folder`: a relative path to its VAE is looked for there first."""
    if not isinstance(space, LatentSpace) or ELSEWHERE.match(space.vae) or not (folder / space.vae).is_dir():
        return space
    return dataclasses.replace(space, vae=str(folder / space.vae))


def token_space(config: PixelSpace | LatentSpace, device: torch.device | str = "cpu") -> TokenSpace:
    """The token space of a configuration."""
    return Pixels(config) if isinstance(config, PixelSpace) else Latents(config, device)
