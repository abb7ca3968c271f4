"""What the page does, without the page: pictures drawn one iteration at a time, edited, varied and uploaded."""

import base64
import dataclasses
import io
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image, ImageOps
from torch import Tensor

from marval.checks import Checked, Rule
from marval.config import Chain, Count, Guidance, NotNegative, Order, Share
from marval.evaluate.speed import synchronize
from marval.io.checkpoint import model_hash
from marval.io.find import find_model
from marval.io.images import png_bytes, read_image, to_pil
from marval.pipeline import Pipeline, load
from marval.recipe import KEY, LONGEST, MOST_PIXELS, Recipe, draw_recipe, encode_picture, make_recipe, plain_name
from marval.runtime.rng import generator
from marval.text import nearest_prompts

LAST_SEED = 999_999
UPLOADS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
SHOWING = 0.25  # seconds of decoding partial pictures for each second of drawing, after the first half second
PageSeed = Annotated[int, Rule(f"a whole number from 0 to {LAST_SEED}", lambda seed: 0 <= seed <= LAST_SEED)]
Event = dict[str, Any]  # what a visitor is told of a drawing, ready for JSON
Job = tuple[Recipe, Tensor | None]  # a picture to draw, checked, and the tokens of the one that it is an edit of


def text_of(content: bytes) -> str:
    """Bytes as JSON carries them, in base64."""
    return base64.b64encode(content).decode()


def read_picture(values: Any, pipeline: Pipeline) -> tuple[Float[Tensor, "l d"], Recipe | None, str | None]:
    """Read a picture that `pipeline` is to edit, as the server gave it: tokens, recipe, and the upload that it was.

    Raises:
        ValueError: it is none, or of another kind of model.
    """
    if not isinstance(values, dict) or not isinstance(values.get("tokens"), str):
        raise ValueError("this is no picture: send one as /draw or /upload gave it")
    mar, recipe = pipeline.config.mar, values.get("recipe")
    content = base64.b64decode(values["tokens"], validate=True)
    if len(content) != 4 * mar.num_tokens * mar.token_dim:
        raise ValueError("this model draws pictures of another kind: choose the model that drew this one")
    tokens = torch.from_numpy(np.frombuffer(content, "<f4").reshape(mar.num_tokens, mar.token_dim).copy())
    return tokens, None if recipe is None else Recipe.from_json(json.dumps(recipe)), values.get("upload")


@dataclass(frozen=True)
class Wanted(Checked):
    """A picture that a visitor asks for; what is None is the model's own."""

    model: str
    class_name: str | int  # or a prompt
    style: str | None = None  # of the prompt
    seed: PageSeed = 0
    iterations: Count | None = None
    order: Order | None = None
    guidance: Guidance | None = None
    temperature: NotNegative | None = None
    picture: dict | None = None  # the one to edit, as the server gave it
    redrawn: tuple[int, ...] | None = None  # the tokens of it to draw anew
    keep: Share | None = None  # or the share of its tokens that stay, chosen by the seed

    @classmethod
    def from_json(cls, values: Any) -> "Wanted":
        """Read one; JSON says "class" for `class_name`.

        Raises:
            ValueError: a field is missing, unknown, or of a wrong type or range.
        """
        try:
            fields: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in values.items()}
            return cls(class_name=fields.pop("class"), **fields)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"this is no picture to draw, with a model and a class ({error})") from None


class Served:
    """A model on the page. Hooks count the passes of its context network (two for a guided picture), the calls of its
    token head, and the tokens that went through the head."""

    def __init__(self, name: str, device: str):
        self.pipeline, self.weights = load(name, device), model_hash(find_model(name))
        self.calls: Counter[str] = Counter()
        self.pipeline.graphs.work = False  # a graph runs no hooks, and shows nothing before its last iteration
        model = self.pipeline.model
        model.decoder_norm.register_forward_hook(lambda module, given, output: self.calls.update(context=len(output)))
        model.head.final_layer.register_forward_hook(
            lambda module, given, output: self.calls.update(head=1, tokens=output[..., 0].numel())
        )

    def to_json(self, name: str) -> dict[str, Any]:
        """Describe it to visitors."""
        config = self.pipeline.config
        chain = config.draw if isinstance(config.draw, Chain) else None
        return {
            "name": name,
            "text": bool(config.encoder),
            "classes": config.class_names,
            "styles": config.styles,
            "image_size": config.space.image_size,
            "token_grid": config.mar.token_grid,
            "iterations": config.iterations,
            "order": config.order,
            "guidance": config.draw.guidance if "guidance" in config.dials else None,
            "guidance_range": config.mar.guidance_range,
            "diffusion_steps": None if chain is None else chain.diffusion_steps,
        }


class Studio:
    """The models of a page. It keeps nothing of what visitors draw."""

    def __init__(self, names: Sequence[str], device: str):
        self.models = {name: Served(name, device) for name in names}
        for name in names:  # the first pass of a network is slow
            self.draw(self.job(Wanted(name, 0, iterations=1)))

    def served(self, name: str) -> Served:
        """A model by its name.

        Raises:
            ValueError: not on this page.
        """
        if name not in self.models:
            raise ValueError(f"no model {name[:60]!r} here: expected one of {', '.join(self.models)}")
        return self.models[name]

    def job(self, wanted: Wanted) -> Job:
        """Check what is asked for; what `draw_recipe` refuses is left to it.

        Raises:
            ValueError: an unknown model or class, or an edit of no picture.
        """
        served = self.served(wanted.model)
        pipeline, count = served.pipeline, served.pipeline.config.mar.num_tokens
        label, name = pipeline.named(wanted.class_name, wanted.style)
        iterations = wanted.iterations or pipeline.default_iterations
        dials = {name: getattr(wanted, name) for name in ("guidance", "temperature") if name in pipeline.config.dials}
        pipeline = pipeline.with_draw(**{name: float(value) for name, value in dials.items() if value is not None})
        asked = name if label is None else label
        recipe = make_recipe(wanted.model, served.weights, pipeline, asked, wanted.seed, iterations, wanted.order)
        redrawn = wanted.redrawn
        if wanted.keep is not None:
            rest = max(1, round((1 - wanted.keep) * count))
            redrawn = tuple(torch.randperm(count, generator=generator(wanted.seed, "vary"))[:rest].tolist())
        if wanted.picture is None:
            if redrawn is not None:
                raise ValueError("draw or upload a picture first")
            return recipe, None
        redrawn = tuple(sorted(set(redrawn or ())))
        tokens, before, upload = read_picture(wanted.picture, pipeline)
        if before is not None and len(before.history) >= LONGEST:
            raise ValueError(f"a recipe holds {LONGEST} edits: save this picture and upload it to go on from there")
        iterations = min(iterations, len(redrawn))
        edit: dict[str, Any] = {"redrawn": redrawn, "iterations": iterations, "before": before, "upload": upload}
        return dataclasses.replace(recipe, **edit), tokens

    def draw(self, job: Job, show: Callable[[Event], None] = lambda event: None) -> Event:
        """Draw a picture, and return its last event with the `picture`, which a visitor may send back to edit it.

        An event tells the `iteration`, the `seconds` of drawing so far, the `calls` of the networks (see `Served`), and
        what was drawn since the last `patches`: a PNG, transparent elsewhere. The last one tells the `nearest` prompts
        that the model knows, where it does not know this one.

        Args:
            show: told every event but the last; what it raises ends the drawing.

        Raises:
            ValueError: as `draw_recipe`.
        """
        recipe, before = job
        served = self.models[recipe.model]
        pipeline, showing, event = served.pipeline, 0.0, {}
        near = nearest_prompts(recipe.class_name, pipeline.config, pipeline.model) if recipe.label is None else None
        sent = torch.zeros(pipeline.config.mar.num_tokens, dtype=torch.bool)
        served.calls.clear()
        synchronize(pipeline.device)
        began = time.perf_counter()

        def look(k: int, tokens: Tensor, drawn: Tensor) -> None:
            nonlocal showing, sent, event
            synchronize(pipeline.device)  # what the accelerator has still to do belongs to the drawing
            now = time.perf_counter()
            seconds = now - began - showing
            event = {"iteration": k, "seconds": round(seconds, 4), "calls": dict(served.calls)}
            if k == recipe.iterations:
                return
            if showing < 0.5 + SHOWING * seconds:
                image, visible = pipeline.space.decode(tokens)[0].cpu(), drawn[0].cpu()
                event["patches"] = text_of(patches_png(image, visible & ~sent, pipeline))
                sent = visible
            show(event)
            showing += time.perf_counter() - now

        tokens = draw_recipe(recipe, pipeline, before, look)
        name = [recipe.model.rsplit("/", 1)[-1], recipe.class_name, f"seed{recipe.seed}", f"K{recipe.iterations}"]
        file = "-".join(map(plain_name, name)) + ("-edited.png" if recipe.redrawn else ".png")
        return {**event, "nearest": near, "picture": picture_json(pipeline, tokens, file, recipe=recipe)}

    def upload(self, content: bytes, model: str) -> Event:
        """A picture from a visitor's file: cropped to the model's shape, scaled to its size, and encoded once.

        Raises:
            ValueError: not a picture, or too many pixels, which are not unpacked.
        """
        pipeline = self.served(model).pipeline
        rows, columns = pipeline.config.space.image_size
        picture = read_image(io.BytesIO(content), most_pixels=MOST_PIXELS, formats=UPLOADS)
        fitted = ImageOps.fit(picture, (columns, rows))
        fitted = fitted.convert("L" if pipeline.config.space.channels == 1 else "RGB")
        tokens = encode_picture(pipeline, fitted)
        return picture_json(pipeline, tokens, "upload.png", upload=text_of(png_bytes(fitted)))


def picture_json(
    pipeline: Pipeline, tokens: Float[Tensor, "l d"], file: str, recipe: Recipe | None = None, upload: str | None = None
) -> Event:
    """A picture as a visitor gets it: `read_picture` reads it, `png` and `file` are for saving it."""
    with torch.inference_mode():
        image = to_pil(pipeline.space.decode(tokens[None].to(pipeline.device))[0])
    return {
        "png": text_of(png_bytes(image, None if recipe is None else {KEY: recipe.to_json()})),
        "file": file,
        "tokens": text_of(tokens.float().cpu().numpy().astype("<f4").tobytes()),
        "recipe": None if recipe is None else recipe.to_dict(),
        "upload": upload,
    }


def patches_png(image: Float[Tensor, "c h w"], tokens: Bool[Tensor, " l"], pipeline: Pipeline) -> bytes:
    """The pixels of some tokens as a PNG of the picture's size, transparent elsewhere."""
    picture = to_pil(image)
    mask = Image.fromarray((tokens.reshape(pipeline.config.mar.token_grid).numpy() * 255).astype(np.uint8))
    mask = mask.resize(picture.size, Image.Resampling.NEAREST)
    patches = Image.composite(picture, Image.new(picture.mode, picture.size), mask)  # nothing else, to be small
    patches.putalpha(mask)
    return png_bytes(patches)
