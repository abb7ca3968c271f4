"""The small evaluation that training loops watch."""

import math
from collections.abc import Callable

from marval.evaluate.draw import draw_bytes
from marval.evaluate.judge import Judge
from marval.evaluate.rewards import reward_values
from marval.pipeline import Pipeline
from marval.rewards import Reward
from marval.runtime.distributed import Workers


def probe(
    judge: Judge,
    count: int,
    iterations: int,
    seed: int = 0,
    workers: Workers | None = None,
    *,
    held_out: Reward | None = None,
    prompt: str = "{}",
    report: Callable[[str], None] = print,
) -> Callable[[Pipeline], dict[str, float]]:
    """Make a small evaluation on fixed seeds: all of the judge's figures that so few images define.

    All processes draw; the main one judges and tells the others. It warns once of what few images do to the distance.

    Args:
        held_out: a reward whose mean over the images, with the prompts of `prompt`, becomes the figure `held_out`.
    """
    workers = workers or Workers()
    judge.check_count(count, "--probe-samples")
    if workers.main and (warning := judge.warning(count)) is not None:
        report(f"warning: {warning[0]}")

    def measure(pipeline: Pipeline) -> dict[str, float]:
        images, labels = draw_bytes(pipeline, count, iterations, seed, workers=workers)
        figures: dict[str, float] = {}
        if workers.main:
            figures = {name: value for name, value in judge.figures(images, labels).items() if not math.isnan(value)}
            paired = int((labels.bincount() > 1).sum())
            if 0 < paired < len(pipeline.config.class_names):
                figures["diversity_classes"] = float(paired)  # diversity is the mean over these alone
            if held_out is not None:
                values = reward_values({"held out": held_out}, prompt, pipeline, images, labels)
                figures["held_out"] = float(values["held out"].mean())
        return workers.agree(figures)

    return measure
