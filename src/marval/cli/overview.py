"""What `marval` and `marval --help` print: the models that are there, and the verbs. Imports no torch."""

import json
import math
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import marval

STAGES = ["teacher", "student", "tuned student"]
TRY = """\
Try:
  marval sample fashion-student --classes sneaker,bag --out samples
  marval demo                          two minutes: draw, time, score, and distil a student
  marval serve                         draw, edit and compare in a browser
marval --help lists all verbs."""


def help_text(groups: Mapping[str, Mapping[str, Callable[..., None]]]) -> str:
    """The verbs in their groups."""
    lines = ["Masked auto-regressive diffusion in one step (MARVAL).", "", "usage: marval VERB [options]"]
    for group, verbs in groups.items():
        lines += ["", f"{group}:"]
        lines += [f"  {name:<17} {(verb.__doc__ or '').splitlines()[0]}" for name, verb in verbs.items()]
    lines += ["", "marval VERB --help lists a verb's options, with two commands to copy; marval alone lists models."]
    return "\n".join([*lines, "MARVAL_DEBUG=1 in front of a command shows where an error comes from."])


def print_models() -> None:
    """Print the bundled models, the models of runs below the current folder, and three things to try."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table("model", "stage", "K", "pictures", "parameters", box=None, pad_edge=False, padding=(0, 2))
    bundled = {file.parent.name: file for file in Path(str(files("marval"))).glob("assets/*/config.json")}
    runs = {str(file.parents[1]): file for file in Path().glob("runs/*/model/config.json")}
    rows = [(name, *row) for name, file in sorted((bundled | runs).items()) if (row := model_row(file))]
    for cells in sorted(rows, key=lambda row: (row[0] in runs, STAGES.index(row[1]))):
        table.add_row(*cells)
    console.print(f"marval {marval.__version__}: masked auto-regressive diffusion in one step\n", highlight=False)
    console.print(table)
    print(f"\n{TRY}")


def model_row(config: Path) -> tuple[str, str, str, str] | None:
    """A model's stage, K, size of pictures and number of parameters; None where the files do not say."""
    try:
        about = json.loads(config.read_text())
        rows, columns = about["space"]["image_size"]
        stage = "teacher" if about["draw"]["kind"] == "chain" else "student"
        if "tune " in about.get("source", ""):  # once it was finetune
            stage = "tuned student"
        count = parameters(config.with_name("model.safetensors"))
        return stage, str(about["iterations"]), f"{columns}x{rows}", f"{count / 1e6:.1f} M"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def parameters(weights: Path) -> int:
    """Count the numbers in a safetensors file, by its header."""
    with weights.open("rb") as file:
        header: dict[str, Any] = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
