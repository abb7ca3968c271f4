"""The command line: one verb per job. Heavy imports stand inside the verbs, so that --help answers at once."""

import contextlib
import difflib
import functools
import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from marval.cli.converting import average, cache_latents, convert, plan
from marval.cli.drawing import animate, demo, sample, serve
from marval.cli.measuring import bench, compare, evaluate, sweep
from marval.cli.rewards import rewards, study, train_text_image
from marval.cli.training import distill, finetune, preset_settings, train, train_classifier

VERBS: dict[str, Callable[..., None]] = {
    "train": train,
    "distill": distill,
    "finetune": finetune,
    "sample": sample,
    "evaluate": evaluate,
    "compare": compare,
    "sweep": sweep,
    "rewards": rewards,
    "study": study,
    "bench": bench,
    "train-classifier": train_classifier,
    "train-text-image": train_text_image,
    "convert": convert,
    "cache-latents": cache_latents,
    "plan": plan,
    "average": average,
    "demo": demo,
    "animate": animate,
    "serve": serve,
}


def main() -> None:
    """Run a verb; a `ValueError` becomes one line on standard error and exit code 2."""
    verb, arguments = (sys.argv[1] if len(sys.argv) > 1 else "--help"), sys.argv[2:]
    if verb in ("-h", "--help"):
        print(overview())
        return
    try:
        if verb not in VERBS:
            near = difflib.get_close_matches(verb, VERBS, n=1)
            raise ValueError(f"unknown verb {verb!r}: " + (f"did you mean {near[0]}?" if near else "see marval --help"))
        settings = preset_settings(verb, arguments)
        function = VERBS[verb] if settings is None else functools.partial(VERBS[verb], settings=settings)
        read_arguments(verb, function, arguments)()
    except ValueError as error:
        if os.environ.get("MARVAL_DEBUG"):
            raise
        print(f"marval: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt as interrupt:
        told = str(interrupt) or ("nothing was saved" if verb.startswith(("train", "distill", "finetune")) else "")
        print("marval: interrupted" + (f": {told}" if told else ""), file=sys.stderr)
        raise SystemExit(130) from None


def read_arguments(verb: str, function: Callable[..., None], arguments: Sequence[str]) -> Callable[[], None]:
    """The verb with its arguments, ready to be called.

    Raises:
        ValueError: settings that check themselves refuse a value.
        SystemExit: --help, or arguments that are none of the verb's; tyro has said so.
    """
    import tyro

    @functools.wraps(function)
    def bind(*given: Any, **named: Any) -> Callable[[], None]:
        return functools.partial(function, *given, **named)

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
