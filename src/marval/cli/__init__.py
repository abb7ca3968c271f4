"""The command line: one verb per job. Heavy imports stand inside the verbs, so that --help answers at once."""

import difflib
import functools
import os
import sys
from collections.abc import Callable

from marval.cli.converting import average, cache_latents, convert, plan
from marval.cli.drawing import animate, demo, sample, serve
from marval.cli.measuring import bench, compare, evaluate, sweep
from marval.cli.rewards import rewards, study, train_text_image
from marval.cli.training import distill, finetune, preset_settings, train, train_classifier
from marval.refusal import announce, watch

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
        watch()
        settings = preset_settings(verb, arguments)
        function = VERBS[verb] if settings is None else functools.partial(VERBS[verb], settings=settings)
        import tyro

        tyro.cli(function, prog=f"marval {verb}", args=arguments)
    except ValueError as error:
        if os.environ.get("MARVAL_DEBUG"):
            raise
        announce(error)
        print(f"marval: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("marval: interrupted; a training run goes on with --resume", file=sys.stderr)
        raise SystemExit(130) from None


def overview() -> str:
    """What `marval --help` says."""
    lines = ["Masked auto-regressive diffusion in one step (MARVAL).", "", "usage: marval VERB [options]", ""]
    lines += [f"  {verb:<17} {(function.__doc__ or '').splitlines()[0]}" for verb, function in VERBS.items()]
    return "\n".join([*lines, "", "marval VERB --help lists a verb's options, with two commands to copy."])
