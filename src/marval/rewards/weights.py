"""Rewards' weights: from a folder, or from repositories of the Hugging Face hub; read strictly, never executed."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from marval.io.checkpoint import check_tensors, read_checkpoint
from marval.io.files import asset, write_tensors
from marval.io.hub import fetch

Tensors = dict[str, Tensor]


class Part(NamedTuple):
    """Files that a reward needs, and the hub repository that has them where the user's source does not.

    Each entry of `files` holds patterns of which one must match; the first is the one that the repository has.
    """

    files: tuple[tuple[str, ...], ...]
    repo: str = ""
    more: tuple[str, ...] = ()  # fetched as well, where the repository has them


TOKENIZER = ("tokenizer.json", "vocab.json", "vocab.txt")
IMAGE_FILES = (("config.json",), ("model*.safetensors", "pytorch_model*.bin"), ("preprocessor_config.json",))
MORE = ("merges.txt", "tokenizer_config.json", "special_tokens_map.json", "*.safetensors.index.json")
CLIP = Part((*IMAGE_FILES, TOKENIZER), "openai/clip-vit-large-patch14", MORE)
CLIP_IMAGES = Part(IMAGE_FILES, CLIP.repo, MORE)
CLIP_WORDS = Part((TOKENIZER,), CLIP.repo, MORE)
BERT_WORDS = Part((TOKENIZER,), "google-bert/bert-base-uncased", ("tokenizer_config.json",))


def find_parts(reward: str, source: str, first: Part, *others: Part) -> list[Path]:
    """Find the folder of each part: `source` itself, or in the cache of what is fetched from the Hugging Face hub.

    Args:
        source: a folder with all parts, or the repository of the first; the others have repositories of their own.

    Raises:
        ValueError: files are missing and cannot be fetched; the message says which to put where.
    """
    parts, local, folders = [first._replace(repo=source), *others], Path(source).is_dir(), []
    reason = f"the {'folder' if local else 'repository'} lacks them"
    try:
        for part in parts:
            wanted = [*(entry[0] for entry in part.files), *part.more]
            folders.append(Path(source) if local else fetch(part.repo, wanted))
    except ValueError as error:
        folders, reason = [], str(error)
    missing = [
        f"{' or '.join(entry)} of {part.repo}"
        for i, part in enumerate(parts)
        for entry in part.files
        if not folders or not any(any(folders[i].glob(name)) for name in entry)
    ]
    if missing:
        told = f"{reward} needs {', '.join(missing)}: {reason}"
        raise ValueError(f"{told}; put them into a folder and name it: {reward}:FOLDER")
    return folders


def read_weights(reward: str, folder: Path, pattern: str) -> tuple[Path, Tensors]:
    """Find the only file of a folder that matches a pattern, and read its tensors; nothing in it is executed."""
    matches = sorted(folder.glob(pattern))
    if len(matches) > 1:
        names = ", ".join(file.name for file in matches)
        raise ValueError(f"{reward}: expected one {pattern} in {folder}, found {names}")
    content = read_checkpoint(matches[0])
    return matches[0], {n: t for n, t in content.get("state_dict", content).items() if isinstance(t, Tensor)}


def load_strict(network: Callable[[], nn.Module], tensors: Tensors, file: Path) -> Any:
    """Build a network, which may read its sizes off a checkpoint's tensors, and load them; frozen, in float32."""
    try:
        with torch.device("meta"):
            made = network()
    except KeyError as error:
        raise ValueError(f"{file}: tensor {error.args[0]} is missing: it is another model's checkpoint") from None
    check_tensors(file, tensors, made.state_dict())
    made.load_state_dict({name: t.float() for name, t in tensors.items()}, strict=True, assign=True)
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


def depth(tensors: Tensors, prefix: str) -> int:
    """Count the layers that have tensors under `prefix`."""
    return len({name[len(prefix) :].split(".")[0] for name in tensors if name.startswith(prefix)})


def transformers(reward: str) -> ModuleType:
    """Import the library of that name, and stop its progress bars and reports: marval tells errors in one line."""
    try:
        import transformers
        from transformers.utils import logging
    except ImportError as error:
        raise ValueError(f"{reward} needs transformers: pip install transformers") from error
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return transformers


def load_clip(reward: str, folder: Path) -> Any:
    """Load a frozen CLIPModel in float32, strictly, from a folder in transformers' form."""
    library = transformers(reward)
    try:
        model, info = library.CLIPModel.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, weights_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{reward}: {folder} cannot be read ({str(error).strip().splitlines()[0]})") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        # Old checkpoints hold the positions 0, 1, 2, ... as well.
        wrong = sorted(str(name) for name in info[kind] if not str(name).endswith("position_ids"))
        if wrong:
            raise ValueError(f"{reward}: {folder} is not this CLIP: {kind.replace('_', ' ')} {wrong[0]}")
    return model.eval().requires_grad_(False)


def load_tokenizer(reward: str, folder: Path, kind: str = "CLIPTokenizer") -> Any:
    """Load a tokenizer from its files."""
    try:
        return getattr(transformers(reward), kind).from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ValueError(f"{reward}: the tokenizer in {folder} cannot be read ({error})") from error


def described_file(name: Path | str, maker: str) -> Path:
    """Find a bundled file by name ("fashion-judge"), or a file by its path; `maker` is the command that makes one.

    Raises:
        ValueError: there is no such file.
    """
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
    """Load a frozen network that `save_described` wrote; `build` makes it from the description.

    Raises:
        ValueError: a damaged file, or one of another kind.
    """
    try:
        with safe_open(file, framework="pt") as content:
            about = json.loads((content.metadata() or {}).get(kind, "null"))
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{file} is damaged or not a safetensors file ({error})") from None
    if about is None:
        raise ValueError(f"{file} is not a {kind.replace('_', '-')} file: make one with {maker}")
    network = build(about)
    check_tensors(file, tensors, network.state_dict())
    network.load_state_dict(tensors, strict=True)
    return network.eval().requires_grad_(False)
