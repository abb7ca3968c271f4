"""VAEs: find and load one, and convert the KL-16 of the official MAR code to a diffusers `AutoencoderKL` folder."""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from marval.config import LatentSpace, PixelSpace
from marval.io.checkpoint import check_tensors, find_file, read_checkpoint
from marval.io.files import asset, atomic_folder, check_replace, one_line, sha256_of
from marval.io.hub import HUB_ID


def load_vae(name: str, device: torch.device | str = "cpu", *, download: bool = False) -> Any:
    """Load a frozen VAE: a folder in diffusers' form, a bundled one, or a hub id. Its weights are safetensors only.

    Args:
        download: fetch a hub id; only where a person typed it, not where a model's file names it. Without, what
            `hf download` put into the local cache is found.
    """
    folder = bundled_vae(name) or Path(name)
    if not (is_folder := folder.is_dir()) and not HUB_ID.fullmatch(name):
        raise ValueError(f"the VAE {name[:200]!r} is no folder here, nor a hub id: name a folder in diffusers' form")
    from diffusers import AutoencoderKL  # it takes seconds

    try:
        place = folder if is_folder else name
        vae = AutoencoderKL.from_pretrained(
            place, local_files_only=not download, use_safetensors=True, low_cpu_mem_usage=False
        )
        return vae.to(device).eval().requires_grad_(False)
    except (OSError, ValueError, TypeError, RuntimeError, LookupError) as error:
        advice = "" if download or is_folder else f"nothing is fetched that a file names: hf download {name}; or "
        raise ValueError(
            f"the VAE {name!r} cannot be loaded ({one_line(error)}): {advice}name a folder that marval convert vae made"
        ) from error


def bundled_vae(name: str) -> Path | None:
    """Find the folder of a VAE that ships with the package; models keep its name, which is good on any machine."""
    folder = asset(name)
    return folder if name == folder.name and folder.is_dir() else None


def vae_place(name: str) -> str:
    """Name a VAE that a person typed: a folder by its absolute path, good from anywhere; a bundled one; or a hub id."""
    return os.path.abspath(name) if Path(name).is_dir() else name


def vae_hash(name: str) -> str:
    """Compute the SHA-256 of the weights in a VAE's folder, or of a hub id's in the hub's cache; "" without weights."""
    folder = bundled_vae(name) or Path(name)
    files = sorted(folder.glob("*.safetensors"))
    with contextlib.suppress(ValueError):  # the name is no hub id
        from huggingface_hub import try_to_load_from_cache

        cached = None if folder.is_dir() else try_to_load_from_cache(name, "diffusion_pytorch_model.safetensors")
        files = [Path(cached)] if isinstance(cached, str) else files
    digests = b"".join(bytes.fromhex(sha256_of(file)) for file in files)
    return hashlib.sha256(digests).hexdigest() if files else ""


def find_vae(space: PixelSpace | LatentSpace, folder: Path) -> PixelSpace | LatentSpace:
    """Look for a model's VAE by its path and then by its name, each in the model's folder and in the current one.

    A bundled one is looked for in the model's folder only, where a model of yours may have another of its name.
    """
    if isinstance(space, LatentSpace) and (name := Path(space.vae).name):
        places = folder / space.vae, Path(space.vae), folder / name, Path(name)
        for place in places[:1] if bundled_vae(space.vae) else places:
            if place.is_dir():
                return dataclasses.replace(space, vae=str(place.absolute()))
    return space


# latent-diffusion's names, and those of diffusers; the decoder's levels are counted from the other end.
RENAMED = (
    (r"^(encoder\.down|decoder\.up)\.(\d+)\.block\.", r"\1_blocks.\2.resnets."),
    (r"^(encoder\.down|decoder\.up)\.(\d+)\.attn\.", r"\1_blocks.\2.attentions."),
    (r"^(encoder\.down|decoder\.up)\.(\d+)\.(down|up)sample\.", r"\1_blocks.\2.\3samplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"coder\.norm_out\.", "coder.conv_norm_out."),
)


def diffusers_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename latent-diffusion's tensors to diffusers' names; attention's 1x1 convolutions become linear layers."""
    levels = 1 + max((int(m[1]) for name in tensors if (m := re.match(r"decoder\.up\.(\d+)\.", name))), default=0)
    renamed = {}
    for name, tensor in tensors.items():
        new = re.sub(r"^decoder\.up\.(\d+)\.", lambda m: f"decoder.up.{levels - 1 - int(m[1])}.", name)
        for pattern, replacement in RENAMED:
            new = re.sub(pattern, replacement, new)
        renamed[new] = tensor[..., 0, 0] if "attentions" in new and tensor.ndim == 4 else tensor
    return renamed


def infer_vae_config(tensors: dict[str, Tensor], source: Path | str) -> dict[str, Any]:
    """Read the arguments of diffusers' `AutoencoderKL` off the shapes of weights in latent-diffusion's format."""
    first, last, level = "encoder.conv_in.weight", "post_quant_conv.weight", "encoder.down.{}.block.0.conv2.weight"
    for name in (first, last):
        if name not in tensors:
            raise ValueError(f"{source}: tensor {name} is missing: expected a KL autoencoder such as kl16.ckpt")
    channels: list[int] = []
    while (name := level.format(len(channels))) in tensors:
        channels.append(tensors[name].shape[0])
    down, up = (
        [f"{'Attn' * (f'{side}.{i}.attn.0.q.weight' in tensors)}{kind}" for i in range(len(channels))]
        for side, kind in (("encoder.down", "DownEncoderBlock2D"), ("decoder.up", "UpDecoderBlock2D"))
    )
    pixels = tensors[first].shape[1]
    return {
        "in_channels": pixels, "out_channels": pixels, "latent_channels": tensors[last].shape[0],
        "down_block_types": down, "up_block_types": up[::-1], "block_out_channels": channels,
        "layers_per_block": sum(f"encoder.down.0.block.{i}.conv1.weight" in tensors for i in range(16)),
        "act_fn": "silu", "norm_num_groups": 32, "sample_size": 256, "scaling_factor": 0.2325,
    }  # fmt: skip


def convert_vae(path: Path | str, out: Path | str, force: bool = False) -> None:
    """Write a latent-diffusion autoencoder as a diffusers folder, whole or not at all; `force` writes over one.

    Raises:
        ValueError: as `read_checkpoint` and `check_tensors`; or the folder exists or cannot be written.
    """
    from diffusers import AutoencoderKL

    out, file = Path(out), find_file(Path(path))
    check_replace(out, source=file, folder=True, force=force)
    content = read_checkpoint(path)
    content = content.get("model", content.get("state_dict", content))
    tensors = {name: t for name, t in content.items() if isinstance(t, Tensor) and not name.startswith("loss.")}
    with torch.device("meta"):
        vae = AutoencoderKL(**infer_vae_config(tensors, path))
    renamed = diffusers_tensors(tensors)
    check_tensors(path, renamed, vae.state_dict())
    vae.load_state_dict(renamed, strict=True, assign=True)
    with atomic_folder(out) as partial:
        vae.save_pretrained(partial)
        about = {"source": str(file), "sha256": sha256_of(file)}
        (partial / "source.json").write_text(json.dumps(about, indent=1) + "\n")
