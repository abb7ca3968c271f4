"""Models and weights on the Hugging Face hub: fetch them, and publish a model with its card."""

import re
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from marval.config import LatentSpace, ModelConfig
from marval.io.checkpoint import save_model
from marval.io.files import one_line, write_text
from marval.model import MAR

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def fetch(repo_id: str, patterns: Sequence[str], revision: str | None = None) -> Path:
    """Fetch a repository's files that match `patterns`, or find them in the cache, and return their folder.

    Call it with names that a person typed, never with names that a file holds.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:  # no network, no such repository, no right to read it: many kinds
        raise ValueError(
            f"the Hugging Face hub did not give {repo_id}: {type(error).__name__}: {one_line(error)}"
        ) from error


def push_model(
    repo_id: str, model: MAR, config: ModelConfig, *, private: bool = False, license: str | None = None
) -> str:
    """Create a repository, upload weights, configuration and model card, and return its address.

    Args:
        license: the hub's name of the weights' licence, such as "apache-2.0"; the card names none when None.

    Raises:
        ValueError: the hub refuses.
    """
    from huggingface_hub import HfApi

    api, config = HfApi(), published(config)
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder, model, config)
        write_text(Path(folder) / "README.md", model_card(repo_id, config, license))
        try:
            address = api.create_repo(repo_id, private=private, exist_ok=True)
            api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=f"Add {config.name or 'a model'}")
        except Exception as error:  # no network, no token, no right to write, a bad name: many kinds
            raise ValueError(
                f"the Hugging Face hub did not take {repo_id}: {type(error).__name__}: {one_line(error)}"
            ) from error
    return str(address)


def published(config: ModelConfig) -> ModelConfig:
    """The configuration for other machines: a VAE's folder goes by its name, to be put beside the model's files.

    So does the folder of a sentence encoder.
    """
    config = replace(config, encoder=Path(config.encoder).name)
    if isinstance(config.space, LatentSpace) and Path(config.space.vae).is_absolute():
        return replace(config, space=replace(config.space, vae=Path(config.space.vae).name))
    return config


def model_card(repo_id: str, config: ModelConfig, license: str | None = None) -> str:
    """The README.md of a model's repository: metadata for the hub, and how to use the model."""
    from huggingface_hub import ModelCardData

    kind = "one-step student" if config.draw.kind == "one_step" else "teacher"
    of, task = ("prompts", "text-to-image") if config.encoder else ("classes", "class-conditional")
    tags = ["marval", "image-generation", task, "masked-autoregressive-diffusion"]
    header = ModelCardData(library_name="marval", license=license, tags=tags).to_yaml()
    space, (height, width), vae = config.space, config.space.image_size, ""
    if isinstance(space, LatentSpace):
        vae = f"It needs the VAE `{space.vae}` (SHA-256 `{space.vae_sha256 or 'unknown'}`).\n"
    asked, styles = ([config.class_names[0]] if config.encoder else [0]), ", ".join(config.styles)
    names = "\n".join(name if config.encoder else f"{number} {name}" for number, name in enumerate(config.class_names))
    return f"""---
{header}
---

# {config.name or repo_id}

A MARVAL {kind}: images of {of}, {width}x{height} pixels, in K = {config.iterations} iterations.
{vae}
```python
import marval

images = marval.load("{repo_id}").sample({asked}, seed=0)  # (1, channels, {height}, {width}), in [0, 1]
```

{f"Styles: {styles}. " if styles else ""}Made with: `{config.source or "unknown"}`

Trained on: `{config.data or "unknown"}`

## {"Prompts that it knows" if config.encoder else "Classes"}

```
{names}
```
"""
