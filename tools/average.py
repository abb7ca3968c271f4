"""Average the weights of models that came from one teacher: a model soup (Wortsman et al. 2022, arXiv 2203.05482).

python tools/average.py runs/student-a runs/student-b --out models/student
python tools/average.py runs/student --half --out models/small
"""

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
import tyro
from tyro.conf import Positional

from marval.config import ModelConfig, Order
from marval.io.checkpoint import check_tensors, load_model, save_model, weights_file
from marval.io.files import check_replace
from marval.io.find import find_model
from marval.model import MAR
from marval.runtime.provenance import command_line


def average_models(models: Sequence[tuple[MAR, ModelConfig]]) -> tuple[MAR, ModelConfig]:
    """Return the mean of the weights of models of the same sizes and way to draw, with the first configuration.

    Raises:
        ValueError: they differ in size, token space, classes or way to draw.
    """
    (first, config), *others = models
    for _, other in others:
        for part in ("mar", "space", "draw", "class_names", "styles"):
            if getattr(other, part) != getattr(config, part):
                raise ValueError(f"{other.name} and {config.name} differ in {part}: only like models can be averaged")
    mean = copy.deepcopy(first)
    states = [model.state_dict() for model, _ in models]
    mean.load_state_dict({name: torch.stack([state[name] for state in states]).mean(dim=0) for name in states[0]})
    return mean, config


def main(
    models: Positional[tuple[str, ...]],
    out: Path,
    name: str | None = None,
    order: Order | None = None,
    half: bool = False,
    force: bool = False,
) -> None:
    """Average models (names or folders) into a new model.

    Args:
        models: of the same sizes and the same way to draw.
        out: the new model's folder.
        name: its name; the first model's when left out.
        order: its default order of drawing; the first model's when left out.
        half: store half precision.
        force: write over what is there.
    """
    if not models:
        raise ValueError("name at least one model, for example runs/a")
    folders = [find_model(model) for model in models]
    for folder in folders:
        check_replace(out, source=weights_file(folder), folder=True, force=force)
    model, config = average_models([load_model(folder) for folder in folders])
    dtype = torch.float16 if half else torch.float32
    state = model.state_dict()
    check_tensors(", ".join(models), {k: t.to(dtype) for k, t in state.items()}, state)
    source = f"{config.source}; {command_line()}"
    config = dataclasses.replace(config, name=name or config.name, order=order or config.order, source=source)
    save_model(out, model, config, dtype)
    print(f"{', '.join(models)} -> {out}")


if __name__ == "__main__":
    tyro.cli(main)
