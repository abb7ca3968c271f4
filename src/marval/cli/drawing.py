"""The verbs that draw: demo, sample and serve."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import marval
from marval.checks import Checked
from marval.cli.arguments import BUNDLED, usable_device
from marval.config import Count, Dtype, ModelConfig, Order, Schedule, Steps

if TYPE_CHECKING:
    from torch import Tensor

IN_GRID = 100  # images that the grid shows at most


@dataclass(frozen=True)
class Images(Checked):
    """what to draw"""

    classes: tuple[str, ...] = ()  # names or numbers, with commas or the option again for each; all when left out
    prompt: tuple[str, ...] = ()  # of a model of text; the option again for each; those it knows when left out
    style: str | None = None  # of the prompts
    count: Count = 16  # images; the classes, or prompts, take turns
    seed: int = 0  # of the first image; the next ones count on from it
    like: Path | None = None  # draw this picture again, from the recipe that sample or serve left in the PNG


@dataclass(frozen=True)
class Drawing(Checked):
    """how to draw (the model's own way when left out)"""

    iterations: int | None = None  # K, the AR iterations
    order: Order | None = None  # in which tokens are drawn
    diffusion_steps: Steps | None = None  # T of a teacher's chain
    guidance: float | None = None  # w of a teacher, or of a student that takes it; 1 is none
    guidance_schedule: Schedule | None = None  # linear: w grows over the iterations; constant: w from the first
    temperature: float | None = None  # scales the noise of a teacher's chain, or that a student starts from
    batch_size: Count = 50  # images drawn together; with another number some pixels differ by rounding
    dtype: Dtype = "float32"  # of the weights
    compile: bool = False  # compile the network's blocks: on a GPU, for many pictures
    device: str = "auto"  # auto, cpu, cuda or cuda:N


@dataclass(frozen=True)
class Folder(Checked):
    """output"""

    out: Path = Path("samples")  # a folder for the pictures, which are saved batch by batch
    force: bool = False  # replace pictures that are there


def sample(model: str | None = None, *, images: Images, drawing: Drawing, output: Folder) -> None:
    """Draw images: PNG files with their recipes inside, and a grid.

    marval sample emoji-student --prompt "a shark" --style 3d --count 8
    marval sample --like samples/00000-shark-3d-style-0.png --out again

    Args:
        model: a bundled model, or a model's or run's folder; with --like the one that drew the picture, or a folder of
            models (else only a bundled one is looked for: a path in a picture is never opened)
    """
    import torch

    from marval.io.checkpoint import model_hash
    from marval.io.find import find_model
    from marval.io.images import grid, save_picture, to_pil
    from marval.recipe import KEY, make_recipe, plain_name
    from marval.runtime.progress import progress
    from marval.text import nearest_prompts

    if images.like is not None:
        if images != Images(like=images.like) or drawing != Drawing(device=drawing.device):
            raise ValueError("--like draws what the picture's recipe says: beside it go --out, --force and --device")
        sample_like(images.like, model, output, drawing.device)
        return
    if model is None:
        raise ValueError(
            'name a model, as in: marval sample emoji-student --prompt "a shark" (or a picture with --like)'
        )
    pipeline = marval.load(model, usable_device(drawing.device)).with_draw(
        diffusion_steps=drawing.diffusion_steps, guidance=drawing.guidance,
        guidance_schedule=drawing.guidance_schedule, temperature=drawing.temperature,
    )  # fmt: skip
    pipeline.to(dtype=getattr(torch, drawing.dtype))
    if drawing.compile:
        pipeline.compile()
    k = pipeline.default_iterations if drawing.iterations is None else drawing.iterations
    digest, count = model_hash(find_model(model)), images.count
    pictures = [
        make_recipe(model, digest, pipeline, asked, images.seed + i, k, drawing.order)
        for i, asked in enumerate(asked_for(images, pipeline.config))
    ]
    files = [output.out / f"{i:05d}-{plain_name(r.class_name)}-{r.seed}.png" for i, r in enumerate(pictures)]
    check_targets(files, output.force)  # the grid shows what was drawn last
    shown: list[Tensor] = []
    with progress(count, "drawing images") as advance:
        for first in range(0, count, drawing.batch_size):
            some = slice(first, first + drawing.batch_size)
            asked, seeds = [r.asked for r in pictures[some]], [r.seed for r in pictures[some]]
            drawn = pipeline.sample(asked, seed=seeds, iterations=k, order=drawing.order, batch_size=len(asked))
            for image, file, recipe in zip(drawn, files[some], pictures[some], strict=True):
                save_picture(file, to_pil(image), {KEY: recipe.to_json()})
            shown += drawn[: max(0, IN_GRID - len(shown))]
            advance(len(drawn))
    rows = torch.stack(shown).split(math.isqrt(len(shown) - 1) + 1)  # nearly a square
    save_picture(output.out / "grid.png", grid(rows, scale=max(1, 84 // shown[0].shape[-1])))
    for prompt in dict.fromkeys(recipe.class_name for recipe in pictures if recipe.label is None):
        near = nearest_prompts(prompt, pipeline.config, pipeline.model)
        print(f"{prompt!r} is new to the model; the nearest that it knows: {', '.join(near)}")
    print(f"{count} image{'s' if count > 1 else ''} and grid.png in {output.out}")


def asked_for(images: Images, config: ModelConfig) -> list[int | str]:
    """The class or prompt of each image."""
    from marval.classes import labels_in_turn, listed_class_numbers
    from marval.text import read_prompt, style_number

    chosen: list[int | str]
    if config.encoder:
        if images.classes:
            raise ValueError(f"--classes: {config.name} is a model of text; use --prompt")
        chosen = [read_prompt(prompt, config, images.style).name(config) for prompt in images.prompt]
    else:
        if images.prompt or images.style:
            raise ValueError(f"--prompt and --style: {config.name} is a model of classes; use --classes")
        chosen = [*listed_class_numbers(images.classes, config.class_names)]
    if not chosen:
        labels = labels_in_turn(range(images.count), config)
        if images.style:
            styles, style = len(config.styles), style_number(images.style, config)
            labels = [label // styles * styles + style for label in labels]
        chosen = [*labels]
    return [chosen[i % len(chosen)] for i in range(images.count)]


def check_targets(files: Sequence[Path], force: bool) -> None:
    """Refuse to replace files that this run did not make, and a folder that cannot be written to."""
    from marval.io.files import check_output

    there = next((file for file in files if file.exists()), None)
    if there is not None and not force:
        raise ValueError(f"{there} is there already: choose another --out, or replace with --force")
    check_output(files[0], folder=False)


def sample_like(like: Path, model: str | None, output: Folder, device: str) -> None:
    """Draw the picture in a PNG file again from its recipe, and say whether it is the same."""
    import numpy as np

    from marval.io.images import save_picture, to_pil
    from marval.recipe import KEY, find_pipelines, read_recipe, redraw

    recipe, before = read_recipe(like)
    target = output.out / like.name
    check_targets([target], output.force)
    picture = to_pil(redraw(recipe, find_pipelines(model, usable_device(device))))
    told = f"the file holds {before.width}x{before.height} pixels: it was changed after it was saved"
    if before.size == picture.size:
        most = np.abs(np.asarray(before.convert(picture.mode), int) - np.asarray(picture, int)).max()
        told = "the same, pixel for pixel"
        if most:
            told = f"it differs by up to {most} of 255 levels (1 is rounding in float32)"
    save_picture(target, picture, {KEY: recipe.to_json()})
    print(f"{target}: {told}")


@dataclass(frozen=True)
class DemoOutput(Checked):
    """options"""

    out: Path = Path("demo-out")  # a folder for the pictures and the report
    device: str = "auto"  # auto, cpu, cuda or cuda:N


def demo(*, output: DemoOutput) -> None:
    """Draw, time and score the bundled models, then distil a student live: a few minutes.

    marval demo
    marval demo --out my-demo
    """
    from marval.cli.demo import run

    run(output.out, usable_device(output.device))


@dataclass(frozen=True)
class Address(Checked):
    """options"""

    host: str = "127.0.0.1"  # the address to listen on; 0.0.0.0 lets other machines in: then say who, with --auth
    port: int = 7860  # the port to listen on
    auth: str | None = None  # NAME:PASSWORD to ask visitors for; MARVAL_AUTH may hold it, where nobody else sees it
    browser: bool = False  # open the page in a browser
    device: str = "auto"  # auto, cpu, cuda or cuda:N


def serve(models: tuple[str, ...] = (), *, address: Address) -> None:
    """Open a web page that draws, edits and compares pictures.

    marval serve
    marval serve runs/mine runs/student --port 8000 --browser

    It works offline, and only this machine reaches it. The page speaks http: beyond a network that you trust, put a
    proxy with https before it.

    Args:
        models: bundled models, or models' or runs' folders; the bundled models when left out
    """
    try:
        from marval.page.server import serve as run
    except ImportError as error:
        raise ValueError(f"the page needs starlette and uvicorn ({error}): pip install starlette uvicorn") from None

    run(models or BUNDLED, usable_device(address.device), address.host, address.port, address.auth, address.browser)
