"""Rewards over class-name prompts: the paper's table of CLIP score and ImageReward, before and after tuning."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from marval.evaluate.evaluate import Evaluation, KeepImages, check_places, evaluations_of, is_row_of
from marval.evaluate.images import SEEDS
from marval.evaluate.metrics import METRICS
from marval.evaluate.results import (
    Models,
    Row,
    measured_rows,
    merge_results,
    model_hashes,
    named,
    read_results,
    standard_error,
    version_of,
)
from marval.rewards import Prompt, Reward, checked, prompts_of, reward_hash
from marval.runtime.distributed import Workers
from marval.runtime.provenance import made_by


@torch.no_grad()
def reward_values(
    rewards: Mapping[str, Reward],
    images: UInt8[Tensor, "n c h w"],
    labels: Int[Tensor, " n"],
    class_names: Sequence[str],
    prompt: str,
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 50,
) -> dict[str, Float[Tensor, " n"]]:
    """Every reward of every image, on the CPU; an image's prompt is `prompt` with its class's name.

    Raises:
        ValueError: a reward that is not finite or has the wrong shape.
    """
    found: dict[str, Tensor] = {}
    prompts = prompts_of(prompt, class_names, labels.tolist())
    for name, reward in rewards.items():
        values = [
            checked(name, reward, part.to(device).float() / 255, prompts[i * batch_size : i * batch_size + len(part)])
            for i, part in enumerate(images.split(batch_size))
        ]
        found[name] = torch.cat(values).cpu()
    return found


def mean_and_error(values: Float[Tensor, " n"]) -> dict[str, float]:
    """Mean, and its standard error over images."""
    mean, error = standard_error(values.double().tolist())
    return {"mean": float(f"{mean:.6g}"), "standard_error": float(f"{error:.3g}")}


def evaluate_rewards(
    models: Models,
    rewards: Mapping[str, Reward],
    *,
    prompt: str,
    iterations: Sequence[int],
    samples: int,
    out: Path,
    seeds: Sequence[int] = (0,),
    autocast: bool = False,
    batch_size: int | None = None,
    keep: KeepImages | None = None,
    workers: Workers | None = None,
    report: Callable[[str], None] = print,
) -> list[Row]:
    """Rewards of every model at every K, kept in `out` after each row; rewards that a row holds are not scored again.

    A row says how many images, prompts and seeds it stands for: image i has seed `first_seed + i`. The `workers` share
    drawing and scoring; the main one writes.

    Raises:
        ValueError: a prompt without a place for the class's name, two models share a name, `out` holds figures of
            other weights under one, or what `evaluations_of` raises.
    """
    if "{}" not in prompt:
        raise ValueError(f"prompt {prompt!r}: expected {{}} where the class's name goes")
    Prompt.of(prompt, "")
    workers = workers or Workers()
    rows: list[Row] = read_results(out).get("rewards", {}).get("rows", [])
    hashes = model_hashes(models, measured_rows(out), out)
    weights = {name: reward_hash(reward) for name, reward in rewards.items()}
    check_rewards(weights, rows, out)
    evaluations = evaluations_of(
        models, hashes, iterations=iterations, samples=samples, seeds=seeds, autocast=autocast, batch_size=batch_size
    )
    if workers.main:
        check_places(evaluations, out, keep)
    for evaluation in evaluations:
        names, seed = evaluation.pipeline.config.class_names, evaluation.key["seed"]
        key = evaluation.key | {"prompt": prompt, "prompts": min(samples, len(names)), "seeds": samples}
        key |= {"first_seed": seed * SEEDS}
        row = {**key, "metrics": METRICS, "rewards": {}}
        row = next((r for r in rows if is_row_of(r, key) and version_of(r) == METRICS), row)
        missing = {name: rewards[name] for name in workers.agree([n for n in rewards if n not in row["rewards"]])}
        if missing:
            began = time.monotonic()
            found = _scores(evaluation, missing, prompt, keep, workers, report)
            if workers.main:
                row["rewards"] |= {
                    name: {**mean_and_error(values), "sha256": weights[name]} for name, values in found.items()
                }
                row["made"] = made_by(evaluation.pipeline.device, workers.count)
                merge_results(out, "rewards", [row], seed)
                report(f"{named(row)}: {samples} images scored ({time.monotonic() - began:.0f} s)")
        elif keep is not None:
            evaluation.columns(lambda *_: {}, keep, workers, report)
        if workers.main:
            shown = "  ".join(f"{n} {v['mean']:.4g} ± {v['standard_error']:.2g}" for n, v in row["rewards"].items())
            report(f"{named(row)}, seed {seed}: {shown} (± one standard error of the mean, over the images)")
    workers.barrier()
    return read_results(out).get("rewards", {}).get("rows", [])


def check_rewards(weights: Mapping[str, str], rows: Sequence[Row], out: Path) -> None:
    """One name stands for one reward in a results file, as far as its rows say.

    Raises:
        ValueError: `out` holds figures of other weights under a reward's name.
    """
    for row in rows:
        for name, digest in weights.items():
            if row["rewards"].get(name, {}).get("sha256", digest) != digest:
                raise ValueError(f"{out} holds figures of a reward {name} with other weights: choose another --out")


def _scores(
    evaluation: Evaluation,
    rewards: Mapping[str, Reward],
    prompt: str,
    keep: KeepImages | None,
    workers: Workers,
    report: Callable[[str], None],
) -> dict[str, Tensor]:
    pipeline = evaluation.pipeline

    def judge(images: UInt8[Tensor, "n c h w"], labels: Int[Tensor, " n"]) -> dict[str, Tensor]:
        return reward_values(rewards, images, labels, pipeline.config.class_names, prompt, device=pipeline.device)

    return evaluation.columns(judge, keep, workers, report)
