"""Rewards over class-name prompts: the paper's table of CLIP score and ImageReward, before and after tuning."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from marval.evaluate.evaluate import is_row_of
from marval.evaluate.images import SEEDS, draw_bytes
from marval.evaluate.results import Models, Row, describe, model_hashes, named, read_results, write_results
from marval.parallel import Workers
from marval.rewards import Reward, checked


@torch.no_grad()
def reward_figures(
    rewards: Mapping[str, Reward],
    images: UInt8[Tensor, "n c h w"],
    labels: Int[Tensor, " n"],
    class_names: Sequence[str],
    prompt: str,
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 50,
) -> dict[str, dict[str, float]]:
    """Mean and standard error of every reward; an image's prompt is `prompt` with its class's name.

    Raises:
        ValueError: a reward that is not finite or has the wrong shape.
    """
    found: dict[str, dict[str, float]] = {}
    prompts = [prompt.format(class_names[label]) for label in labels.tolist()]
    for name, reward in rewards.items():
        values = [
            checked(name, reward, part.to(device).float() / 255, prompts[i * batch_size : i * batch_size + len(part)])
            for i, part in enumerate(images.split(batch_size))
        ]
        scores = torch.cat(values).double()
        error = float(scores.std() / len(scores) ** 0.5) if len(scores) > 1 else 0.0
        found[name] = {"mean": float(f"{float(scores.mean()):.6g}"), "standard_error": float(f"{error:.3g}")}
    return found


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
    workers: Workers | None = None,
    report: Callable[[str], None] = print,
) -> list[Row]:
    """Rewards of every model at every K, kept in `out` after each row; rewards that a row holds are not scored again.

    A row says how many images, prompts and seeds it stands for: image i has seed `first_seed + i`. The `workers` share
    the drawing; the main one scores and writes.

    Raises:
        ValueError: a prompt without a place for the class's name, two models share a name, or `out` holds figures of
            other weights under one.
    """
    if "{}" not in prompt:
        raise ValueError(f"prompt {prompt!r}: expected {{}} where the class's name goes")
    workers = workers or Workers()
    rows: list[Row] = read_results(out).get("rewards", {}).get("rows", [])
    for (_, pipeline), digest in zip(models, model_hashes(models, rows, out), strict=True):
        names = pipeline.config.class_names
        for k, seed in [(k, seed) for k in iterations or (pipeline.config.iterations,) for seed in seeds]:
            key = {**describe(pipeline), "sha256": digest, "iterations": k, "samples": samples, "autocast": autocast}
            key |= {"prompt": prompt, "prompts": min(samples, len(names)), "seeds": samples, "seed": seed}
            key["first_seed"] = seed * SEEDS
            row = next((r for r in rows if is_row_of(r, key)), None)
            if row is None:
                row = {**key, "rewards": {}}
                rows.append(row)
            missing = {name: reward for name, reward in rewards.items() if name not in row["rewards"]}
            if missing:
                began = time.monotonic()
                images, labels = draw_bytes(pipeline, samples, k, seed, autocast=autocast, workers=workers)
                if workers.main:
                    row["rewards"] |= reward_figures(missing, images, labels, names, prompt, device=pipeline.device)
                    write_results(out, "rewards", rows, seed)
                    report(f"{named(row)}: {samples} images scored ({time.monotonic() - began:.0f} s)")
                workers.barrier()
            if workers.main:
                shown = "  ".join(f"{n} {v['mean']:.4g} ± {v['standard_error']:.2g}" for n, v in row["rewards"].items())
                report(f"{named(row)}, seed {seed}: {shown}")
    return rows
