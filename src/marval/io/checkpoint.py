"""Models on disk: a folder with `model.safetensors` (which carries its configuration) and a readable `config.json`."""

import argparse
import contextlib
import hashlib
import json
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from marval.checks import shorten
from marval.config import ModelConfig
from marval.io.files import one_line, sha256_of, write_tensors, write_text
from marval.model import MAR

WEIGHTS = "model.safetensors"
MOST_PIXELS = 2**26  # of a model's pictures: 8192 x 8192


def save_model(folder: Path | str, model: MAR, config: ModelConfig, dtype: torch.dtype = torch.float32) -> None:
    """Write weights and configuration; the file of the weights alone is a whole model."""
    weights = dict(model.named_parameters())  # a vocabulary is in half precision and stays so
    tensors = {name: t.detach().to("cpu", dtype if name in weights else None) for name, t in model.state_dict().items()}
    save_tensors(folder, tensors, config)


def save_tensors(folder: Path | str, tensors: dict[str, Tensor], config: ModelConfig) -> None:
    """Write the tensors of a network's `state_dict` (on the CPU) as `save_model` does."""
    folder, text = Path(folder), json.dumps(config.to_dict(), indent=2)
    write_tensors(folder / WEIGHTS, tensors, {"format": "pt", "marval": text})
    write_text(folder / "config.json", text + "\n")


def load_model(path: Path | str, device: torch.device | str = "cpu") -> tuple[MAR, ModelConfig]:
    """Read a model folder (or its `.safetensors` file) into an evaluation-mode float32 network.

    Raises:
        ValueError: no such file, a damaged one, or tensors that do not fit the configuration inside.
    """
    file = weights_file(Path(path))
    try:
        with safe_open(file, framework="pt") as content:
            metadata, names = content.metadata() or {}, list(content.keys())
            if "marval" not in metadata:
                raise ValueError("no configuration of marval is inside")
            config = ModelConfig.from_dict(add_guidance(json.loads(metadata["marval"]), file))
            _check_config(config, len(names))
            with torch.device("meta"):
                model = MAR(config.mar)
            tensors = {name: content.get_tensor(name) for name in names}
    except Exception as error:  # a stranger's bytes raise errors of any kind
        raise ValueError(f"{file} is damaged or no model of marval ({one_line(error)})") from None
    expected = model.state_dict()
    check_tensors(file, tensors, expected)
    model.load_state_dict({name: t.to(expected[name].dtype) for name, t in tensors.items()}, strict=True, assign=True)
    return model.to(device).eval().requires_grad_(False), config


def _check_config(config: ModelConfig, tensors: int) -> None:
    """Check a stranger's configuration, of a file with so many tensors, before anything is built by its numbers."""
    mar, space = config.mar, config.space
    for place in (config.data, config.encoder, getattr(space, "vae", "")):
        if re.search(r"(^|:)[\\/]{2}", place):  # Windows would log in to another machine
            raise ValueError(f"it names {shorten(place)}: expected a place on this machine")
    if mar.buffer_size < 1:
        raise ValueError(f"a buffer of {mar.buffer_size} tokens: expected at least 1")
    if space.image_size[0] * space.image_size[1] > MOST_PIXELS:
        raise ValueError(f"pictures of {space.image_size[1]}x{space.image_size[0]} pixels")
    if (depth := mar.encoder_depth + mar.decoder_depth + mar.head_depth) > tensors:
        raise ValueError(f"{depth} blocks, but {tensors} tensors")
    if (space.token_grid, space.token_dim) != (mar.token_grid, mar.token_dim):
        sizes = (space.token_grid, space.token_dim), (mar.token_grid, mar.token_dim)
        raise ValueError(f"pictures of tokens {sizes[0]}, but a network for tokens {sizes[1]}")


def check_tensors(file: Path | str, tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Raise a ValueError that names the first missing, unknown or misshapen tensor, or one with NaN or infinity."""
    for name, tensor in expected.items():
        if name not in tensors:
            raise ValueError(f"{file}: tensor {name} is missing")
        if tensors[name].shape != tensor.shape:
            raise ValueError(f"{file}: {name} has shape {tuple(tensors[name].shape)}, expected {tuple(tensor.shape)}")
    if unknown := sorted(tensors.keys() - expected.keys()):
        raise ValueError(f"{file}: unknown tensor {unknown[0]}")
    for name, tensor in tensors.items():  # aminmax makes no copy of the tensor
        if tensor.is_floating_point() and tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
            raise ValueError(f"{file}: {name} holds values that are not finite (NaN or infinity): this model is broken")


def find_file(path: Path) -> Path:
    """Find a checkpoint: the file `path`, or the only one in the folder `path`."""
    if path.is_file():
        return path
    files = [file for suffix in ("*.safetensors", "*.pth", "*.ckpt") for file in sorted(path.glob(suffix))]
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "none"
        raise ValueError(f"{path}: expected a .pth or .safetensors file, or a folder with one; found {names}")
    return files[0]


def read_checkpoint(path: Path | str) -> dict[str, Any]:
    """Read a `.pth`, `.ckpt` or `.safetensors` file (or a folder with one); its tensors are memory-mapped.

    Raises:
        ValueError: no such file, or it holds anything but tensors and plain values (it is not executed).
    """
    file = find_file(Path(path))
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as content:
                return {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an unusual pickle: what follows says enough
            # Only files of torch >= 1.6 are zip archives, and only those can be mapped.
            return dict(torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)))
    except Exception:  # bytes of any kind raise errors of any kind
        raise ValueError(f"{file} is refused: it is damaged, no checkpoint, or would run code when loaded") from None


def weights_file(path: Path) -> Path:
    """Find the weights of a model: the file itself, or the one in a folder."""
    file = path / WEIGHTS if path.is_dir() else path
    if not file.is_file():  # a device or a pipe could be read for ever
        raise ValueError(f"{file} does not exist, or is no file")
    return file


def add_guidance(about: dict[str, Any], file: Path) -> dict[str, Any]:
    """Add the guidance that a student was distilled with, where only `config.json` beside the weights says it.

    Older weights lack it. They are not written anew: results and recipes know them by their SHA-256.
    """
    draw, beside = about.get("draw"), file.parent / "config.json"
    if isinstance(draw, dict) and draw.get("kind") == "one_step" and "guidance" not in draw and beside.is_file():
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            other = json.loads(beside.read_text())["draw"]
            known = {name: other[name] for name in ("guidance", "guidance_schedule")}
            return {**about, "draw": {**draw, **known}}
    return about


def model_hash(folder: Path) -> str:
    """Compute the SHA-256 of a model's file of weights."""
    return sha256_of(weights_file(folder))


def weights_hash(network: nn.Module) -> str:
    """Compute the SHA-256 of a network's weights: names and values, however they are stored."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
