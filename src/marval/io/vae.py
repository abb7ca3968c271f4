"""The KL-16 autoencoder of the official MAR code (latent-diffusion's format) as a diffusers `AutoencoderKL` folder."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from marval.io.checkpoint import check_tensors
from marval.io.files import atomic_folder, check_replace, sha256_of
from marval.io.official import check_weights, find_file, read_checkpoint

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
