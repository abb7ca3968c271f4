"""Pictures of the unmasking: what is there after each AR iteration, for an animation."""

import time
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from PIL import Image, ImageOps
from torch import Tensor

from marval.io.images import grid
from marval.pipeline import Pipeline


def hidden_tokens_grey(
    images: Float[Tensor, "b c h w"], drawn: Bool[Tensor, "b l"], token_grid: tuple[int, int], shade: float = 0.5
) -> Float[Tensor, "b c h w"]:
    """The images with a plain grey where no token is drawn yet."""
    rows, columns = images.shape[2] // token_grid[0], images.shape[3] // token_grid[1]
    mask = drawn.unflatten(1, token_grid)[:, None].repeat_interleave(rows, 2).repeat_interleave(columns, 3)
    return torch.where(mask, images, torch.full_like(images, shade))


def unmasking(
    pipeline: Pipeline, classes: Sequence[str], seed: int, iterations: int
) -> list[tuple[Float[Tensor, "b c h w"], float]]:
    """The partial images before the first iteration and after each, and the seconds of one picture alone.

    Raises:
        ValueError: as `Pipeline.sample`.
    """
    token_grid, times, shown = pipeline.config.mar.token_grid, [0.0], []

    def keep(k: int, images: Tensor, drawn: Tensor) -> None:
        shown.append(hidden_tokens_grey(images, drawn, token_grid))

    final = pipeline.sample(classes, seed=seed, iterations=iterations, on_iteration=keep)  # warms up, too
    began = time.perf_counter()
    pipeline.sample(
        classes[:1], seed=seed, iterations=iterations,
        on_iteration=lambda *_: times.append(time.perf_counter() - began),
    )  # fmt: skip
    nothing = torch.zeros(len(classes), pipeline.config.mar.num_tokens, dtype=torch.bool)
    return list(zip([hidden_tokens_grey(final, nothing, token_grid), *shown], times, strict=True))


def unmasking_frames(
    pipelines: Sequence[Pipeline], classes: Sequence[str], seed: int, iterations: int
) -> list[Image.Image]:
    """A frame for each moment of `unmasking`, all of one size: models downwards, classes to the right.

    Raises:
        ValueError: as `Pipeline.sample`.
    """
    moments = [unmasking(pipeline, classes, seed, iterations) for pipeline in pipelines]
    names = [pipelines[0].config.class_names[label] for label in pipelines[0].labels(classes)]
    frames = []
    for k in range(iterations + 1):
        labels = [
            f"{pipeline.config.name}\n{model[k][1] * 1000:.0f} ms"
            for pipeline, model in zip(pipelines, moments, strict=True)
        ]
        title = f"iteration {k} of {iterations}"
        frames.append(grid([model[k][0] for model in moments], labels, names, title))
    width, height = (max(frame.size[i] for frame in frames) for i in (0, 1))
    return [ImageOps.pad(frame, (width, height), color="white", centering=(1, 0)) for frame in frames]
