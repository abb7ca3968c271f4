"""Models on disk: a folder with `model.safetensors` (which carries its configuration) and a readable `config.json`."""

import contextlib
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from marval.config import ModelConfig
from marval.io.fields import check_fields, shorten, told
from marval.io.files import sha256_of, write_tensors, write_text
from marval.model import MAR

WEIGHTS = "model.safetensors"
MOST_PIXELS = 2**26  # of a model's pictures: 8192 x 8192


def save_model(folder: Path | str, model: MAR, config: ModelConfig, dtype: torch.dtype = torch.float32) -> None:
    """Write weights and configuration; the weights' file alone is a whole model.

    Raises:
        ValueError: the folder cannot be written to, or the disk is full.
    """
    save_tensors(folder, {name: t.detach().to("cpu", dtype) for name, t in model.state_dict().items()}, config)


def save_tensors(folder: Path | str, tensors: dict[str, Tensor], config: ModelConfig) -> None:
    """As `save_model`, from the tensors of a network's `state_dict` on the CPU."""
    folder = Path(folder)
    text = json.dumps(config.to_dict(), indent=2)
    write_tensors(folder / WEIGHTS, tensors, {"format": "pt", "marval": text})
    write_text(folder / "config.json", text + "\n")


def load_model(path: Path | str, device: torch.device | str = "cpu") -> tuple[MAR, ModelConfig]:
    """Read a model folder (or its `.safetensors` file) into an evaluation-mode float32 network.

    Raises:
        ValueError: no such file, a damaged one, one without marval's configuration, or one whose tensors
            do not fit the configuration.
    """
    path = Path(path)
    file = weights_file(path)
    tensors, config = read_tensors(file)
    model = empty_model(file, config)
    check_tensors(file, tensors, model.state_dict())
    model.load_state_dict({name: t.float() for name, t in tensors.items()}, strict=True, assign=True)
    return model.to(device).eval().requires_grad_(False), config


def empty_model(file: Path, config: ModelConfig) -> MAR:
    """The network of a configuration that a file holds, without memory for its weights.

    Raises:
        ValueError: a network of these sizes cannot be built.
    """
    try:
        with torch.device("meta"):
            return MAR(config.mar)
    except (RuntimeError, ValueError, TypeError, ArithmeticError, AssertionError) as error:
        raise ValueError(f"{file}: no network has the sizes in its configuration ({told(error)})") from None


def check_config(config: ModelConfig, tensors: int) -> None:
    """Check a configuration from a file that holds so many tensors, before anything is built by its numbers.

    What must hold of every configuration it has checked itself, when it was made.

    Raises:
        ValueError: a value of another type or out of range, or parts that do not fit each other.
    """
    check_fields(config)
    if re.search(r"[/\\\x00-\x1f\x7f]|^\.", config.name) or len(config.name) > 100:
        raise ValueError(f"its name is {shorten(config.name)}: expected a plain name, which can name a file")
    if re.search(r"(^|:)[\\/]{2}", config.data):  # Windows would log in to another machine
        raise ValueError(f"its data are {shorten(config.data)}: expected a place on this machine")
    mar, space = config.mar, config.space
    depth = mar.encoder_depth + mar.decoder_depth + mar.head_depth
    if mar.buffer_size < 1:
        raise ValueError(f"a buffer of {mar.buffer_size} tokens: expected at least 1")
    if space.image_size[0] * space.image_size[1] > MOST_PIXELS:
        raise ValueError(f"pictures of {space.image_size[1]}x{space.image_size[0]} pixels")
    if depth > tensors:
        raise ValueError(f"{depth} blocks, but {tensors} tensors")
    if (space.token_grid, space.token_dim) != (mar.token_grid, mar.token_dim):
        raise ValueError(
            f"pictures of {space.token_grid} tokens of {space.token_dim} channels, but a network for {mar.token_grid} "
            f"of {mar.token_dim}"
        )


def read_tensors(file: Path) -> tuple[dict[str, Tensor], ModelConfig]:
    """The tensors and the configuration of a `.safetensors` file.

    Raises:
        ValueError: as `load_model`.
    """
    try:
        with safe_open(file, framework="pt") as content:
            metadata, names = content.metadata() or {}, list(content.keys())
            if "marval" not in metadata:
                raise ValueError("no configuration of marval is inside")
            config = ModelConfig.from_dict(add_guidance(json.loads(metadata["marval"]), file))
            check_config(config, len(names))
            return {name: content.get_tensor(name) for name in names}, config
    except (SafetensorError, OSError, RecursionError) as error:
        raise ValueError(f"{file} is damaged or not a safetensors file ({told(error)})") from None
    except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{file} is not a marval model: {told(error)}") from None


def weights_file(path: Path) -> Path:
    """The weights of a model: a file, or the one in a folder.

    Raises:
        ValueError: there is none, or it is no regular file: a device or a pipe could be read for ever.
    """
    file = path / WEIGHTS if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{file} does not exist, or is no file")
    return file


def add_guidance(about: dict[str, Any], file: Path) -> dict[str, Any]:
    """A student's configuration with the guidance it was distilled with, where only `config.json` beside it says that.

    Older weights do not, and are not written anew: their SHA-256 is what results and recipes know them by.
    """
    draw, beside = about.get("draw"), file.parent / "config.json"
    if isinstance(draw, dict) and draw.get("kind") == "one_step" and "guidance" not in draw and beside.is_file():
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            said = json.loads(beside.read_text())["draw"]
            names = ("guidance", "guidance_schedule")
            about = {**about, "draw": {**draw, **{name: said[name] for name in names}}}
    return about


def model_hash(folder: Path) -> str:
    """SHA-256 of a model's weights' file.

    Raises:
        ValueError: as `weights_file`.
    """
    return sha256_of(weights_file(folder))


def weights_hash(network: nn.Module) -> str:
    """SHA-256 of a network's weights, names and values, however they are stored."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def check_tensors(file: Path | str, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Compare names and shapes, and look for values that no sound model has.

    Raises:
        ValueError: names the first missing, unknown or misshapen tensor, or one with NaN or infinity in it.
    """
    for name, tensor in expected.items():
        if name not in found:
            raise ValueError(f"{file}: tensor {name} is missing")
        if found[name].shape != tensor.shape:
            raise ValueError(f"{file}: {name} has shape {tuple(found[name].shape)}, expected {tuple(tensor.shape)}")
    for name in found:
        if name not in expected:
            raise ValueError(f"{file}: unknown tensor {name}")
    if bad := next((name for name, tensor in found.items() if not all_finite(tensor)), None):
        raise ValueError(f"{file}: {bad} holds values that are not finite (NaN or infinity): this model is broken")


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity; without a copy of it."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return all(bool(end.isfinite()) for end in tensor.aminmax())
