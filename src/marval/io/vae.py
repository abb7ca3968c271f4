"""VAEs: find and load one, and convert the KL-16 of the official MAR code to a diffusers `AutoencoderKL` folder."""

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
from marval.io.checkpoint import check_tensors
from marval.io.files import atomic_folder, check_replace, sha256_of
from marval.io.hub import HUB_ID
from marval.io.official import check_weights, find_file, read_checkpoint

ELSEWHERE = re.compile(r"[\\/]{2}")  # at the start of a path: another machine, which Windows would log in to
FILES = ("config.json", "diffusion_pytorch_model.safetensors", "source.json")

# latent-diffusion's names, and those of diffusers; the decoder's levels are counted from the other end.
RENAMED = (
    (r"^encoder\.down\.(\d+)\.block\.(\d+)\.", r"encoder.down_blocks.\1.resnets.\2."),
    (r"^encoder\.down\.(\d+)\.attn\.(\d+)\.", r"encoder.down_blocks.\1.attentions.\2."),
    (r"^encoder\.down\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0."),
    (r"^decoder\.up\.(\d+)\.block\.(\d+)\.", r"decoder.up_blocks.\1.resnets.\2."),
    (r"^decoder\.up\.(\d+)\.attn\.(\d+)\.", r"decoder.up_blocks.\1.attentions.\2."),
    (r"^decoder\.up\.(\d+)\.upsample\.", r"decoder.up_blocks.\1.upsamplers.0."),
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
    """The same weights under diffusers' names; attention's 1x1 convolutions become linear layers."""
    levels = 1 + max((int(m[1]) for name in tensors if (m := re.match(r"decoder\.up\.(\d+)\.", name))), default=0)
    found = {}
    for name, tensor in tensors.items():
        new = re.sub(r"^decoder\.up\.(\d+)\.", lambda m: f"decoder.up.{levels - 1 - int(m[1])}.", name)
        for pattern, replacement in RENAMED:
            new = re.sub(pattern, replacement, new)
        found[new] = tensor[..., 0, 0] if "attentions" in new and tensor.ndim == 4 else tensor
    return found


def infer_vae_config(tensors: dict[str, Tensor], source: Path | str) -> dict[str, Any]:
    """The arguments of diffusers' `AutoencoderKL` for weights in latent-diffusion's format.

    Raises:
        ValueError: a tensor that the sizes are read off is missing.
    """
    for name in ("encoder.conv_in.weight", "encoder.down.0.block.0.conv2.weight", "post_quant_conv.weight"):
        if name not in tensors or tensors[name].ndim != 4:
            raise ValueError(
                f"{source}: tensor {name} is missing or no convolution's: expected a KL autoencoder such as kl16.ckpt"
            )
    channels: list[int] = []
    while (name := f"encoder.down.{len(channels)}.block.0.conv2.weight") in tensors:
        channels.append(tensors[name].shape[0])
    levels = range(len(channels))

    def attention(side: str, level: int) -> str:
        return "Attn" if f"{side}.{level}.attn.0.q.weight" in tensors else ""

    return {
        "in_channels": tensors["encoder.conv_in.weight"].shape[1],
        "out_channels": tensors["encoder.conv_in.weight"].shape[1],
        "down_block_types": [f"{attention('encoder.down', i)}DownEncoderBlock2D" for i in levels],
        "up_block_types": [f"{attention('decoder.up', i)}UpDecoderBlock2D" for i in reversed(levels)],
        "block_out_channels": channels,
        "layers_per_block": sum(f"encoder.down.0.block.{i}.conv1.weight" in tensors for i in range(16)),
        "latent_channels": tensors["post_quant_conv.weight"].shape[0],
        "act_fn": "silu",
        "norm_num_groups": 32,
        "sample_size": 256,
        "scaling_factor": 0.2325,
    }  # fmt: skip


def convert_vae(path: Path | str, out: Path | str, force: bool = False) -> None:
    """Write a latent-diffusion autoencoder as a diffusers folder, whole or not at all; its tensors stay memory-mapped.

    Args:
        force: write over the files of a folder that exists.

    Raises:
        ValueError: as `read_checkpoint`; a missing, unknown or misshapen tensor, or one that is not finite; diffusers
            is not installed; or the folder exists or cannot be written.
    """
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise ValueError("converting a VAE needs diffusers: pip install diffusers transformers") from error
    out, file = Path(out), find_file(Path(path))
    check_replace(out, [out / name for name in FILES], read=file, force=force)
    content = read_checkpoint(path)
    content = content.get("model", content.get("state_dict", content))
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__} for its weights: expected a dictionary of tensors")
    tensors = {name: t for name, t in content.items() if isinstance(t, Tensor) and not name.startswith("loss.")}
    config = infer_vae_config(tensors, path)
    with torch.device("meta"):
        vae = AutoencoderKL(**config)
    renamed = diffusers_tensors(tensors)
    check_tensors(path, renamed, vae.state_dict())
    check_weights(path, renamed)
    vae.load_state_dict(renamed, strict=True, assign=True)
    with atomic_folder(out) as partial:
        vae.save_pretrained(partial)
        about = {"source": str(file), "sha256": sha256_of(file)}
        (partial / "source.json").write_text(json.dumps(about, indent=1) + "\n")


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
