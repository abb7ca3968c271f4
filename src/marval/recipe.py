"""Recipes: everything that one picture was drawn from, kept in its PNG, so that it can be drawn again exactly."""

import base64
import dataclasses
import functools
import io
import json
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, SupportsIndex

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from marval.checks import Checked, shorten
from marval.config import Dtype, Finite, Order, Schedule
from marval.io.checkpoint import WEIGHTS
from marval.io.files import one_line, sha256_of
from marval.io.find import bundled_models, find_model
from marval.io.images import pixels, read_image
from marval.pipeline import Pipeline, load

KEY = "marval"  # of the PNG's metadata
LONGEST = 100  # edits of one picture
MOST_PIXELS = 16_000_000  # of a picture with a recipe
DIALS = "guidance", "guidance_schedule", "diffusion_steps", "temperature"  # of a draw, where a model has them
KEYS = {"class_name": "class", "iterations": "K", "guidance": "w", "diffusion_steps": "T"}  # field: its name in the PNG


@dataclass(frozen=True)
class Recipe(Checked):
    """How one picture was drawn.

    An edit says which tokens were `redrawn`, and of what: the picture `before`, or an `upload` (a PNG of the model's
    size in base64).
    """

    model: str  # a bundled model's name, or a folder
    weights: str  # SHA-256 of its file
    class_name: str  # or the prompt
    seed: int
    iterations: int
    order: Order
    label: int | None = None  # of the class or prompt; None: a prompt that the model does not know
    dtype: Dtype = "float32"  # of the weights while they drew
    guidance: Finite | None = None  # where it can be chosen, as the three below
    guidance_schedule: Schedule | None = None
    diffusion_steps: int | None = None
    temperature: Finite | None = None
    redrawn: tuple[int, ...] | None = None
    before: "Recipe | None" = None
    upload: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.redrawn is None) != (self.before is None and self.upload is None):
            raise ValueError("an edit needs the tokens that it redrew and the picture before")

    @property
    def asked(self) -> str | int:
        """What to ask the model for: a label or, where it knows none, the prompt."""
        return self.class_name if self.label is None else self.label

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
        for name in ("guidance", "temperature"):  # JavaScript writes 1.0 as 1
            if type(number := values.get(name)) is int and abs(number) < 2**53:
                values[name] = float(number)
        if values.get("redrawn") is not None:
            values["redrawn"] = tuple(values["redrawn"])
        if values.get("before") is not None:
            values["before"] = cls.from_dict(values["before"], edits - 1)
        return cls(**values)

    @classmethod
    def from_json(cls, text: str) -> "Recipe":
        """The inverse of `to_json`; a ValueError where the text is no recipe."""
        try:
            return cls.from_dict(json.loads(text))
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"not a recipe of marval ({one_line(error)})") from None


def plain_name(class_name: str) -> str:
    """A class as a part of a file's name: a stranger's model may call it anything."""
    return re.sub(r"(?:, |[^\w.,+()&'-])+", "-", class_name)[:40]


def make_recipe(
    name: str,
    weights: str,
    pipeline: Pipeline,
    asked: str | SupportsIndex,
    seed: int,
    iterations: int,
    order: Order | None = None,
) -> Recipe:
    """Describe a picture of a class or prompt that `pipeline` draws; in the model's own order when `order` is None."""
    config = pipeline.config
    label, class_name = pipeline.named(asked)
    how: dict[str, Any] = {"dtype": str(pipeline.model.mask_token.dtype).removeprefix("torch.")}
    how |= {name: getattr(config.draw, name) for name in config.dials}
    return Recipe(name, weights, class_name, seed, iterations, order or config.order, label, **how)


def find_pipelines(name: str | Path | None, device: str) -> Callable[[Recipe], Pipeline]:
    """Finds the model of a recipe by its weights: the one called `name`, one in that folder, or a bundled model.

    Recipes of another precision get a pipeline of their own. What a recipe calls its model is never opened as a path:
    the picture may be a stranger's.
    """
    files = [folder / WEIGHTS for folder in bundled_models().values()]
    if name is not None:
        found, inside = find_model(name), Path(name)
        files += [found if found.is_file() else found / WEIGHTS]
        files += [*inside.glob(f"*/{WEIGHTS}"), *inside.glob(f"*/model/{WEIGHTS}")]

    @functools.cache
    def load_weights(weights: str, dtype: Dtype) -> Pipeline:
        file = next((file for file in files if file.is_file() and sha256_of(file) == weights), None)
        if file is None:
            raise ValueError(
                f"no model here has the weights that drew the picture (SHA-256 {shorten(weights[:12])}): name its "
                "folder, marval sample MODEL --like FILE.png"
            )
        return load(file, device).to(dtype=getattr(torch, dtype))

    return lambda recipe: load_weights(recipe.weights, recipe.dtype)


def draw_recipe(
    recipe: Recipe,
    pipeline: Pipeline,
    before: Float[Tensor, "l c"] | None = None,
    on_iteration: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Float[Tensor, "l c"]:
    """Draw a recipe's tokens. An edit keeps the tokens of `before` to the bit, except those that it redraws."""
    pipeline = pipeline.with_draw(**{name: getattr(recipe, name) for name in DIALS})
    known, count = None, pipeline.config.mar.num_tokens
    if before is not None and recipe.redrawn is not None:
        redrawn = sorted(set(recipe.redrawn))
        if not redrawn or redrawn[0] < 0 or redrawn[-1] >= count:
            raise ValueError(f"tokens to redraw: expected some numbered 0 to {count - 1}; got {redrawn[:5]}")
        keep = torch.ones(1, count, dtype=torch.bool)
        keep[0, redrawn] = False
        known = (before[None], keep)
    tokens = pipeline.sample_tokens(
        [recipe.asked], seeds=[recipe.seed], iterations=recipe.iterations, order=recipe.order, known=known,
        on_iteration=on_iteration,
    )  # fmt: skip
    return tokens[0].clone()


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
    """Read the recipe in a PNG file's metadata, and the picture; a ValueError where it is none of marval's."""
    if not file.is_file():
        raise ValueError(f"{file} does not exist, or is no file: expected a PNG")
    try:
        with warnings.catch_warnings(action="ignore"):  # of Pillow's own, larger limit
            picture = Image.open(file, formats=("PNG",))
        if picture.width * picture.height > MOST_PIXELS:  # by the header, before it is unpacked
            raise ValueError(f"{picture.width}x{picture.height} pixels: expected at most {MOST_PIXELS}")
        picture.load()
        if KEY not in picture.info:
            raise ValueError("it has no recipe in it: expected a picture that marval sample or marval serve saved")
        return Recipe.from_json(picture.info[KEY]), picture
    except Exception as error:  # a decoder may raise anything on damaged bytes
        raise ValueError(f"{file} cannot be read as a PNG with a recipe ({one_line(error)})") from None
