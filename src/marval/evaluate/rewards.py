"""Rewards over class-name prompts: the paper's table of CLIP score and ImageReward, before and after tuning."""

import functools
from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from marval.evaluate.draw import SEEDS, Images, Labels
from marval.evaluate.evaluate import Quality, Report, check_jobs, holds, jobs_of
from marval.evaluate.judge import Columns
from marval.evaluate.metrics import METRICS
from marval.evaluate.models import Models
from marval.evaluate.results import Row, Setting, merge_results, read_results, standard_error
from marval.pipeline import Pipeline
from marval.rewards import Prompt, Reward, checked, prompts_of, reward_hash
from marval.runtime.distributed import Workers
from marval.runtime.provenance import made_by

PART = 50  # images at a time


@torch.no_grad()
def reward_values(
    rewards: Mapping[str, Reward], prompt: str, pipeline: Pipeline, images: Images, labels: Labels
) -> dict[str, Float[Tensor, " n"]]:
    """Compute every reward of every image with its class's prompt, on the model's device.

    Raises:
        ValueError: a reward is not finite or has the wrong shape.
    """
    prompts = prompts_of(prompt, pipeline.config.class_names, labels.tolist())
    values: dict[str, Tensor] = {}
    for name, reward in rewards.items():
        parts = [
            checked(name, reward, part.to(pipeline.device).float() / 255, prompts[i * PART : i * PART + len(part)])
            for i, part in enumerate(images.split(PART))
        ]
        values[name] = torch.cat(parts).cpu()
    return values


def measure_rewards(
    models: Models,
    rewards: Mapping[str, Reward],
    prompt: str,
    settings: Quality,
    out: Path,
    workers: Workers | None = None,
    report: Report = print,
) -> list[Row]:
    """Measure rewards over class-name prompts at every K and seed; rewards that a row holds are not scored again.

    A row says how many images, prompts and seeds it stands for: image i has seed `first_seed + i`.

    Raises:
        ValueError: a prompt without a place for the class's name, `out` holds figures of a reward with other weights,
            or what `jobs_of` and `check_jobs` raise.
    """
    if "{}" not in prompt:
        raise ValueError(f"prompt {prompt!r}: expected {{}} where the class's name goes")
    Prompt.of(prompt, "")
    workers = workers or Workers()
    weights = {name: reward_hash(reward) for name, reward in rewards.items()}
    jobs, rows = jobs_of(models, settings), read_results(out).get("rewards", [])
    for name, digest in weights.items():
        if any(row["rewards"].get(name, {}).get("sha256", digest) != digest for row in rows):
            raise ValueError(f"{out} holds figures of a reward {name} with other weights: choose another --out")
    if workers.main:
        check_jobs(jobs, {}, "rewards", out)
    for job in jobs:
        pipeline, seed = job.drawing.pipeline, job.drawing.seed
        prompts = min(settings.samples, len(pipeline.config.class_names))
        key = job.key | {"prompt": prompt, "prompts": prompts, "seeds": settings.samples, "first_seed": seed * SEEDS}
        row = next((row for row in rows if holds(row, key)), {**key, "metrics": METRICS, "rewards": {}})
        missing = {name: rewards[name] for name in workers.agree([n for n in rewards if n not in row["rewards"]])}
        columns: Columns = {}
        if missing or job.folder is not None:  # the images may be wanted still
            columns = job.columns(functools.partial(reward_values, missing, prompt, pipeline), workers, report)
        if workers.main:
            if missing:
                row["rewards"] |= {
                    name: {**mean_and_error(values), "sha256": weights[name]} for name, values in columns.items()
                }
                row["made"] = made_by(pipeline.device, workers.count)
                merge_results(out, "rewards", [row])
            line = "  ".join(f"{n} {v['mean']:.4g} ± {v['standard_error']:.2g}" for n, v in row["rewards"].items())
            report(f"{Setting.of(row)}, seed {seed}: {line} (± one standard error of the mean, over the images)")
    workers.barrier()
    return read_results(out).get("rewards", [])


def mean_and_error(values: Float[Tensor, " n"]) -> dict[str, float]:
    """Compute the mean and its standard error over images."""
    mean, error = standard_error(values.double().tolist())
    return {"mean": float(f"{mean:.6g}"), "standard_error": float(f"{error:.3g}")}
