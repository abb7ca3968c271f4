"""Checkpoints of the official MAR code (LTH14/mar): into marval's form, and back.

An official `.pth` is a pickle with `model`, `model_ema` and the training's `args`; mirrors hold flat safetensors. The
tensors have the same names as ours, and sizes are read off the tensors. What tensors do not say (attention heads,
image size, VAE stride, patch size) comes from the caller, from `args`, or from MAR-B, -L and -H, in that order.
"""

import argparse
import dataclasses
import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from marval.config import Chain, LatentSpace, MARConfig, ModelConfig
from marval.io.checkpoint import check_tensors, find_file, load_model, read_checkpoint, save_model, weights_file
from marval.io.files import asset, atomic_path, check_replace, sha256_of
from marval.io.vae import vae_hash, vae_place
from marval.model import MAR

HEADS_OF_WIDTH = {768: 12, 1024: 16, 1280: 16}  # MAR-B, -L, -H


@dataclass(frozen=True)
class Hints:
    """What the caller knows of a checkpoint; None: unknown."""

    heads: int | None = None
    image_size: int | None = None
    vae_stride: int | None = None
    patch_size: int | None = None


@functools.cache
def imagenet_classes() -> dict[str, str]:
    """WordNet id to name, such as "n01440764" to "tench", of ImageNet's 1000 classes in the order of their numbers.

    The names are WordNet's first lemmas, made unique ("crane" is two classes).
    """
    text = asset("imagenet-classes.tsv").read_text()
    return dict(line.split("\t") for line in text.splitlines())


def read_official(path: Path | str, ema: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and the `args` (empty where there are none) of an official MAR checkpoint.

    Args:
        path: a `.pth`, a `.safetensors` file, or a folder that holds one of either.
        ema: take `model_ema` rather than `model` of a `.pth`.
    """
    content = read_checkpoint(path)
    if find_file(Path(path)).suffix == ".safetensors":
        return content, {}
    key = "model_ema" if ema else "model"
    tensors, args = content.get(key), content.get("args")
    if not isinstance(tensors, dict):
        raise ValueError(f"{path} has no {key}: expected an official MAR checkpoint with model, model_ema and args")
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{path}: {name} in {key} is a {type(value).__name__}: expected a tensor")
    return tensors, dict(vars(args)) if isinstance(args, argparse.Namespace) else {}


def official_model(
    path: Path | str, hints: Hints = Hints(), *, ema: bool = True, vae: str = "kl16", vae_sha256: str = ""
) -> tuple[MAR, ModelConfig]:
    """Read an official checkpoint as a network (its tensors stay memory-mapped) and a configuration.

    Raises:
        ValueError: as `read_checkpoint` and `check_tensors`; a contradiction, or sizes that nothing says.
    """
    tensors, args = read_official(path, ema)
    mar, space = infer_config(tensors, args, hints, path)
    try:
        draw = Chain(guidance=float(args.get("cfg", 1.0)), guidance_schedule=args.get("cfg_schedule", "linear"))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: its args say how to draw, but not in a way that is known ({error})") from None
    with torch.device("meta"):
        model = MAR(mar)
    check_tensors(path, tensors, model.state_dict())
    model.load_state_dict(tensors, strict=True, assign=True)
    names = tuple(imagenet_classes().values() if mar.num_classes == 1000 else map(str, range(mar.num_classes)))
    space = dataclasses.replace(space, vae=vae, vae_sha256=vae_sha256)
    source = f"{path} sha256 {sha256_of(find_file(Path(path)))}"
    config = ModelConfig(mar, space, draw, names, 64, Path(path).stem, source=source)
    return model.eval().requires_grad_(False), config


def infer_config(
    tensors: dict[str, Tensor], args: dict[str, Any], hints: Hints, source: Path | str
) -> tuple[MARConfig, LatentSpace]:
    """Read the sizes and the token space of an official checkpoint off its tensors and `args`."""

    def shape(name: str, dimensions: int = 2) -> torch.Size:
        size = tensors[name].shape if name in tensors else None
        if size is None or len(size) != dimensions or 0 in size:
            problem = "is missing" if size is None else f"has shape {tuple(size)}"
            raise ValueError(f"{source}: tensor {name} {problem}: expected {dimensions} dimensions, none of them 0")
        return size

    def depth(blocks: str, first: str) -> int:
        shape(f"{blocks}.0.{first}", 1)  # there is a first one
        return len({name.removeprefix(f"{blocks}.").split(".")[0] for name in tensors if name.startswith(f"{blocks}.")})

    width, token_dim = shape("z_proj.weight")
    space = _infer_space(shape("diffusion_pos_embed_learned", 3)[1], token_dim, args, hints, source)
    decoder_width, head_width = shape("decoder_embed.weight")[0], shape("diffloss.net.input_proj.weight")[0]
    heads, decoder_heads = (hints.heads or HEADS_OF_WIDTH.get(side) for side in (width, decoder_width))
    if heads is None or decoder_heads is None or width % heads or decoder_width % decoder_heads:
        raise ValueError(f"{source}: widths {width} and {decoder_width} do not say the attention heads: add --heads")
    dropout = args.get("proj_dropout", 0.1)
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ValueError(f"{source}: its args say proj_dropout {dropout!r}: expected a number from 0 to 1")
    mar = MARConfig(
        space.token_grid, token_dim, num_classes=shape("class_emb.weight")[0],
        encoder_dim=width, encoder_depth=depth("encoder_blocks", "norm1.weight"), encoder_heads=heads,
        decoder_dim=decoder_width, decoder_depth=depth("decoder_blocks", "norm1.weight"), decoder_heads=decoder_heads,
        head_width=head_width, head_depth=depth("diffloss.net.res_blocks", "in_ln.weight"),
        buffer_size=shape("encoder_pos_embed_learned", 3)[1] - math.prod(space.token_grid),
        mlp_ratio=shape("encoder_blocks.0.mlp.fc1.weight")[0] / width,
        learn_variance=shape("diffloss.net.final_layer.linear.weight")[0] == 2 * token_dim,
        dropout=float(dropout),
    )  # fmt: skip
    for name, size in (("diffloss_w", head_width), ("diffloss_d", mar.head_depth), ("buffer_size", mar.buffer_size)):
        if args.get(name, size) != size:
            raise ValueError(f"{source}: its args say {name} {args[name]}, its tensors {size}")
    return mar, space


def _infer_space(tokens: int, token_dim: int, args: dict[str, Any], hints: Hints, source: Path | str) -> LatentSpace:
    """Find how latents become that many tokens of so many channels."""

    def size(name: str, hint: int | None, default: int) -> int:
        recorded = args.get(name)
        if recorded is not None and (not isinstance(recorded, int) or recorded < 1):
            raise ValueError(f"{source}: its args say {name} {recorded!r}: expected a whole number from 1")
        if None not in (hint, recorded) and hint != recorded:
            raise ValueError(f"{source}: {name} {hint} contradicts the checkpoint's own args, {recorded}")
        return hint or recorded or default

    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ValueError(f"{source}: {tokens} tokens make no square grid")
    patch = size("patch_size", hints.patch_size, 1)
    stride = size("vae_stride", hints.vae_stride, 16)
    image = size("img_size", hints.image_size, side * stride * patch)
    if image != side * stride * patch:
        raise ValueError(
            f"{source}: image size {image} contradicts its {side}x{side} tokens "
            f"(VAE stride {stride} x patch {patch} x {side} = {side * stride * patch})"
        )
    if token_dim % patch**2:
        raise ValueError(f"{source}: tokens of {token_dim} channels contradict patches of {patch}x{patch}")
    return LatentSpace((image, image), "kl16", stride, token_dim // patch**2, patch)


def convert_mar(
    source: Path | str, out: Path, hints: Hints = Hints(), *, ema: bool = True, vae: str = "kl16", force: bool = False
) -> None:
    """Convert an official checkpoint to a model folder (see `official_model`); `force` writes over one."""
    check_replace(out, source=find_file(Path(source)), folder=True, force=force)
    save_model(out, *official_model(source, hints, ema=ema, vae=vae_place(vae), vae_sha256=vae_hash(vae)))


def convert_to_mar(source: Path, out: Path, *, force: bool = False) -> None:
    """Convert a model (a folder or its weights) to an official `.pth`: the same tensors as `model` and `model_ema`."""
    if out.suffix == ".safetensors":
        raise ValueError(f"{out}: official checkpoints are pickles; choose a name that ends in .pth")
    check_replace(out, source=weights_file(source), folder=False, force=force)
    tensors = dict(load_model(source)[0].state_dict())
    with atomic_path(out) as partial:
        try:
            torch.save({"model": tensors, "model_ema": tensors}, partial)  # shared storage is written once
        except RuntimeError as error:
            raise OSError(str(error).splitlines()[0]) from error
