"""The command line: one verb per job. Heavy imports stand inside the verbs, so that --help answers at once."""

import contextlib
import difflib
import functools
import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import marval
from marval.cli.converting import cache_latents, convert
from marval.cli.drawing import demo, sample, serve
from marval.cli.measuring import bench, compare, evaluate, sweep
from marval.cli.training import distill, preset_settings, train, train_classifier, tune
from marval.runtime.refusal import announce, watch

VERBS: dict[str, Callable[..., None]] = {
    "train": train,
    "distill": distill,
    "tune": tune,
    "sample": sample,
    "evaluate": evaluate,
    "compare": compare,
    "sweep": sweep,
    "bench": bench,
    "train-classifier": train_classifier,
    "convert": convert,
    "cache-latents": cache_latents,
    "demo": demo,
    "serve": serve,
}


def main() -> None:
    """Run a verb; a `ValueError` or `OSError` becomes one line on standard error and exit code 2."""
    wait_passively()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # an ASCII terminal gets ? for what it cannot show
    try:
        try:
            run_verb(sys.argv[1] if len(sys.argv) > 1 else "--help", sys.argv[2:])
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
        told = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
        complain(told, 2)
    except KeyboardInterrupt as interrupt:
        training = len(sys.argv) > 1 and sys.argv[1].startswith(("train", "distill", "tune"))
        told = str(interrupt) or ("nothing was saved" if training else "")
        complain("interrupted" + (f": {told}" if told else ""), 130)


def wait_passively() -> None:
    """Let OpenMP's idle threads sleep, unless the user chose how they wait. Call it before torch is imported.

    By default they spin: two processes on the same cores then slow each other tenfold, and more.
    """
    if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"}:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def run_verb(verb: str, arguments: list[str]) -> None:
    """Run one verb with its arguments.

    Raises:
        ValueError: no such verb, or what the verb raises.
    """
    if verb in ("-h", "--help"):
        print(overview())
        return
    if verb == "--version":
        print(f"marval {marval.__version__}")
        return
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        raise ValueError(f"unknown verb {verb!r}: " + (f"did you mean {near[0]}?" if near else "see marval --help"))
    watch()
    settings = preset_settings(verb, arguments)
    function = VERBS[verb] if settings is None else functools.partial(VERBS[verb], settings=settings)
    read_arguments(verb, function, arguments)()


def complain(line: str, code: int) -> NoReturn:
    """Print one line on standard error and exit."""
    try:
        print(f"marval: {line}", file=sys.stderr, flush=True)
    except OSError:
        drop_output()
    raise SystemExit(code) from None


def drop_output() -> None:
    """Send what is still printed to nowhere, so that the interpreter's own last flush does not fail."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in filter(None, (sys.stdout, sys.stderr)):
        os.dup2(nowhere, stream.fileno())


def read_arguments(verb: str, function: Callable[..., None], arguments: Sequence[str]) -> Callable[[], None]:
    """The verb with its arguments, ready to be called.

    Raises:
        ValueError: settings that check themselves refuse a value.
        SystemExit: --help, or arguments that are none of the verb's; tyro has said so.
    """
    import tyro

    if os.environ.get("NO_COLOR"):  # tyro does not ask
        getattr(tyro, "_experimental_options", {})["ansi_codes"] = False

    @functools.wraps(function)
    def bind(*given: Any, **named: Any) -> Callable[[], None]:
        return functools.partial(function, *given, **named)

    bind.__doc__ = VERBS[verb].__doc__  # a partial function's own is that of all partial functions
    # What settings refuse tyro would put into a box of several lines; other refusals, and --help, are its own.
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return tyro.cli(bind, prog=f"marval {verb}", args=arguments)
    except SystemExit as end:
        refusal = end.__context__
        if refusal is not None and getattr(refusal, "arg", None) == "settings":
            name, _, told = str(refusal.__context__).partition(" ")
            raise ValueError(f"--{name.replace('_', '-')} {told}") from None
    return tyro.cli(bind, prog=f"marval {verb}", args=arguments)


def overview() -> str:
    """What `marval --help` says."""
    lines = ["Masked auto-regressive diffusion in one step (MARVAL).", "", "usage: marval VERB [options]", ""]
    lines += [f"  {verb:<17} {(function.__doc__ or '').splitlines()[0]}" for verb, function in VERBS.items()]
    return "\n".join([*lines, "", "marval VERB --help lists a verb's options, with two commands to copy."])
