"""The endpoints for programs."""

import base64

import gradio as gr

from marval.page import actions, views
from marval.page.actions import Desk
from marval.page.guard import DRAW, friendly
from marval.page.studio import LAST_SEED, MOST_PICTURES, UPLOAD_BYTES, Given, Studio, listed, whole_number


def add_endpoints(studio: Studio) -> None:
    """The named endpoints for programs; docs/serve.md shows them."""

    def decode(png: Given) -> bytes:
        if not isinstance(png, str):
            raise ValueError("png must be a file's content in base64")
        if len(png) > UPLOAD_BYTES * 4 // 3 + 4:
            raise ValueError(f"this file is too large: at most {UPLOAD_BYTES / 2**20:.0f} MB")
        try:
            return base64.b64decode(png, validate=True)
        except ValueError as error:
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
        listed("classes", classes)
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
            friendly(function),
            api_name=function.__name__,
            api_description=" ".join((function.__doc__ or "").split()),
            **DRAW,
        )
