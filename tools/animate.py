"""Make an animated GIF of the unmasking: models downwards, classes to the right, with each model's time so far.

    python tools/animate.py fashion-teacher fashion-student fashion-tuned \
        --classes sneaker bag dress trouser "ankle boot" coat --out docs/unmasking.gif
"""

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from PIL import Image, ImageOps
from torch import Tensor

from marval.cli.options import run_script
from marval.io.files import atomic_path, check_output
from marval.io.images import grid
from marval.pipeline import Pipeline, load


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
    token_grid, shown = pipeline.config.mar.token_grid, []

    def keep(k: int, images: Tensor, drawn: Tensor) -> None:
        shown.append(hidden_tokens_grey(images, drawn, token_grid))

    final = pipeline.sample(classes, seed=seed, iterations=iterations, on_iteration=keep)
    pipeline.sample(classes[:1], seed=seed, iterations=iterations)  # warms up
    times, began = [0.0], time.perf_counter()
    tokens = pipeline.sample_tokens(
        classes[:1], seeds=seed, iterations=iterations,
        on_iteration=lambda *_: times.append(time.perf_counter() - began),
    )  # fmt: skip
    with torch.inference_mode():
        pipeline.space.decode(tokens)  # once, as for a picture that nobody watches
    times[-1] = time.perf_counter() - began
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
    names = [pipelines[0].named(asked)[1].removesuffix(" style") for asked in classes]
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


def main(
    models: tuple[str, ...] = (),
    *,
    classes: tuple[str, ...] = (),
    iterations: int = 12,
    seed: int = 0,
    out: Path = Path("unmasking.gif"),
    device: str = "cpu",
) -> None:
    """Draw the classes with each model and save one frame per iteration.

    Args:
        models: bundled models' names, or models' or runs' folders.
        classes: the classes' names, or prompts; the first six of the first model when left out.
        iterations: K, the AR iterations; one frame for each.
        seed: the first class's seed; the next ones count on from it.
        out: the GIF file.
        device: "cpu", "cuda", ...
    """
    if not models:
        raise ValueError("name at least one model, for example fashion-student")
    check_output(out, folder=False)
    pipelines = [load(name, device) for name in models]
    frames = unmasking_frames(pipelines, classes or pipelines[0].config.class_names[:6], seed, iterations)
    milliseconds = [350] * (len(frames) - 1) + [2500]
    with atomic_path(out) as partial:
        frames[0].save(partial, format="GIF", save_all=True, append_images=frames[1:], duration=milliseconds, loop=0)
    print(f"{out}: {len(frames)} frames")


if __name__ == "__main__":
    run_script(main)
