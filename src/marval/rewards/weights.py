"""Rewards' weights: from a folder, or from the Hugging Face hub; read strictly, never executed."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from marval.io.checkpoint import check_tensors, read_checkpoint
from marval.io.files import asset, one_line, write_tensors
from marval.io.hub import fetch
from marval.io.text import transformers

Tensors = dict[str, Tensor]

CLIP = "openai/clip-vit-large-patch14"
MODEL = ("config.json", "model*.safetensors*", "preprocessor_config.json")
TOKENIZER = ("vocab.*", "merges.txt", "tokenizer*.json", "special_tokens_map.json")


def find_folder(source: str, *patterns: str) -> Path:
    """Return the folder `source`, or that of what is fetched from this repository of the Hugging Face hub."""
    if Path(source).is_dir():
        return Path(source)
    try:
        return fetch(source, patterns)
    except ValueError as error:
        wanted = ", ".join(patterns)
        raise ValueError(f"{error}; or put its {wanted} into a folder, and write NAME:FOLDER") from error


def from_folder(kind: str, folder: Path, **how: Any) -> Any:
    """Load an object of one of transformers' classes from a folder."""
    library = transformers()
    try:
        return getattr(library, kind).from_pretrained(folder, local_files_only=True, **how)
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ValueError(f"{folder} cannot be read as a {kind} ({one_line(error)})") from error


def load_clip(folder: Path) -> Any:
    """Load a frozen CLIPModel in float32, strictly, from a folder in transformers' form."""
    model, info = from_folder("CLIPModel", folder, dtype=torch.float32, weights_only=True, output_loading_info=True)
    if info["missing_keys"]:
        raise ValueError(f"{folder} is not a whole CLIP: it lacks {min(info['missing_keys'])}")
    return model.eval().requires_grad_(False)


def read_weights(folder: Path, pattern: str) -> tuple[Path, Tensors]:
    """Find the only file of a folder that matches a pattern, and read its tensors; nothing in it is executed."""
    matches = sorted(folder.glob(pattern))
    if len(matches) != 1:
        names = ", ".join(file.name for file in matches) or "none"
        raise ValueError(f"{folder}: expected one {pattern}, found {names}")
    content = read_checkpoint(matches[0])
    return matches[0], {n: t for n, t in content.get("state_dict", content).items() if isinstance(t, Tensor)}


def load_strict(network: Callable[[], nn.Module], tensors: Tensors, file: Path) -> Any:
    """Build a network, and load a file's tensors into it; frozen, in float32."""
    with torch.device("meta"):
        made = network()
    check_tensors(file, tensors, made.state_dict())
    in_float32 = {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}
    made.load_state_dict(in_float32, strict=True, assign=True)
    for module in made.modules():
        if (places := getattr(module, "position_ids", None)) is not None:  # no weight: it is still on the meta device
            module.position_ids = torch.arange(places.shape[-1])[None]
    return made.eval().requires_grad_(False)


def renamed(tensors: Tensors, patterns: Sequence[tuple[str, str]]) -> Tensors:
    """Rename tensors by every (pattern, replacement) in turn."""
    names = {name: name for name in tensors}
    for pattern, replacement in patterns:
        names = {old: re.sub(pattern, replacement, new) for old, new in names.items()}
    return {names[old]: tensor for old, tensor in tensors.items()}


def described_file(name: Path | str, maker: str) -> Path:
    """Find a bundled file by name ("fashion-judge"), or a file by its path; `maker` is the command that makes one."""
    bundled = asset(f"{name}.safetensors")
    file = bundled if bundled.is_file() else Path(name)
    if not file.is_file():
        raise ValueError(f"{file} does not exist: make one with {maker}")
    return file


def save_described(file: Path, network: nn.Module, kind: str, about: dict[str, object]) -> None:
    """Write a network's weights and a description, under the name `kind`, to one safetensors file."""
    tensors = {name: t.detach().cpu() for name, t in network.state_dict().items()}
    write_tensors(file, tensors, {"format": "pt", kind: json.dumps(about)})


def load_described(file: Path, build: Callable[[dict[str, Any]], nn.Module], kind: str, maker: str) -> Any:
    """Load a frozen network that `save_described` wrote; `build` makes it from the description."""
    try:
        with safe_open(file, framework="pt") as content:
            about = json.loads((content.metadata() or {}).get(kind, "null"))
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{file} is damaged or not a safetensors file ({error})") from None
    if about is None:
        raise ValueError(f"{file} is not a {kind.replace('_', '-')} file: make one with {maker}")
    return load_strict(lambda: build(about), tensors, file)
