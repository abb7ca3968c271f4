"""The command line: one verb per job. Heavy imports stand inside the verbs, so that --help answers at once."""

import difflib
import io
import os
import sys
from collections.abc import Callable
from typing import NoReturn

import marval
from marval.cli.converting import cache, convert
from marval.cli.drawing import demo, sample, serve
from marval.cli.measuring import compare, evaluate
from marval.cli.options import read
from marval.cli.overview import help_text, print_models
from marval.cli.training import distill, train, train_classifier, tune
from marval.runtime.refusal import announce, watch

GROUPS: dict[str, dict[str, Callable[..., None]]] = {
    "Draw": {"demo": demo, "sample": sample, "serve": serve},
    "Train": {"train": train, "distill": distill, "tune": tune, "train classifier": train_classifier},
    "Measure": {"evaluate": evaluate, "compare": compare},
    "Prepare": {"convert": convert, "cache": cache},
}
VERBS = {name: verb for group in GROUPS.values() for name, verb in group.items()}


def main() -> None:
    """Run a verb; a `ValueError` or `OSError` becomes one line on standard error and exit code 2."""
    wait_passively()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # an ASCII terminal gets ? for what it cannot show
    try:
        try:
            run_verb(sys.argv[1:])
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output has gone, as `head` does
        drop_output()
        raise SystemExit(141) from None  # as a shell says of a program that SIGPIPE ended
    except (ValueError, OSError) as error:
        if os.environ.get("MARVAL_DEBUG"):
            raise
        announce(error)
        file = error.filename if isinstance(error, OSError) else None
        complain(f"{file}: {error.strerror}" if file and isinstance(error, OSError) else str(error), 2)
    except KeyboardInterrupt as interrupt:
        training = sys.argv[1:2] in (["train"], ["distill"], ["tune"])
        told = str(interrupt) or ("nothing was saved" if training else "")
        complain("interrupted" + (f": {told}" if told else ""), 130)


def wait_passively() -> None:
    """Let OpenMP's idle threads sleep, unless the user chose how they wait. Call it before torch is imported.

    By default they spin: two processes on the same cores then slow each other tenfold, and more.
    """
    if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"}:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def run_verb(arguments: list[str]) -> None:
    """Run the verb that the arguments begin with, of one word or two."""
    verb, rest = (arguments or [""])[0], arguments[1:]
    if rest and f"{verb} {rest[0]}" in VERBS:
        verb, rest = f"{verb} {rest[0]}", rest[1:]
    if not arguments:
        print_models()
    elif verb in ("-h", "--help"):
        print(help_text(GROUPS))
    elif verb == "--version":
        print(f"marval {marval.__version__}")
    elif verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        raise ValueError(f"unknown verb {verb!r}: " + (f"did you mean {near[0]}?" if near else "see marval --help"))
    else:
        watch()
        read(VERBS[verb], rest, f"marval {verb}")()


def complain(line: str, code: int) -> NoReturn:
    """Print one line on standard error and exit."""
    try:
        print(f"marval: {line}", file=sys.stderr, flush=True)
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        drop_output()
    raise SystemExit(code) from None


def drop_output() -> None:
    """Send what is still printed to nowhere, so that the interpreter's own last flush does not fail."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in filter(None, (sys.stdout, sys.stderr)):
        os.dup2(nowhere, stream.fileno())
