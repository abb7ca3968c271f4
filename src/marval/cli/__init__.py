"""The command line: one verb per job. Heavy imports stand inside the verbs, so that --help answers at once."""

import contextlib
import difflib
import json
import os
import sys
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path

import marval
from marval.cli.arguments import BUNDLED
from marval.cli.converting import cache, convert
from marval.cli.drawing import demo, sample, serve
from marval.cli.measuring import compare, evaluate
from marval.cli.options import in_one_line, read
from marval.cli.training import distill, train, train_classifier, tune
from marval.config import ModelConfig

GROUPS: dict[str, dict[str, Callable[..., None]]] = {
    "Draw": {"demo": demo, "sample": sample, "serve": serve},
    "Train": {"train": train, "distill": distill, "tune": tune, "train classifier": train_classifier},
    "Measure": {"evaluate": evaluate, "compare": compare},
    "Prepare": {"convert": convert, "cache": cache},
}
VERBS = {name: verb for group in GROUPS.values() for name, verb in group.items()}

TRY = """
Try:
  marval sample emoji-student --prompt "a shark" --style 3d --count 8
  marval demo                          a few minutes: draw, time, score, and distil a student
  marval serve                         draw, edit and compare in a browser
marval --help lists all verbs."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the verb that was typed; a `ValueError` or `OSError` becomes one line on standard error and exit code 2.

    Args:
        arguments: in the place of what was typed.
    """
    wait_passively()
    in_one_line("marval", lambda: run_verb(sys.argv[1:] if arguments is None else arguments))


def wait_passively() -> None:
    """Let OpenMP's idle threads sleep, unless the user chose how they wait. Call it before torch is imported.

    By default they spin: two processes on the same cores then slow each other tenfold, and more.
    """
    if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"}:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def run_verb(arguments: Sequence[str]) -> None:
    """Run the verb that the arguments begin with, of one word or two."""
    verb, rest = arguments[0] if arguments else "", arguments[1:]
    if rest and f"{verb} {rest[0]}" in VERBS:
        verb, rest = f"{verb} {rest[0]}", rest[1:]
    if not arguments:
        print_models()
    elif verb in ("-h", "--help"):
        print(help_text())
    elif verb == "--version":
        print(f"marval {marval.__version__}")
    elif verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        raise ValueError(f"unknown verb {verb!r}: " + (f"did you mean {near[0]}?" if near else "see marval --help"))
    else:
        read(VERBS[verb], rest, f"marval {verb}")()


def help_text() -> str:
    """The verbs in their groups."""
    lines = ["Masked auto-regressive diffusion in one step (MARVAL).", "", "usage: marval VERB [options]"]
    for group, verbs in GROUPS.items():
        lines += ["", f"{group}:"]
        lines += [f"  {name:<17} {(verb.__doc__ or '').splitlines()[0]}" for name, verb in verbs.items()]
    lines += ["", "marval VERB --help lists a verb's options, with two commands to copy; marval alone lists models."]
    return "\n".join([*lines, "MARVAL_DEBUG=1 in front of a command shows where an error comes from."])


def print_models() -> None:
    """Print the bundled models, the models of runs below the current folder, and three things to try."""
    assets = Path(str(files("marval"))) / "assets"
    models = {name: assets / name for name in BUNDLED} | {str(f.parent): f for f in sorted(Path().glob("runs/*/model"))}
    print(f"marval {marval.__version__}: masked auto-regressive diffusion in one step\n")
    print(f"{'model':<32}  {'draws by':<13}  {'K':>3}  pictures")
    for name, folder in models.items():
        with contextlib.suppress(OSError, ValueError, TypeError):
            config = ModelConfig.from_dict(json.loads((folder / "config.json").read_text()))
            (rows, columns), kind = config.space.image_size, config.draw.kind.replace("_", " ")
            print(f"{name:<32}  {kind:<13}  {config.iterations:>3}  {columns}x{rows}")
    print(TRY)
