"""The models that a command measures: loaded ones, or full-size ones with random weights."""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

import torch

from marval.config import Chain, LatentSpace, MARConfig, ModelConfig, OneStep, Order, Size
from marval.evaluate.results import Row
from marval.io.checkpoint import model_hash
from marval.model import MAR
from marval.pipeline import Pipeline, find_model, load
from marval.runtime.provenance import commit
from marval.runtime.rng import generator

Models = Sequence[tuple[Path | None, Pipeline]]  # with their folders; None: random weights


def load_models(
    names: Sequence[str],
    device: str,
    *,
    diffusion_steps: Sequence[int] = (),
    guidance: Sequence[float] = (),
    temperature: float | None = None,
    order: Order | None = None,
) -> Models:
    """Load models with their folders, each once; a teacher once for each T (the largest first) and w.

    Raises:
        ValueError: one cannot be loaded, two share a name, or a teacher's settings are given without a teacher.
    """
    steps, scales = sorted(diffusion_steps, reverse=True) or (None,), guidance or (None,)
    pipelines = [load(name, device) for name in names]
    teachers = any(isinstance(pipeline.config.draw, Chain) for pipeline in pipelines)
    loaded: list[tuple[Path, Pipeline]] = []
    for name, pipeline in zip(names, pipelines, strict=True):
        if order is not None:
            config = dataclasses.replace(pipeline.config, order=order)
            pipeline = Pipeline(pipeline.model, config, pipeline.space)
        if teachers and isinstance(pipeline.config.draw, OneStep):
            loaded.append((find_model(name), pipeline))
            continue
        for t, w in itertools.product(steps, scales):  # a student among students refuses what it has not
            chain = pipeline.with_chain(diffusion_steps=t, guidance=w, temperature=temperature)
            loaded.append((find_model(name), chain))
    commit()  # as the code is now: the command may run for hours
    keys = [(digest, p.config.name, p.config.draw) for digest, (_, p) in zip(model_hashes(loaded), loaded, strict=True)]
    return list(dict(zip(keys, loaded, strict=True)).values())


def model_hashes(models: Models) -> list[str | None]:
    """SHA-256 of every model's weights; None for random ones.

    Raises:
        ValueError: two models share a name.
    """
    hashes = [None if folder is None else model_hash(folder) for folder, _ in models]
    known: dict[str, str | None] = {}
    for (_, pipeline), digest in zip(models, hashes, strict=True):
        if known.setdefault(name := pipeline.config.name, digest) != digest:
            raise ValueError(f"two different models are named {name}: give one another --name, or measure them apart")
    return hashes


def runs_of(models: Models, iterations: Sequence[int], autocast: bool) -> list[tuple[Pipeline, Row]]:
    """Every model at every K (its own where none is asked for), with what rows say of it.

    Raises:
        ValueError: a K that a model has not, or two models share a name.
    """
    runs = []
    for (_, pipeline), digest in zip(models, model_hashes(models), strict=True):
        config = pipeline.config
        for k in iterations:
            if not 1 <= k <= config.mar.num_tokens:
                raise ValueError(f"--iterations {k}: expected 1 to {config.mar.num_tokens} for {config.name}")
        draw = dataclasses.asdict(config.draw)
        if isinstance(config.draw, OneStep):  # how the weights were made, which is no setting of the drawing
            del draw["guidance"], draw["guidance_schedule"]
        row = {"model": config.name, "teacher": isinstance(config.draw, Chain), "draw": draw, "order": config.order}
        row |= {"sha256": digest, "autocast": autocast}
        runs += [
            (pipeline, row | {"iterations": k}) for k in dict.fromkeys(iterations or [pipeline.default_iterations])
        ]
    return runs


def random_pair(size: Size, device: torch.device | str, diffusion_steps: int = 100) -> Models:
    """A full-size teacher (w = 3, linear) and its student, with the same random weights."""
    mar = MARConfig.imagenet256(size)
    model = MAR(mar).initialize(generator(0, "bench")).to(device).eval().requires_grad_(False)
    space, names = LatentSpace((256, 256), "none"), tuple(map(str, range(mar.num_classes)))
    draws: dict[str, Chain | OneStep] = {
        "teacher": Chain(guidance=3.0, diffusion_steps=diffusion_steps),
        "student": OneStep(),
    }
    return [
        (None, Pipeline(model, ModelConfig(mar, space, draw, names, 64, f"imagenet256-{size}-{role}")))
        for role, draw in draws.items()
    ]
