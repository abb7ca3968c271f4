"""Where rewards' weights come from: a local folder, or a hub repository's files in the cache or from the network."""

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from marval.io.checkpoint import check_tensors, read_checkpoint

Files = Sequence[tuple[str, ...]]  # each entry: alternatives (glob patterns), one of which must be there

TOKENIZER: Files = (("tokenizer.json", "vocab.json", "vocab.txt"),)
CLIP_FILES: Files = (
    ("config.json",), ("model*.safetensors", "pytorch_model*.bin"), ("preprocessor_config.json",), *TOKENIZER,
)  # fmt: skip
BESIDE = ("merges.txt", "tokenizer_config.json", "special_tokens_map.json", "*.safetensors.index.json")


def find_folder(reward: str, source: str, files: Files, *, optional: Sequence[str] = BESIDE, others: str = "") -> Path:
    """`source` where it is a folder; else that repository of the hub, from the cache or the network.

    Args:
        reward: the reward's name, for messages.
        files: what must be there; of each entry's alternatives the first is asked from the hub.
        others: what a folder needs besides, which comes from another hub repository.

    Raises:
        ValueError: files are missing and cannot be fetched; the message says which to put where.
    """
    folder, reason = Path(source), "the folder lacks them"
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        wanted = [*(pattern for alternatives in files for pattern in alternatives[:1]), *optional]
        try:
            folder = Path(snapshot_download(source, allow_patterns=wanted))
        except Exception as error:  # no network, no such repository, no right to read it: many kinds
            reason = f"neither cached nor fetched ({type(error).__name__})"
    missing = [" or ".join(any_of) for any_of in files if not any(list(folder.glob(name)) for name in any_of)]
    if missing:
        raise ValueError(
            f"{reward} needs {', '.join(missing)} of {source}: {reason}; put them{others and f' and {others}'} "
            f"into a folder and name it: {reward}:FOLDER"
        )
    return folder


def only_file(reward: str, folder: Path, patterns: Sequence[str]) -> Path:
    """The only file of `folder` that fits one of `patterns`.

    Raises:
        ValueError: there are several.
    """
    found = sorted(file for pattern in patterns for file in folder.glob(pattern))
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise ValueError(f"{reward}: expected one of {' or '.join(patterns)} in {folder}, found {names}")
    return found[0]


def load_strict(network: nn.Module, tensors: dict[str, Tensor], file: Path) -> None:
    """Give a network made on the meta device its weights, in float32.

    Raises:
        ValueError: a missing, unknown or misshapen tensor.
    """
    check_tensors(file, tensors, network.state_dict())
    network.load_state_dict({name: t.float() for name, t in tensors.items()}, strict=True, assign=True)
    for module in network.modules():
        if (places := getattr(module, "position_ids", None)) is not None:  # no weight: it is still on the meta device
            module.position_ids = torch.arange(places.shape[-1])[None]


def renamed(name: str, patterns: Sequence[tuple[str, str]]) -> str:
    """A tensor's name after every (pattern, replacement) in turn."""
    for pattern, replacement in patterns:
        name = re.sub(pattern, replacement, name)
    return name


def shape_reader(tensors: dict[str, Tensor], file: Path, expected: str) -> Callable[[str], torch.Size]:
    """A function from a tensor's name to its shape, for reading a network's sizes off its weights.

    It raises:
        ValueError: the tensor is missing; the message says what was `expected`.
    """

    def shape(name: str) -> torch.Size:
        if name not in tensors:
            raise ValueError(f"{file}: tensor {name} is missing: expected {expected}")
        return tensors[name].shape

    return shape


def depth(tensors: dict[str, Tensor], prefix: str) -> int:
    """How many layers have tensors under `prefix`."""
    return len({name[len(prefix) :].split(".")[0] for name in tensors if name.startswith(prefix)})


def find_checkpoint(reward: str, source: str, weights: str, tokenizer_source: str) -> tuple[Path, Path]:
    """The checkpoint `weights` and the folder of its tokenizer: both in the folder `source`, or each from the hub.

    Raises:
        ValueError: as `find_folder` and `only_file`.
    """
    if Path(source).is_dir():
        folder = words = find_folder(reward, source, [(weights, "*.pt"), *TOKENIZER])
    else:
        others = f"{tokenizer_source}'s tokenizer.json"
        folder = find_folder(reward, source, [(weights,)], optional=(), others=others)
        words = find_folder(reward, tokenizer_source, TOKENIZER)
    return only_file(reward, folder, ["*.pt"]), words


def read_weights(file: Path, key: str | None = None) -> dict[str, Tensor]:
    """The tensors of a checkpoint (of its part `key`, where it has one); nothing in it is executed.

    Raises:
        ValueError: as `read_checkpoint`.
    """
    content = read_checkpoint(file)
    content = content.get(key, content) if key else content
    return {name: tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}


def load_clip(reward: str, folder: Path) -> Any:
    """A frozen CLIPModel in float32 from a folder in transformers' form.

    Raises:
        ValueError: transformers is not installed; damaged files; or weights that are missing, unknown or misshapen.
    """
    CLIPModel = transformers_class(reward, "CLIPModel")
    try:
        with quiet_transformers():
            model, info = CLIPModel.from_pretrained(
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
    """A tokenizer from its files.

    Raises:
        ValueError: transformers is not installed, or damaged files.
    """
    try:
        return transformers_class(reward, kind).from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ValueError(f"{reward}: the tokenizer in {folder} cannot be read ({error})") from error


def transformers_class(reward: str, name: str) -> Any:
    """A class of transformers.

    Raises:
        ValueError: transformers is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise ValueError(f"{reward} needs transformers: pip install transformers") from error
    return getattr(transformers, name)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without the progress bars and reports of transformers: errors are told in one line."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
