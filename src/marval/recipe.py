"""Recipes: everything that one picture was drawn from, kept in its PNG, so that it can be drawn again exactly."""

import base64
import dataclasses
import io
import json
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from marval.config import Chain, Checked, Finite, Order, Schedule, shorten
from marval.io.checkpoint import WEIGHTS, model_hash
from marval.io.files import one_line
from marval.io.images import png_bytes
from marval.pipeline import Pipeline, bundled_models, find_model, load

KEY = "marval"  # of the PNG's metadata
LONGEST = 100  # edits of one picture
LARGEST_BATCH = 1024  # pictures drawn together
MOST_NOISE = 2**28  # numbers that are drawn for a picture and its batch at once: 1 GiB
LONGEST_TEXT = 16 * 2**20  # characters of a recipe, with an upload in it
MOST_PIXELS = 16_000_000  # of a picture with a recipe
KEYS = {"class_name": "class", "iterations": "K", "guidance": "w", "steps": "T"}  # field: name in JSON, the paper's
TokenHook = Callable[[int, Tensor, Tensor], None]


@dataclass(frozen=True)
class Recipe(Checked):
    """How one picture was drawn.

    `batch` holds (class, seed) of all pictures that were drawn together, and `row` this one's place: sums in a batch
    are rounded in another order than alone. An edit says which tokens were `redrawn`, and of what: the picture
    `before`, or an `upload` (a PNG of the model's size in base64).
    """

    model: str  # a bundled model's name, or a folder
    weights: str  # SHA-256 of its file
    label: int
    class_name: str
    seed: int
    iterations: int
    order: Order
    guidance: Finite | None = None  # of a teacher, as the three below
    guidance_schedule: Schedule | None = None
    steps: int | None = None
    temperature: Finite | None = None
    batch: tuple[tuple[int, int], ...] = ()
    row: int = 0
    redrawn: tuple[int, ...] | None = None
    before: "Recipe | None" = None
    upload: str | None = None

    @property
    def history(self) -> list["Recipe"]:
        """This recipe and those of the pictures before, the latest first."""
        found: list[Recipe] = [self]
        while found[-1].before is not None:
            found.append(found[-1].before)
        return found

    def to_json(self) -> str:
        """One line of JSON, without what is not set."""

        def plain(recipe: Recipe) -> dict[str, Any]:
            values = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe)}
            kept = {
                KEYS.get(name, name): value
                for name, value in values.items()
                if value not in (None, ()) and not (name == "row" and value == 0)
            }
            return {name: plain(value) if isinstance(value, Recipe) else value for name, value in kept.items()}

        return json.dumps(plain(self))

    @classmethod
    def from_json(cls, text: str) -> "Recipe":
        """The inverse of `to_json`.

        Raises:
            ValueError: not a recipe.
        """
        if len(text) > LONGEST_TEXT:
            raise ValueError(f"not a recipe of marval ({len(text)} characters: expected at most {LONGEST_TEXT})")
        try:
            steps = [dict(json.loads(text))]
            while (before := steps[-1].pop("before", None)) is not None:
                steps.append(dict(before))
            if len(steps) > LONGEST:
                raise ValueError(f"{len(steps)} edits: expected at most {LONGEST}")
            recipe = None
            for values in reversed(steps):
                recipe = _parse(values, recipe)
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"not a recipe of marval ({one_line(error)})") from None
        assert recipe is not None  # there is at least one step
        return recipe


def _parse(values: dict[str, Any], before: Recipe | None) -> Recipe:
    names = {short: name for name, short in KEYS.items()}
    values = {names.get(key, key): value for key, value in values.items()}
    values["batch"] = tuple(tuple(pair) for pair in values.get("batch", ()))
    if values.get("redrawn") is not None:
        values["redrawn"] = tuple(values["redrawn"])
    recipe = Recipe(**values)
    if len(recipe.batch) > LARGEST_BATCH:
        raise ValueError(f"a batch of {len(recipe.batch)} pictures: expected at most {LARGEST_BATCH}")
    if (recipe.redrawn is None) != (before is None and recipe.upload is None):
        raise ValueError("an edit needs the tokens that it redrew and the picture before")
    return dataclasses.replace(recipe, before=before)


def plain_name(class_name: str) -> str:
    """A class as a part of a file's name: a stranger's model may call it anything."""
    return re.sub(r"[^\w.,+()&'-]", "-", class_name)[:40]


def make_recipe(
    name: str, weights: str, pipeline: Pipeline, label: int, seed: int, iterations: int, order: Order | None = None
) -> Recipe:
    """The recipe of a picture that `pipeline` draws, with its own order when None."""
    draw = pipeline.config.draw
    recipe = Recipe(
        name, weights, label, pipeline.config.class_names[label], seed, iterations, order or pipeline.config.order
    )
    if not isinstance(draw, Chain):
        return recipe
    return dataclasses.replace(
        recipe, guidance=draw.guidance, guidance_schedule=draw.guidance_schedule, steps=draw.diffusion_steps,
        temperature=draw.temperature,
    )  # fmt: skip


def batch_recipes(
    name: str,
    weights: str,
    pipeline: Pipeline,
    labels: Sequence[int],
    seed: int,
    iterations: int | None,
    order: Order | None,
    batch_size: int = 64,
) -> list[Recipe]:
    """The recipes of `pipeline.sample(labels, seed=seed, ...)`, which draws `batch_size` pictures together."""
    pairs = [(label, seed + i) for i, label in enumerate(labels)]
    count = pipeline.config.iterations if iterations is None else iterations
    recipes = []
    for i, (label, own_seed) in enumerate(pairs):
        recipe = make_recipe(name, weights, pipeline, label, own_seed, count, order)
        start = i // batch_size * batch_size
        batch = tuple(pairs[start : start + batch_size])
        recipes.append(dataclasses.replace(recipe, batch=batch, row=i - start) if len(batch) > 1 else recipe)
    return recipes


def find_pipelines(name: str | Path | None, device: str) -> Callable[[Recipe], Pipeline]:
    """Finds the model of a recipe by its weights: the one called `name`, one in that folder, or a bundled model.

    What a recipe calls its model is never opened as a path: the picture may be a stranger's. The function raises
    ValueError where there is no such model, or it has other weights.
    """
    loaded: dict[str, Pipeline] = {}

    def find(recipe: Recipe) -> Pipeline:
        if recipe.weights not in loaded:
            bundled = bundled_models().get(recipe.model)
            folders = [*([] if name is None else named_models(name)), *([] if bundled is None else [bundled])]
            if not folders:
                raise ValueError(
                    f"the picture was drawn by {shorten(recipe.model)}, which is no bundled model: name its folder, "
                    "marval sample MODEL --like FILE.png"
                )
            folder = next((folder for folder in folders if model_hash(folder) == recipe.weights), None)
            if folder is None:
                raise ValueError(
                    f"{name or recipe.model} has other weights than those that drew the picture (SHA-256 "
                    f"{shorten(recipe.weights[:12])}): name the right model, marval sample MODEL --like FILE.png"
                )
            loaded[recipe.weights] = load(folder, device)
        return loaded[recipe.weights]

    return find


def named_models(name: str | Path) -> list[Path]:
    """The model that somebody named; or, where it is a folder without weights of its own, the models in it.

    Raises:
        ValueError: there is none.
    """
    folder = find_model(name)
    if folder.is_file() or (folder / WEIGHTS).is_file():
        return [folder]
    found = [find_model(inside) for inside in sorted(folder.iterdir()) if inside.is_dir()]
    found = [inside for inside in found if (inside / WEIGHTS).is_file()]
    if not found:
        raise ValueError(f"{name} has no {WEIGHTS} in it, nor has a folder in it: name a model's or run's folder")
    return found


def draw_recipe(
    recipe: Recipe,
    pipeline: Pipeline,
    before: Float[Tensor, "l c"] | None = None,
    on_iteration: TokenHook | None = None,
) -> Float[Tensor, "l c"]:
    """The picture's tokens. An edit keeps the tokens of `before` to the bit, but for those that it redraws.

    Raises:
        ValueError: a class, position or number out of range for the model.
    """
    pipeline = pipeline.with_chain(
        diffusion_steps=recipe.steps,
        guidance=recipe.guidance,
        guidance_schedule=recipe.guidance_schedule,
        temperature=recipe.temperature,
    )
    pairs = recipe.batch or ((recipe.label, recipe.seed),)
    if not 0 <= recipe.row < len(pairs) or pairs[recipe.row] != (recipe.label, recipe.seed):
        raise ValueError(f"row {recipe.row} of a batch of {len(pairs)} is not class {recipe.label}, seed {recipe.seed}")
    labels = pipeline.labels([label for label, _ in pairs])
    mar, draw = pipeline.config.mar, pipeline.config.draw
    if (
        len(pairs) * (draw.diffusion_steps if isinstance(draw, Chain) else 1) * mar.num_tokens * mar.token_dim
        > MOST_NOISE
    ):
        raise ValueError(f"a batch of {len(pairs)} pictures of this model needs more than 1 GiB of noise")
    known = None
    if before is not None and recipe.redrawn is not None:
        count = pipeline.config.mar.num_tokens
        redrawn = sorted(set(recipe.redrawn))
        if not redrawn or redrawn[0] < 0 or redrawn[-1] >= count:
            raise ValueError(f"tokens to redraw: expected at least one, numbered 0 to {count - 1}; got {redrawn[:5]}")
        keep = torch.ones(1, count, dtype=torch.bool)
        keep[0, redrawn] = False
        known = (before[None], keep)
    tokens = pipeline.sample_tokens(
        labels,
        seeds=[seed for _, seed in pairs],
        iterations=recipe.iterations,
        order=recipe.order,
        batch_size=len(pairs),
        known=known,
        on_iteration=on_iteration,
    )
    return tokens[recipe.row].clone()


def redraw(recipe: Recipe, find: Callable[[Recipe], Pipeline]) -> Float[Tensor, "c h w"]:
    """The picture again, edits and all, on the CPU; `find` gives the model of a recipe.

    Raises:
        ValueError: as `draw_recipe` and `find`, or a damaged upload.
    """
    tokens: Tensor | None = None
    with torch.inference_mode():
        for step in reversed(recipe.history):
            pipeline = find(step)
            if step.upload is not None:
                rows, columns = pipeline.config.space.image_size
                tokens = encode_picture(pipeline, open_upload(step.upload, rows * columns))
            tokens = draw_recipe(step, pipeline, tokens)
        assert tokens is not None  # a history holds at least the recipe itself
        return pipeline.space.decode(tokens[None])[0].cpu().clone()


def encode_picture(pipeline: Pipeline, picture: Image.Image) -> Float[Tensor, "l c"]:
    """The tokens of a picture of the model's size, in grey or colour as the model has it.

    Raises:
        ValueError: another size.
    """
    rows, columns = pipeline.config.space.image_size
    if picture.size != (columns, rows):
        raise ValueError(f"a picture of {picture.width}x{picture.height}: the model draws {columns}x{rows}")
    grey = getattr(pipeline.config.space, "channels", 3) == 1
    array = np.asarray(picture.convert("L" if grey else "RGB"))
    image = torch.from_numpy(array.copy()).float() / 255
    image = image[None] if grey else image.permute(2, 0, 1)
    with torch.inference_mode():
        return pipeline.space.encode(image[None].to(pipeline.device))[0].clone()


def pack_upload(picture: Image.Image) -> str:
    """A picture as a recipe keeps it."""
    return base64.b64encode(png_bytes(picture)).decode()


def open_upload(text: str, most_pixels: int) -> Image.Image:
    """The inverse of `pack_upload`.

    Raises:
        ValueError: damaged, or more pixels than that.
    """
    try:
        return open_png(io.BytesIO(base64.b64decode(text)), most_pixels)
    except ValueError as error:
        raise ValueError(f"the upload in the recipe is damaged ({error})") from None


def open_png(source: Path | io.BytesIO, most_pixels: int = MOST_PIXELS) -> Image.Image:
    """A PNG as it is, with its metadata; its size is known from the header, before it is unpacked.

    Raises:
        ValueError: not a PNG, damaged, or more pixels than that.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # of Pillow's own, larger limit
            picture = Image.open(source, formats=["PNG"])
        if picture.width * picture.height > most_pixels:
            raise ValueError(f"{picture.width}x{picture.height} pixels: expected at most {most_pixels}")
        picture.load()
    except (OSError, SyntaxError, ValueError, EOFError, ArithmeticError, Image.DecompressionBombError) as error:
        raise ValueError(one_line(error)) from None
    return picture


def read_recipe(file: Path) -> tuple[Recipe, Image.Image]:
    """The recipe in a PNG file's metadata, and the picture.

    Raises:
        ValueError: no such file, not a PNG, or none of marval's recipes in it.
    """
    if not file.is_file():
        raise ValueError(f"{file} does not exist, or is no file: expected a PNG")
    try:
        picture = open_png(file)
    except ValueError as error:
        raise ValueError(f"{file} cannot be read as a PNG ({error})") from None
    text = picture.info.get(KEY)
    if not isinstance(text, str):
        raise ValueError(f"{file} has no recipe in it: expected a picture that marval sample or marval serve saved")
    try:
        return Recipe.from_json(text), picture
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
