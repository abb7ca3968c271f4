"""The models that a command measures: loaded ones, or full-size ones with random weights."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import get_args

import torch

from marval.config import Chain, Dtype, LatentSpace, MARConfig, ModelConfig, OneStep, Order, Size
from marval.evaluate.results import Row
from marval.io.checkpoint import model_hash
from marval.io.find import find_model
from marval.model import MAR
from marval.pipeline import Pipeline, load
from marval.runtime.provenance import commit
from marval.runtime.rng import generator
from marval.sampling.fast import is_compiled

FULL_SIZES: dict[str, Size] = {f"imagenet256-{size}": size for size in get_args(Size)}

Models = Sequence[tuple[str | None, Pipeline]]  # with the SHA-256 of their weights; None: random ones


def load_models(
    names: Sequence[str],
    device: str,
    *,
    diffusion_steps: Sequence[int] = (),
    guidance: Sequence[float] = (),
    temperature: Sequence[float] = (),
    order: Order | None = None,
    dtype: Dtype = "float32",
    compile: bool = False,
) -> Models:
    """Load models, each for every T (the largest first), w and temperature that it takes; `FULL_SIZES` at random.

    Args:
        dtype: see `Pipeline.to`.
        compile: see `Pipeline.compile`.

    Raises:
        ValueError: one cannot be loaded, two share a name, or no model has a setting that is given.
    """
    loaded: list[tuple[str | None, Pipeline]] = []
    for name in dict.fromkeys(names):
        full = FULL_SIZES.get(name)
        loaded += random_pair(full, device) if full else [(model_hash(find_model(name)), load(name, device))]
    commit()  # as the code is now: the command may run for hours
    dials: dict[str, Sequence[float]] = {
        "diffusion_steps": sorted(diffusion_steps, reverse=True), "guidance": guidance, "temperature": temperature,
    }  # fmt: skip
    known_dials = {dial for _, pipeline in loaded for dial in pipeline.config.dials}
    for _, pipeline in loaded:
        pipeline.to(dtype=getattr(torch, dtype))
        if compile:
            pipeline.compile()
    models: list[tuple[str | None, Pipeline]] = []
    known: dict[str, str | None] = {}
    for digest, pipeline in loaded:
        config = pipeline.config
        if known.setdefault(config.name, digest) != digest:
            raise ValueError(f"two different models are named {config.name}: give one another --name")
        if order is not None:
            pipeline = Pipeline(pipeline.model, dataclasses.replace(config, order=order), pipeline.space)
        # A model goes without a setting that it has not, if another has it; else it refuses.
        own = {
            dial: values
            for dial, values in dials.items()
            if values and dial in {*config.dials} | {*dials} - known_dials
        }
        models += [
            (digest, pipeline.with_draw(**dict(zip(own, chosen, strict=True))))
            for chosen in itertools.product(*own.values())
        ]
    return models


def runs_of(models: Models, iterations: Sequence[int]) -> list[tuple[Pipeline, Row]]:
    """Every model at every K (its own where none is asked for), with what rows say of it."""
    runs = []
    for digest, pipeline in models:
        config = pipeline.config
        draw = dataclasses.asdict(config.draw)
        if "guidance" not in config.dials:  # how the weights were made, which is no setting of the drawing
            del draw["guidance"], draw["guidance_schedule"]
        row = {"model": config.name, "teacher": isinstance(config.draw, Chain), "draw": draw, "order": config.order}
        row |= {
            "dtype": str(pipeline.model.mask_token.dtype).removeprefix("torch."),
            "compiled": is_compiled(pipeline.model),
        }
        for k in dict.fromkeys(iterations or [pipeline.default_iterations]):
            if not 1 <= k <= config.mar.num_tokens:
                raise ValueError(f"--iterations {k}: expected 1 to {config.mar.num_tokens} for {config.name}")
            runs.append((pipeline, row | {"sha256": digest, "iterations": k}))
    return runs


def random_pair(size: Size, device: torch.device | str) -> Models:
    """A full-size teacher (T = 100, w = 3, linear) and its student, with the same random weights."""
    mar = MARConfig.imagenet256(size)
    model = MAR(mar).initialize(generator(0, "bench")).to(device).eval().requires_grad_(False)
    space, names = LatentSpace((256, 256), "none"), tuple(map(str, range(mar.num_classes)))
    draws: dict[str, Chain | OneStep] = {"teacher": Chain(guidance=3.0, diffusion_steps=100), "student": OneStep()}
    return [
        (None, Pipeline(model, ModelConfig(mar, space, draw, names, 64, f"imagenet256-{size}-{role}")))
        for role, draw in draws.items()
    ]
