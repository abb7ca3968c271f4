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

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from marval.config import Chain, Checked, Finite, Order, Schedule, shorten
from marval.io.checkpoint import WEIGHTS, model_hash
from marval.io.files import one_line
from marval.io.images import pixels, read_image
from marval.pipeline import Pipeline, bundled_models, find_model, load

KEY = "marval"  # of the PNG's metadata
LONGEST = 100  # edits of one picture
LARGEST_BATCH = 1024  # pictures drawn together
MOST_NOISE = 2**28  # numbers that are drawn for a picture and its batch at once: 1 GiB
MOST_PIXELS = 16_000_000  # of a picture with a recipe
CHAIN = ("guidance", "guidance_schedule", "diffusion_steps", "temperature")  # what only a teacher's recipe says
KEYS = {"class_name": "class", "iterations": "K", "guidance": "w", "diffusion_steps": "T"}  # field: its name in the PNG


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
    diffusion_steps: int | None = None
    temperature: Finite | None = None
    batch: tuple[tuple[int, int], ...] = ()
    row: int = 0
    redrawn: tuple[int, ...] | None = None
    before: "Recipe | None" = None
    upload: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.batch) > LARGEST_BATCH:
            raise ValueError(f"a batch of {len(self.batch)} pictures: expected at most {LARGEST_BATCH}")
        if (self.redrawn is None) != (self.before is None and self.upload is None):
            raise ValueError("an edit needs the tokens that it redrew and the picture before")

    @property
    def history(self) -> list["Recipe"]:
        """This recipe and those of the pictures before, the latest first."""
        return [self, *(self.before.history if self.before else ())]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that are set, ready for JSON."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values = {name: value for name, value in values.items() if value != getattr(Recipe, name, None)}
        if self.before is not None:
            values["before"] = self.before.to_dict()
        return {KEYS.get(name, name): value for name, value in values.items()}

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_dict(cls, values: dict[str, Any], edits: int = LONGEST) -> "Recipe":
        """The inverse of `to_dict`, of at most so many edits."""
        if not edits:
            raise ValueError(f"expected at most {LONGEST} edits")
        fields = {key: name for name, key in KEYS.items()}
        values = {fields.get(key, key): value for key, value in dict(values).items()}
        values["batch"] = tuple(map(tuple, values.get("batch", ())))
        if values.get("redrawn") is not None:
            values["redrawn"] = tuple(values["redrawn"])
        if values.get("before") is not None:
            values["before"] = cls.from_dict(values["before"], edits - 1)
        return cls(**values)

    @classmethod
    def from_json(cls, text: str) -> "Recipe":
        """The inverse of `to_json`.

        Raises:
            ValueError: not a recipe.
        """
        try:
            return cls.from_dict(json.loads(text))
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"not a recipe of marval ({one_line(error)})") from None


def plain_name(class_name: str) -> str:
    """A class as a part of a file's name: a stranger's model may call it anything."""
    return re.sub(r"[^\w.,+()&'-]", "-", class_name)[:40]


def make_recipe(
    name: str, weights: str, pipeline: Pipeline, label: int, seed: int, iterations: int, order: Order | None = None
) -> Recipe:
    """Describe a picture that `pipeline` draws; in the model's own order when `order` is None."""
    config, chain = pipeline.config, {}
    if isinstance(config.draw, Chain):
        chain = {name: getattr(config.draw, name) for name in CHAIN}
    return Recipe(name, weights, label, config.class_names[label], seed, iterations, order or config.order, **chain)


def batch_recipes(recipes: Sequence[Recipe], batch_size: int) -> list[Recipe]:
    """Say of recipes that `batch_size` of them are drawn together, as `Pipeline.sample` does."""
    batches = []
    for i, recipe in enumerate(recipes):
        row = i % batch_size
        together = recipes[i - row : i - row + batch_size]
        batch = tuple((one.label, one.seed) for one in together) if len(together) > 1 else ()
        batches.append(dataclasses.replace(recipe, batch=batch, row=row))
    return batches


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
            folder = next((folder for folder in folders if model_hash(folder) == recipe.weights), None)
            if folder is None:
                told = f"the picture was drawn by {shorten(recipe.model)}, which is no bundled model: name its folder"
                if folders:
                    told = f"{name or recipe.model} has other weights than those that drew the picture (SHA-256 "
                    told += f"{shorten(recipe.weights[:12])}): name the right model"
                raise ValueError(f"{told}, marval sample MODEL --like FILE.png")
            loaded[recipe.weights] = load(folder, device)
        return loaded[recipe.weights]

    return find


def named_models(name: str | Path) -> list[Path]:
    """Find the model of this name or, in a folder without weights of its own, the models in it."""
    folder = find_model(name)
    if folder.is_file() or (folder / WEIGHTS).is_file():
        return [folder]
    models = [find_model(inside) for inside in sorted(folder.iterdir()) if inside.is_dir()]
    models = [inside for inside in models if (inside / WEIGHTS).is_file()]
    if not models:
        raise ValueError(f"{name} has no {WEIGHTS} in it, nor has a folder in it: name a model's or run's folder")
    return models


def draw_recipe(
    recipe: Recipe,
    pipeline: Pipeline,
    before: Float[Tensor, "l c"] | None = None,
    on_iteration: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Float[Tensor, "l c"]:
    """Draw a recipe's tokens. An edit keeps the tokens of `before` to the bit, except those that it redraws.

    Raises:
        ValueError: a class, position or number out of range for the model.
    """
    pipeline = pipeline.with_chain(**{name: getattr(recipe, name) for name in CHAIN})
    pairs, row = recipe.batch or ((recipe.label, recipe.seed),), recipe.row
    if not 0 <= row < len(pairs) or pairs[row] != (recipe.label, recipe.seed):
        raise ValueError(f"row {row} of a batch of {len(pairs)} is not class {recipe.label}, seed {recipe.seed}")
    mar, draw, known = pipeline.config.mar, pipeline.config.draw, None
    draws = draw.diffusion_steps if isinstance(draw, Chain) else 1
    if len(pairs) * draws * mar.num_tokens * mar.token_dim > MOST_NOISE:
        raise ValueError(f"a batch of {len(pairs)} pictures of this model needs more than 1 GiB of noise")
    if before is not None and recipe.redrawn is not None:
        redrawn = sorted(set(recipe.redrawn))
        if not redrawn or redrawn[0] < 0 or redrawn[-1] >= mar.num_tokens:
            raise ValueError(f"tokens to redraw: expected some numbered 0 to {mar.num_tokens - 1}; got {redrawn[:5]}")
        keep = torch.ones(1, mar.num_tokens, dtype=torch.bool)
        keep[0, redrawn] = False
        known = (before[None], keep)
    tokens = pipeline.sample_tokens(
        pipeline.labels([label for label, _ in pairs]), seeds=[seed for _, seed in pairs],
        iterations=recipe.iterations, order=recipe.order, known=known, on_iteration=on_iteration,
    )  # fmt: skip
    return tokens[row].clone()


def redraw(recipe: Recipe, find: Callable[[Recipe], Pipeline]) -> Float[Tensor, "c h w"]:
    """Draw the picture again with its edits, on the CPU; `find` returns a recipe's model."""
    tokens: Tensor | None = None
    with torch.inference_mode():
        for edit in reversed(recipe.history):
            pipeline = find(edit)
            if edit.upload is not None:
                rows, columns = pipeline.config.space.image_size
                try:
                    content = io.BytesIO(base64.b64decode(edit.upload))
                    picture = read_image(content, formats=("PNG",), most_pixels=rows * columns)
                except ValueError as error:
                    raise ValueError(f"the upload in the recipe is damaged ({error})") from None
                tokens = encode_picture(pipeline, picture)
            tokens = draw_recipe(edit, pipeline, tokens)
        assert tokens is not None
        return pipeline.space.decode(tokens[None])[0].cpu().clone()


def encode_picture(pipeline: Pipeline, picture: Image.Image) -> Float[Tensor, "l c"]:
    """The tokens of a picture of the model's size, in grey or colour as the model has it."""
    rows, columns = pipeline.config.space.image_size
    if picture.size != (columns, rows):
        raise ValueError(f"a picture of {picture.width}x{picture.height}: the model draws {columns}x{rows}")
    grey = pipeline.config.space.channels == 1
    image = torch.from_numpy(pixels(picture.convert("L" if grey else "RGB"), (rows, columns)).copy()).float() / 255
    with torch.inference_mode():
        return pipeline.space.encode(image[None].to(pipeline.device))[0].clone()


def read_recipe(file: Path) -> tuple[Recipe, Image.Image]:
    """Read the recipe in a PNG file's metadata, and the picture.

    Raises:
        ValueError: no such file, not a PNG, too many pixels, or none of marval's recipes in it.
    """
    if not file.is_file():
        raise ValueError(f"{file} does not exist, or is no file: expected a PNG")
    try:
        with warnings.catch_warnings(action="ignore"):  # of Pillow's own, larger limit
            picture = Image.open(file, formats=("PNG",))
        if picture.width * picture.height > MOST_PIXELS:  # by the header, before it is unpacked
            raise ValueError(f"{picture.width}x{picture.height} pixels: expected at most {MOST_PIXELS}")
        picture.load()
    except (OSError, SyntaxError, ValueError, EOFError, ArithmeticError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file} cannot be read as a PNG ({one_line(error)})") from None
    text = picture.info.get(KEY)
    if not isinstance(text, str):
        raise ValueError(f"{file} has no recipe in it: expected a picture that marval sample or marval serve saved")
    try:
        return Recipe.from_json(text), picture
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
