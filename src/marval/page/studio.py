"""What the page does, without the page: pictures drawn one iteration at a time, edited, varied and uploaded."""

import contextlib
import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image, ImageOps
from torch import Tensor

from marval.config import Chain, Order
from marval.evaluate.timing import synchronize
from marval.io.checkpoint import model_hash
from marval.io.images import png_bytes, to_pil
from marval.page.uploads import DECODER, read_upload
from marval.pipeline import find_model, load
from marval.recipe import KEY, LONGEST, Recipe, draw_recipe, encode_picture, make_recipe, pack_upload
from marval.runtime.rng import generator

MOST_PICTURES = 8  # of one model, in one request
LAST_SEED = 999_999
STAYS: ContextVar[Callable[[], bool]] = ContextVar("stays", default=lambda: True)  # whether the visitor is still there
LOOK = 0.1  # seconds between two looks at that

Given = Any  # what a visitor sent: of any type, checked before it is used


@dataclass(frozen=True)
class Calls:
    """Calls of the networks so far: passes of the context network (two for a guided token), calls of the token
    head, and tokens that went through the head."""

    context: int = 0
    head: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Picture:
    """A finished picture: its tokens, which edits keep to the bit, and its pixels in [0, 1]."""

    tokens: Float[Tensor, "l d"]
    image: Float[Tensor, "c h w"]
    recipe: Recipe | None  # None for an upload as it came
    upload: str | None = None
    seconds: float = 0.0

    @functools.cached_property
    def png(self) -> bytes:
        """The picture as a PNG file with its recipe in the metadata."""
        return png_bytes(to_pil(self.image), None if self.recipe is None else {KEY: self.recipe.to_json()})

    @property
    def nbytes(self) -> int:
        """The memory that it takes."""
        return self.tokens.nbytes + self.image.nbytes + len(self.png) + len(self.upload or "")


@dataclass(frozen=True)
class Frame:
    """The moment after an AR iteration; the last one carries the finished picture."""

    recipe: Recipe
    iteration: int
    seconds: float  # of drawing, without what showing it took
    image: Float[Tensor, "c h w"]
    drawn: Bool[Tensor, " l"]
    grid: tuple[int, int]
    calls: Calls
    picture: Picture | None = None

    @functools.cached_property
    def png(self) -> bytes:
        """The partial picture as a PNG file, transparent where no token is drawn yet."""
        picture = to_pil(self.image)
        mask = Image.fromarray((self.drawn.reshape(self.grid).numpy() * 255).astype(np.uint8))
        picture.putalpha(mask.resize(picture.size, Image.Resampling.NEAREST))
        return png_bytes(picture)


class Served:
    """A model on the page, with counters in its networks."""

    def __init__(self, name: str, device: str):
        folder = find_model(name)
        self.name, self.pipeline, self.weights = name, load(name, device), model_hash(folder)
        self.calls = Calls()
        model = self.pipeline.model
        model.decoder_norm.register_forward_hook(self._count_context)
        model.head.final_layer.register_forward_hook(self._count_head)

    def _count_context(self, module: Any, inputs: Any, output: Tensor) -> None:
        self.calls = dataclasses.replace(self.calls, context=self.calls.context + len(output))

    def _count_head(self, module: Any, inputs: Any, output: Tensor) -> None:
        tokens = self.calls.tokens + output[..., 0].numel()
        self.calls = dataclasses.replace(self.calls, head=self.calls.head + 1, tokens=tokens)

    @property
    def chain(self) -> Chain | None:
        """The inner loop of a teacher; a student has none."""
        draw = self.pipeline.config.draw
        return draw if isinstance(draw, Chain) else None

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes that it draws."""
        return self.pipeline.config.class_names

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return self.pipeline.config.mar.token_grid

    @property
    def num_tokens(self) -> int:
        """Tokens of a picture."""
        return self.pipeline.config.mar.num_tokens


class _LeftError(Exception):
    """Nobody watches any more."""


@dataclass(frozen=True)
class Studio:
    """The models of a page. One thread draws: times stay honest, and visitors' pictures take turns."""

    models: dict[str, Served]
    worker: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "marval-draw"))

    @classmethod
    def open(cls, names: Sequence[str], device: str) -> "Studio":
        """Load models, and let each draw once: the first pass of a network is slow.

        Raises:
            ValueError: no models, or one that is not there or damaged.
        """
        if not names:
            raise ValueError("name at least one model")
        studio = cls({name: Served(name, device) for name in names})
        for name in names:
            list(studio.frames(studio.recipe(name, 0, 0, 1)))
        return studio

    def served(self, name: Given) -> Served:
        """A model by its name.

        Raises:
            ValueError: not on this page.
        """
        if not isinstance(name, str) or name not in self.models:
            raise ValueError(f"no model {str(name)[:60]!r} here: expected one of {', '.join(self.models)}")
        return self.models[name]

    def classes(self, names: Sequence[str]) -> list[str]:
        """The classes that all of these models know, in the first one's order.

        Raises:
            ValueError: no models, one that is not on this page, or models without a class in common.
        """
        if not listed("models", names):
            raise ValueError("choose at least one model")
        first, *others = [self.served(name) for name in names]
        common = [c for c in first.classes if all(c in other.classes for other in others)]
        if not common:
            raise ValueError(f"{', '.join(names)} have no class in common: choose others")
        return common

    def recipe(
        self,
        model: str,
        label: Given,
        seed: Given,
        iterations: Given = None,
        order: Given = None,
        guidance: Given = None,
    ) -> Recipe:
        """A checked recipe; None takes the model's own K, order and (for a teacher) guidance.

        Raises:
            ValueError: an unknown model, class or order, or a number out of range.
        """
        served = self.served(model)
        if not isinstance(label, (str, int)) or len(str(label)) > 200:
            raise ValueError(f"a class of {str(label)[:60]}: expected a name or a number")
        (number,) = served.pipeline.labels([label])
        count = served.pipeline.config.iterations if iterations is None else iterations
        whole_number("a seed", seed, 0, LAST_SEED)
        whole_number("K, the iterations,", count, 1, served.num_tokens)
        if order is not None and order not in get_args(Order):
            raise ValueError(f"order {str(order)[:60]!r}: expected one of {', '.join(get_args(Order))}")
        pipeline = served.pipeline
        if guidance is not None and not isinstance(guidance, (int, float)):
            raise ValueError(f"guidance {str(guidance)[:60]!r}: expected a number from 0, where 1 is no guidance")
        if guidance is not None and served.chain is not None:
            pipeline = pipeline.with_chain(guidance=float(guidance))
        return make_recipe(model, served.weights, pipeline, number, int(seed), int(count), order)

    def edit(self, picture: Picture, recipe: Recipe, redrawn: Given) -> Recipe:
        """The recipe that redraws some of a picture's tokens, in at most as many iterations as there are tokens.

        Raises:
            ValueError: no tokens, positions out of range, a picture of another kind of tokens, or one with too many
                edits for a recipe.
        """
        served = self.served(recipe.model)
        if not listed("tokens to redraw", redrawn):
            raise ValueError("paint over at least one token first")
        for position in redrawn:
            whole_number("a token to redraw", position, 0, served.num_tokens - 1)
        if picture.tokens.shape != (served.num_tokens, served.pipeline.config.mar.token_dim):
            raise ValueError(f"{recipe.model} draws pictures of another kind: choose the model that drew this one")
        if picture.recipe is not None and len(picture.recipe.history) >= LONGEST:
            raise ValueError(f"a recipe holds {LONGEST} edits: save this picture and upload it to go on from there")
        positions = tuple(sorted({int(position) for position in redrawn}))
        return dataclasses.replace(
            recipe, redrawn=positions, iterations=min(recipe.iterations, len(positions)), before=picture.recipe,
            upload=picture.upload if picture.recipe is None else None,
        )  # fmt: skip

    def vary(self, picture: Picture, recipe: Recipe, keep: Given) -> Recipe:
        """The recipe that keeps a random share of a picture's tokens (by the recipe's seed) and redraws the rest.

        Raises:
            ValueError: a share that is not between 0 and 1.
        """
        if not isinstance(keep, (int, float)) or not 0 <= keep <= 1:
            raise ValueError(f"a share of {keep} to keep: expected a number from 0 to 1")
        count = self.served(recipe.model).num_tokens
        rest = min(count, max(1, round((1 - keep) * count)))
        return self.edit(
            picture, recipe, torch.randperm(count, generator=generator(recipe.seed, "vary"))[:rest].tolist()
        )

    def frames(self, recipe: Recipe, before: Picture | None = None) -> Iterator[Frame]:
        """Draw a picture in the drawing thread and give the moment after each iteration as it comes.

        A drawing that nobody waits for any more ends after its iteration, or never begins.

        Raises:
            ValueError: as `marval.recipe.draw_recipe`, or the visitor has left.
        """
        served, left = self.served(recipe.model), threading.Event()
        events: SimpleQueue[Frame | Exception] = SimpleQueue()

        def draw() -> None:
            try:
                self._draw(served, recipe, before, events, left)
            except Exception as error:
                events.put(error)

        drawing = self.worker.submit(draw)
        try:
            while True:
                if not STAYS.get()():
                    raise ValueError("nobody waits for this picture any more")
                with contextlib.suppress(Empty):
                    event = events.get(timeout=LOOK)
                    if isinstance(event, Exception):
                        raise event
                    yield event
                    if event.picture is not None:
                        return
        finally:
            left.set()
            drawing.cancel()  # where it has not begun

    def _draw(
        self,
        served: Served,
        recipe: Recipe,
        before: Picture | None,
        events: "SimpleQueue[Frame | Exception]",
        left: threading.Event,
    ) -> None:
        last: list[Frame] = []
        space, paused = served.pipeline.space, 0.0
        served.calls = Calls()
        device = served.pipeline.device
        synchronize(device)
        began = time.perf_counter()

        def show(k: int, tokens: Tensor, drawn: Tensor) -> None:
            nonlocal paused
            synchronize(device)  # what the accelerator has still to do belongs to the drawing, not to showing it
            now = time.perf_counter()
            if left.is_set():
                raise _LeftError
            image = space.decode(tokens[recipe.row : recipe.row + 1])[0].cpu().clone()
            frame = Frame(
                recipe, k, now - began - paused, image, drawn[recipe.row].cpu().clone(), served.grid, served.calls
            )
            if k == recipe.iterations:  # the last one waits for the tokens
                last.append(frame)
            else:
                events.put(frame)
            paused += time.perf_counter() - now

        tokens = draw_recipe(recipe, served.pipeline, None if before is None else before.tokens, show)
        picture = Picture(tokens.cpu(), last[0].image, recipe, seconds=last[0].seconds)
        events.put(dataclasses.replace(last[0], picture=picture))

    def picture(self, recipe: Recipe, before: Picture | None = None) -> Picture:
        """Draw a picture, without watching."""
        *_, last = self.frames(recipe, before)
        assert last.picture is not None
        return last.picture

    def upload(self, content: bytes, model: str) -> Picture:
        """A picture from a visitor's file: cropped to the model's shape, scaled to its size, and encoded once.

        Raises:
            ValueError: as `read_upload`.
        """
        pipeline = self.served(model).pipeline
        rows, columns = pipeline.config.space.image_size
        mode = "L" if getattr(pipeline.config.space, "channels", 3) == 1 else "RGB"
        with DECODER:
            fitted = ImageOps.fit(read_upload(content, max(rows, columns)).convert(mode), (columns, rows))

        def encode() -> tuple[Tensor, Tensor]:
            tokens = encode_picture(pipeline, fitted)
            with torch.inference_mode():
                return tokens.cpu(), pipeline.space.decode(tokens[None])[0].cpu().clone()

        tokens, image = self.worker.submit(encode).result()
        return Picture(tokens, image, None, pack_upload(fitted))


def listed(what: str, values: Given) -> Sequence[Any]:
    """What was sent, if it is a list.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(values, (list, tuple)):
        raise ValueError(f"{what} of {str(values)[:60]}: expected a list")
    return values


def whole_number(what: str, value: Given, low: int, high: int) -> None:
    """Refuse what is not a whole number in a range.

    Raises:
        ValueError: it is not.
    """
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or value != value // 1
        or not low <= value <= high
    ):
        raise ValueError(f"{what} of {str(value)[:60]}: expected a whole number from {low} to {high}")
