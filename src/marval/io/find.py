"""Where the models are that people name."""

import difflib
from pathlib import Path

from marval.io.checkpoint import WEIGHTS
from marval.io.files import asset
from marval.io.hub import HUB_ID, fetch


def bundled_models() -> dict[str, Path]:
    """The models that ship with the package: name to folder."""
    return {path.parent.name: path.parent for path in sorted(asset("").glob("*/model.safetensors"))}


def find_model(name: str | Path, revision: str | None = None) -> Path:
    """The folder of a model that a person named: a path, a bundled model, or "user/repo" on the Hugging Face hub."""
    if Path(name).exists():
        in_run = Path(name) / "model"  # a training run's folder
        return in_run if (in_run / WEIGHTS).is_file() else Path(name)
    known = bundled_models()
    if str(name) in known:
        return known[str(name)]
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.4) or list(known)
    missing = f"no model {str(name)!r}: expected a folder, or a bundled model such as {', '.join(near) or 'none'}"
    if HUB_ID.fullmatch(str(name)) and not Path(name).parent.is_dir():  # runs/student is a path where runs/ is here
        try:
            return fetch(
                str(name), (WEIGHTS, "config.json", "*/config.json", "*/diffusion_pytorch_model.safetensors"), revision
            )
        except ValueError as error:
            raise ValueError(f"{missing}; {error}") from error
    raise ValueError(missing)
