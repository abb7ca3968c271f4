"""Models on disk: a folder with `model.safetensors` (which carries its configuration) and a readable `config.json`."""

import copy
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

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
            config = ModelConfig.from_dict(json.loads(metadata["marval"]))
            return {name: content.get_tensor(name) for name in content.keys()}, config  # noqa: SIM118
    except FileNotFoundError:
        raise ValueError(f"{file} does not exist") from None
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is damaged or not a safetensors file ({error})") from None


def model_hash(folder: Path) -> str:
    """SHA-256 of a model's weights' file."""
    return sha256_of(folder / WEIGHTS if folder.is_dir() else folder)


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
