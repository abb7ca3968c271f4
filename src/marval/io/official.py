"""Checkpoints of the official MAR code (LTH14/mar): into marval's form, and back.

An official `.pth` is a pickle with `model`, `model_ema` and the training's `args`; mirrors hold flat safetensors. The
tensors' names are the same as ours, and sizes are read off the tensors. What tensors do not say (attention heads,
image size, VAE stride, patch size) comes from the caller, from `args`, or from the presets, in that order.
"""

import argparse
import dataclasses
import pickle
import re
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from marval.config import Chain, LatentSpace, MARConfig, ModelConfig
from marval.io.checkpoint import check_tensors
from marval.io.files import atomic_path, sha256_of
from marval.model import MAR

HEADS_OF_WIDTH = {768: 12, 1024: 16, 1280: 16}  # MAR-B, -L, -H


@dataclass(frozen=True)
class Given:
    """What the caller knows of a checkpoint; None: not said."""

    heads: int | None = None
    image_size: int | None = None
    vae_stride: int | None = None
    patch_size: int | None = None

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} {value}: expected a whole number from 1")


def read_checkpoint(path: Path | str) -> dict[str, Any]:
    """What a `.pth`, `.ckpt` or `.safetensors` file (or a folder with one) holds; its tensors are memory-mapped.

    Raises:
        ValueError: no such file, a damaged one, or one that holds anything but tensors and plain values (it is not
            executed).
    """
    file = find_file(Path(path))
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt") as content:
                return {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is damaged or not a safetensors file ({error})") from None
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an unusual pickle: what follows says enough
            # Only files of torch >= 1.6 are zip archives, and only those can be mapped.
            found = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        blocked = re.search(r"GLOBAL ([\w.]+)|load ([\w.]+) whose module", str(error))
        reason = f" ({blocked[1] or blocked[2]})" if blocked else ""
        raise ValueError(f"{file} is refused: it is damaged or would run code when loaded{reason}") from None
    except Exception as error:  # bytes of any kind raise errors of any kind
        reason = [*str(error).splitlines(), type(error).__name__][0]  # some come without a text
        raise ValueError(f"{file} is damaged or not a checkpoint ({reason})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds a {type(found).__name__}: expected a checkpoint's dictionary")
    return found


def read_official(path: Path | str, ema: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the `args` (empty where there are none) of an official MAR checkpoint.

    Args:
        path: a `.pth`, a `.safetensors` file, or a folder that holds one of either.
        ema: take `model_ema` rather than `model` of a `.pth`.

    Raises:
        ValueError: as `read_checkpoint`, or a `.pth` without the wanted weights.
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


def check_weights(source: Path | str, tensors: dict[str, Tensor]) -> None:
    """Raise ValueError, with its name, where a weight is not a finite number."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{source}: {name} has {tensor.dtype}: expected floating-point weights")
        if not tensor.isfinite().all():
            raise ValueError(
                f"{source}: {name} holds values that are not finite: the training diverged or it is damaged"
            )


def find_file(path: Path) -> Path:
    """`path`, or the only checkpoint in the folder `path`.

    Raises:
        ValueError: no such file, or not exactly one.
    """
    if path.is_file():
        return path
    found = [file for suffix in ("*.safetensors", "*.pth", "*.ckpt") for file in sorted(path.glob(suffix))]
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise ValueError(f"{path}: expected a .pth or .safetensors file, or a folder with one; found {names}")
    return found[0]


def shape_of(tensors: dict[str, Tensor], name: str, dimensions: int, source: Path | str) -> torch.Size:
    """A tensor's shape.

    Raises:
        ValueError: it is missing, empty, or has another number of dimensions.
    """
    if name not in tensors:
        raise ValueError(f"{source}: tensor {name} is missing")
    shape = tensors[name].shape
    if len(shape) != dimensions or 0 in shape:
        raise ValueError(f"{source}: {name} has shape {tuple(shape)}, expected {dimensions} dimensions, none of them 0")
    return shape


def infer_space(
    tensors: dict[str, Tensor], args: dict[str, Any], given: Given, source: Path | str
) -> tuple[LatentSpace, int]:
    """Token space of an official checkpoint, and tokens a side.

    Raises:
        ValueError: a tensor that the sizes are read off is missing, or a contradiction.
    """

    def known(name: str, said: int | None, argument: str, default: int) -> int:
        recorded = args.get(argument)
        if recorded is not None and (not isinstance(recorded, int) or recorded < 1):
            raise ValueError(f"{source}: its args say {argument} {recorded!r}: expected a whole number from 1")
        if said is not None and recorded is not None and said != recorded:
            raise ValueError(f"{source}: {name} {said} contradicts the checkpoint's own {argument} {recorded}")
        return said if said is not None else recorded if recorded is not None else default

    token_dim = shape_of(tensors, "z_proj.weight", 2, source)[1]
    tokens = shape_of(tensors, "diffusion_pos_embed_learned", 3, source)[1]
    side = round(tokens**0.5)
    if side * side != tokens:
        raise ValueError(f"{source}: {tokens} tokens make no square grid")
    patch = known("patch size", given.patch_size, "patch_size", 1)
    stride = known("VAE stride", given.vae_stride, "vae_stride", 16)
    image = known("image size", given.image_size, "img_size", side * stride * patch)
    if image != side * stride * patch:
        raise ValueError(
            f"{source}: image size {image} contradicts its {side}x{side} tokens "
            f"(VAE stride {stride} x patch {patch} x {side} = {side * stride * patch})"
        )
    if token_dim % patch**2:
        raise ValueError(f"{source}: tokens of {token_dim} channels contradict patches of {patch}x{patch}")
    return LatentSpace((image, image), "kl16", stride, token_dim // patch**2, patch), side


def infer_config(
    tensors: dict[str, Tensor], args: dict[str, Any], given: Given, source: Path | str
) -> tuple[MARConfig, LatentSpace]:
    """Sizes and token space of an official checkpoint.

    Raises:
        ValueError: as `infer_space`, or heads that nothing says.
    """

    def shape(name: str, dimensions: int = 2) -> torch.Size:
        return shape_of(tensors, name, dimensions, source)

    def depth(prefix: str) -> int:
        shape(f"{prefix}.0.{'in_ln.weight' if 'res' in prefix else 'norm1.weight'}", 1)  # there is a first one
        return len({name.split(".")[prefix.count(".") + 1] for name in tensors if name.startswith(prefix + ".")})

    space, side = infer_space(tensors, args, given, source)
    width, token_dim = shape("z_proj.weight")
    decoder_width = shape("decoder_embed.weight")[0]
    heads = given.heads or HEADS_OF_WIDTH.get(width)
    decoder_heads = given.heads or HEADS_OF_WIDTH.get(decoder_width)
    if heads is None or decoder_heads is None or width % heads or decoder_width % decoder_heads:
        raise ValueError(f"{source}: widths {width} and {decoder_width} do not say the attention heads: add --heads")
    proj_dropout = args.get("proj_dropout", 0.1)
    if not isinstance(proj_dropout, int | float) or not 0 <= proj_dropout < 1:
        raise ValueError(f"{source}: its args say proj_dropout {proj_dropout!r}: expected a number from 0 to 1")
    head_width = shape("diffloss.net.input_proj.weight")[0]
    mar = MARConfig(
        token_grid=(side, side),
        token_dim=token_dim,
        num_classes=shape("class_emb.weight")[0],
        encoder_dim=width,
        encoder_depth=depth("encoder_blocks"),
        encoder_heads=heads,
        decoder_dim=decoder_width,
        decoder_depth=depth("decoder_blocks"),
        decoder_heads=decoder_heads,
        head_width=head_width,
        head_depth=depth("diffloss.net.res_blocks"),
        buffer_size=shape("encoder_pos_embed_learned", 3)[1] - side * side,
        mlp_ratio=shape("encoder_blocks.0.mlp.fc1.weight")[0] / width,
        learn_variance=shape("diffloss.net.final_layer.linear.weight")[0] == 2 * token_dim,
        dropout=float(proj_dropout),
    )
    for name, size in (("diffloss_w", head_width), ("diffloss_d", mar.head_depth), ("buffer_size", mar.buffer_size)):
        if args.get(name, size) != size:
            raise ValueError(f"{source}: its args say {name} {args[name]}, its tensors {size}")
    return mar, space


def official_model(
    path: Path | str, given: Given = Given(), *, ema: bool = True, vae: str = "kl16", vae_sha256: str = ""
) -> tuple[MAR, ModelConfig]:
    """An official checkpoint as a network (its tensors stay memory-mapped) and configuration.

    Raises:
        ValueError: as `read_official` and `infer_config`; or a missing, unknown or misshapen tensor, or one
            that is not finite.
    """
    tensors, args = read_official(path, ema)
    mar, space = infer_config(tensors, args, given, path)
    try:
        draw = Chain(guidance=float(args.get("cfg", 1.0)), guidance_schedule=args.get("cfg_schedule", "linear"))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: its args say how to draw, but not in a way that is known ({error})") from None
    space = dataclasses.replace(space, vae=vae, vae_sha256=vae_sha256)
    with torch.device("meta"):
        model = MAR(mar)
    check_tensors(path, tensors, model.state_dict())
    check_weights(path, tensors)
    model.load_state_dict(tensors, strict=True, assign=True)
    from marval.data.imagenet import imagenet_classes  # here: the data read token spaces, which read this room

    imagenet = tuple(imagenet_classes().values())
    names = imagenet if mar.num_classes == len(imagenet) else tuple(str(i) for i in range(mar.num_classes))
    config = ModelConfig(mar, space, draw, names, 64, Path(path).stem, source=f"{path} sha256 {file_hash(path)}")
    return model.eval().requires_grad_(False), config


def save_official(file: Path | str, model: MAR) -> None:
    """Write a network as an official `.pth`: the same tensors as `model` and `model_ema`.

    Raises:
        ValueError: a weight is not finite, or the file cannot be written.
    """
    tensors = {name: t.detach().cpu() for name, t in model.state_dict().items()}
    check_weights(f"cannot write {file}", tensors)
    with atomic_path(file) as partial:
        try:
            torch.save({"model": tensors, "model_ema": tensors}, partial)  # shared storage is written once
        except RuntimeError as error:
            raise OSError(str(error).splitlines()[0]) from error


def file_hash(path: Path | str) -> str:
    """SHA-256 of a checkpoint's file, read in pieces."""
    return sha256_of(find_file(Path(path)))
