"""Checkpoints of the official MAR code (LTH14/mar), into marval's form.

An official `.pth` is a pickle with `model`, `model_ema` and the training's `args`; mirrors hold flat safetensors. The
tensors have the same names as ours, and sizes are read off the tensors. What tensors do not say comes from `args` (VAE
stride, patch size) and the caller (attention heads), or is as in MAR-B, -L and -H.
"""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from marval.config import Chain, LatentSpace, MARConfig, ModelConfig
from marval.io.checkpoint import check_tensors, find_file, read_checkpoint, save_model
from marval.io.files import asset, check_replace, sha256_of
from marval.io.vae import vae_hash, vae_place
from marval.model import MAR

HEADS_OF_WIDTH = {768: 12, 1024: 16, 1280: 16}  # MAR-B, -L, -H


@functools.cache
def imagenet_classes() -> dict[str, str]:
    """WordNet id to name, such as "n01440764" to "tench", of ImageNet's 1000 classes in the order of their numbers.

    The names are WordNet's first lemmas, made unique ("crane" is two classes).
    """
    text = asset("imagenet-classes.tsv").read_text()
    return dict(line.split("\t") for line in text.splitlines())


def official_model(
    path: Path | str, heads: int | None = None, *, vae: str = "kl16", vae_sha256: str = ""
) -> tuple[MAR, ModelConfig]:
    """Read an official checkpoint as a network (its averaged tensors stay memory-mapped) and a configuration.

    Args:
        path: a `.pth`, a `.safetensors` file, or a folder that holds one of either.
        heads: attention heads, where the widths are not those of MAR-B, -L or -H.

    Raises:
        ValueError: as `read_checkpoint` and `check_tensors`; sizes that contradict each other or that nothing says.
    """
    file = find_file(Path(path))
    tensors, args = read_checkpoint(file), dict[str, Any]()
    if file.suffix != ".safetensors":
        args, tensors = getattr(tensors.get("args"), "__dict__", {}), tensors.get("model_ema", {})
    mar, space = infer_config(tensors, args, heads, file)
    draw = Chain(guidance=float(args.get("cfg", 1.0)), guidance_schedule=args.get("cfg_schedule", "linear"))
    with torch.device("meta"):
        model = MAR(mar)
    check_tensors(file, tensors, model.state_dict())
    model.load_state_dict(tensors, strict=True, assign=True)
    names = tuple(imagenet_classes().values() if mar.num_classes == 1000 else map(str, range(mar.num_classes)))
    space = dataclasses.replace(space, vae=vae, vae_sha256=vae_sha256)
    source = f"{path} sha256 {sha256_of(file)}"
    config = ModelConfig(mar, space, draw, names, 64, Path(path).stem, source=source)
    return model.eval().requires_grad_(False), config


def infer_config(
    tensors: dict[str, Tensor], args: dict[str, Any], heads: int | None, source: Path | str
) -> tuple[MARConfig, LatentSpace]:
    """Read the sizes and the token space of an official checkpoint off its tensors and `args`."""

    def shape(name: str, dimensions: int = 2) -> torch.Size:
        if name not in tensors or tensors[name].ndim != dimensions or not tensors[name].numel():
            raise ValueError(f"{source}: tensor {name} of an official MAR checkpoint is missing or of another shape")
        return tensors[name].shape

    def depth(blocks: str) -> int:
        return len({name.removeprefix(f"{blocks}.").split(".")[0] for name in tensors if name.startswith(f"{blocks}.")})

    width, token_dim = shape("z_proj.weight")
    space = _infer_space(shape("diffusion_pos_embed_learned", 3)[1], token_dim, args, source)
    decoder_width, head_width = shape("decoder_embed.weight")[0], shape("diffloss.net.input_proj.weight")[0]
    encoder_heads, decoder_heads = (heads or HEADS_OF_WIDTH.get(side) for side in (width, decoder_width))
    if encoder_heads is None or decoder_heads is None:
        raise ValueError(f"{source}: widths {width} and {decoder_width} do not say the attention heads: add --heads")
    mar = MARConfig(
        space.token_grid, token_dim, num_classes=shape("class_emb.weight")[0],
        encoder_dim=width, encoder_depth=depth("encoder_blocks"), encoder_heads=encoder_heads,
        decoder_dim=decoder_width, decoder_depth=depth("decoder_blocks"), decoder_heads=decoder_heads,
        head_width=head_width, head_depth=depth("diffloss.net.res_blocks"),
        buffer_size=shape("encoder_pos_embed_learned", 3)[1] - math.prod(space.token_grid),
        mlp_ratio=shape("encoder_blocks.0.mlp.fc1.weight")[0] / width,
        learn_variance=shape("diffloss.net.final_layer.linear.weight")[0] == 2 * token_dim,
        dropout=args.get("proj_dropout", 0.1),
    )  # fmt: skip
    return mar, space


def _infer_space(tokens: int, token_dim: int, args: dict[str, Any], source: Path | str) -> LatentSpace:
    """Find how latents become that many tokens of so many channels."""
    side, patch, stride = math.isqrt(tokens), args.get("patch_size", 1), args.get("vae_stride", 16)
    image = side * stride * patch
    if side * side != tokens or token_dim % patch**2 or args.get("img_size", image) != image:
        raise ValueError(
            f"{source}: {tokens} tokens of {token_dim} channels, a patch size of {patch}, a VAE stride of {stride} and "
            f"images of {args.get('img_size', image)} pixels contradict each other"
        )
    return LatentSpace((image, image), "kl16", stride, token_dim // patch**2, patch)


def convert_mar(source: Path | str, out: Path, heads: int | None, *, vae: str = "kl16", force: bool = False) -> None:
    """Convert an official checkpoint to a model folder (see `official_model`); `force` writes over one."""
    check_replace(out, source=find_file(Path(source)), folder=True, force=force)
    vae = vae_place(vae)
    save_model(out, *official_model(source, heads, vae=vae, vae_sha256=vae_hash(vae)))
