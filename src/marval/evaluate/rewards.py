"""Rewards over class-name prompts: the paper's table of CLIP score and ImageReward, before and after tuning."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from marval.evaluate.draw import SEEDS, Images, Labels
from marval.evaluate.evaluate import Quality, Report, Score, holds, jobs_of
from marval.evaluate.judge import Columns
from marval.evaluate.metrics import METRICS
from marval.evaluate.results import Models, Row, merge_results, named, read_results, standard_error
from marval.io.files import check_output
from marval.pipeline import Pipeline
from marval.rewards import Prompt, Reward, checked, prompts_of, reward_hash
from marval.runtime.distributed import Workers
from marval.runtime.provenance import made_by


@torch.no_grad()
def reward_values(
    rewards: Mapping[str, Reward],
    images: Images,
    prompts: Sequence[Prompt],
    device: torch.device | str = "cpu",
    batch_size: int = 50,
) -> dict[str, Float[Tensor, " n"]]:
    """Compute every reward of every image, on the CPU.

    Raises:
        ValueError: a reward is not finite or has the wrong shape.
    """
    values: dict[str, Tensor] = {}
    for name, reward in rewards.items():
        parts = [
            checked(name, reward, part.to(device).float() / 255, prompts[i * batch_size : i * batch_size + len(part)])
            for i, part in enumerate(images.split(batch_size))
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
            or what `jobs_of` raises.
    """
    if "{}" not in prompt:
        raise ValueError(f"prompt {prompt!r}: expected {{}} where the class's name goes")
    Prompt.of(prompt, "")
    workers = workers or Workers()
    weights = {name: reward_hash(reward) for name, reward in rewards.items()}
    jobs, rows = jobs_of(models, settings, out), read_results(out).get("rewards", [])
    check_rewards(weights, rows, out)
    if workers.main:
        check_output(out, folder=False)
        for job in jobs:
            job.check()
    for job in jobs:
        names, seed = job.drawing.pipeline.config.class_names, job.drawing.seed
        key = job.key | {"prompt": prompt, "prompts": min(settings.samples, len(names)), "seeds": settings.samples}
        key |= {"first_seed": seed * SEEDS}
        row = next((row for row in rows if holds(row, key)), {**key, "metrics": METRICS, "rewards": {}})
        missing = {name: rewards[name] for name in workers.agree([n for n in rewards if n not in row["rewards"]])}
        columns: Columns = {}
        if missing or job.folder is not None:  # the images may be wanted still
            columns = job.columns(scorer(missing, prompt, job.drawing.pipeline), workers, report)
        if workers.main:
            if missing:
                row["rewards"] |= {
                    name: {**mean_and_error(values), "sha256": weights[name]} for name, values in columns.items()
                }
                row["made"] = made_by(job.drawing.pipeline.device, workers.count)
                merge_results(out, "rewards", [row])
            line = "  ".join(f"{n} {v['mean']:.4g} ± {v['standard_error']:.2g}" for n, v in row["rewards"].items())
            report(f"{named(row)}, seed {seed}: {line} (± one standard error of the mean, over the images)")
    workers.barrier()
    return read_results(out).get("rewards", [])


def scorer(rewards: Mapping[str, Reward], prompt: str, pipeline: Pipeline) -> Score:
    """Return a function from images and labels to `reward_values`, on the model's device."""

    def score(images: Images, labels: Labels) -> Columns:
        prompts = prompts_of(prompt, pipeline.config.class_names, labels.tolist())
        return reward_values(rewards, images, prompts, pipeline.device)

    return score


def mean_and_error(values: Float[Tensor, " n"]) -> dict[str, float]:
    """Compute the mean and its standard error over images."""
    mean, error = standard_error(values.double().tolist())
    return {"mean": float(f"{mean:.6g}"), "standard_error": float(f"{error:.3g}")}


def check_rewards(weights: Mapping[str, str], rows: Sequence[Row], out: Path) -> None:
    """Check that one name stands for one reward in a results file; rows without a hash pass.

    Raises:
        ValueError: `out` holds figures of other weights under a reward's name.
    """
    for row in rows:
        for name, digest in weights.items():
            if row["rewards"].get(name, {}).get("sha256", digest) != digest:
                raise ValueError(f"{out} holds figures of a reward {name} with other weights: choose another --out")
