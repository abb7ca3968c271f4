"""Models on disk: a folder with `model.safetensors` (which carries its configuration) and a readable `config.json`."""

import contextlib
import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from marval.config import ModelConfig
from marval.io.files import sha256_of, write_tensors, write_text
from marval.model import MAR

WEIGHTS = "model.safetensors"


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
    file = path / WEIGHTS if path.is_dir() else path
    tensors, config = read_tensors(file)
    with torch.device("meta"):
        model = MAR(config.mar)
    check_tensors(file, tensors, model.state_dict())
    model.load_state_dict({name: t.float() for name, t in tensors.items()}, strict=True, assign=True)
    return model.to(device).eval().requires_grad_(False), config


def average_models(models: Sequence[tuple[MAR, ModelConfig]]) -> tuple[MAR, ModelConfig]:
    """The mean of the weights of models of the same sizes and way to draw, with the first one's configuration.

    It works for models that share a start, as students of one teacher do (Wortsman et al. 2022, arXiv 2203.05482).

    Raises:
        ValueError: they differ in size, token space, classes or way to draw.
    """
    (first, config), *others = models
    for _, other in others:
        for part in ("mar", "space", "draw", "class_names"):
            if getattr(other, part) != getattr(config, part):
                raise ValueError(f"{other.name} and {config.name} differ in {part}: only like models can be averaged")
    mean = copy.deepcopy(first)
    states = [model.state_dict() for model, _ in models]
    mean.load_state_dict({name: torch.stack([state[name] for state in states]).mean(dim=0) for name in states[0]})
    return mean, config


def read_tensors(file: Path) -> tuple[dict[str, Tensor], ModelConfig]:
    """The tensors and the configuration of a `.safetensors` file.

    Raises:
        ValueError: as `load_model`.
    """
    try:
        with safe_open(file, framework="pt") as content:
            metadata = content.metadata() or {}
            if "marval" not in metadata:
                raise ValueError(f"{file} is not a marval model: it has no configuration inside")
            config = ModelConfig.from_dict(add_guidance(json.loads(metadata["marval"]), file))
            return {name: content.get_tensor(name) for name in content.keys()}, config  # noqa: SIM118
    except FileNotFoundError:
        raise ValueError(f"{file} does not exist") from None
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is damaged or not a safetensors file ({error})") from None


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
    """SHA-256 of a model's weights' file."""
    return sha256_of(folder / WEIGHTS if folder.is_dir() else folder)


def check_tensors(file: Path | str, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Compare names and shapes.

    Raises:
        ValueError: names the first missing, unknown or misshapen tensor.
    """
    for name, tensor in expected.items():
        if name not in found:
            raise ValueError(f"{file}: tensor {name} is missing")
        if found[name].shape != tensor.shape:
            raise ValueError(f"{file}: {name} has shape {tuple(found[name].shape)}, expected {tuple(tensor.shape)}")
    for name in found:
        if name not in expected:
            raise ValueError(f"{file}: unknown tensor {name}")
