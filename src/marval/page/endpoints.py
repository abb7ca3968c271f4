"""The endpoints for programs, and how visitors are told what is not possible."""

import base64
import binascii
import functools
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr

from marval.page import actions, views
from marval.page.actions import Desk
from marval.page.studio import LAST_SEED, MOST_PICTURES, UPLOAD_BYTES, Studio, whole_number

VISITORS = 16  # drawings that are under way at once; their pictures take turns
DRAW: dict[str, Any] = {"concurrency_id": "draw", "concurrency_limit": VISITORS}


def told(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its `ValueError`s as messages for the visitor."""

    @functools.wraps(function)
    def plain(*given: Any) -> Any:
        try:
            return function(*given)
        except ValueError as error:
            raise gr.Error(str(error), title="Not possible", print_exception=False) from None

    return plain


def streamed(function: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """As `told`, for a generator."""

    @functools.wraps(function)
    def generator(*given: Any) -> Iterator[Any]:
        try:
            yield from function(*given)
        except ValueError as error:
            raise gr.Error(str(error), title="Not possible", print_exception=False) from None

    return generator


def add_endpoints(studio: Studio) -> None:
    """The named endpoints for programs; docs/serve.md shows them."""

    def decode(png: str) -> bytes:
        if len(png) > UPLOAD_BYTES * 4 // 3 + 4:
            raise ValueError(f"this file is too large: at most {UPLOAD_BYTES / 1e6:.0f} MB")
        try:
            return base64.b64decode(png, validate=True)
        except binascii.Error as error:
            raise ValueError(f"png must be a file's content in base64 ({error})") from None

    def models() -> list[dict]:
        """The models of this page: name, classes, image_size, token_grid, and their own K (iterations), order, guidance
        and steps."""
        return actions.model_list(studio)

    def draw(
        model: str,
        classes: list[str],
        seed: int = 0,
        iterations: int | None = None,
        order: str | None = None,
        guidance: float | None = None,
    ) -> list[dict]:
        """Draw a picture of each class, with seeds that count on from `seed`; what is null is the model's own.

        Each picture has `png` (base64, the recipe in its metadata), `recipe` and `seconds`.
        """
        if not 1 <= len(classes) <= MOST_PICTURES:
            raise ValueError(f"{len(classes)} classes: expected 1 to {MOST_PICTURES}")
        whole_number("a seed", seed, 0, LAST_SEED)
        recipes = [studio.recipe(model, name, seed + i, iterations, order, guidance) for i, name in enumerate(classes)]
        return [views.plain(studio.picture(recipe)) for recipe in recipes]

    def edit(
        model: str, png: str, tokens: list[int], class_name: str, seed: int = 0, iterations: int | None = None
    ) -> dict:
        """Redraw some tokens (numbered row by row from 0) of a picture (a file's content in base64) in a class; the
        others stay as they are."""
        picture = studio.upload(decode(png), model)
        recipe = studio.edit(picture, studio.recipe(model, class_name, seed, iterations), tokens)
        return views.plain(studio.picture(recipe, picture))

    def vary(
        model: str,
        png: str,
        class_name: str,
        keep: float = 0.5,
        count: int = 4,
        seed: int = 0,
        iterations: int | None = None,
    ) -> list[dict]:
        """Variations of a picture (a file's content in base64), with seeds that count on from `seed`: a share `keep` of
        its tokens stays, the rest is drawn anew."""
        desk = Desk(studio.upload(decode(png), model))
        *_, (varied, _, _) = actions.vary(studio, desk, keep, count, model, class_name, seed, iterations)
        return [views.plain(picture) for picture in varied]

    for function in (models, draw, edit, vary):
        gr.api(
            told(function),
            api_name=function.__name__,
            api_description=" ".join((function.__doc__ or "").split()),
            **DRAW,
        )
