"""The endpoints for programs; docs/serve.md shows them."""

import base64
from dataclasses import dataclass

import gradio as gr

from marval.page import actions, views
from marval.page.actions import Desk
from marval.page.guard import DRAW, friendly
from marval.page.studio import LAST_SEED, MOST_PICTURES, Given, Picture, Studio, listed, whole_number
from marval.page.uploads import UPLOAD_BYTES


@dataclass(frozen=True)
class Endpoints:
    """Their docstrings are what the API page says."""

    studio: Studio

    def models(self) -> list[dict]:
        """The models of this page: name, classes, image_size, token_grid, and their own K (iterations), order, guidance
        and steps."""
        return [
            {
                "name": served.name,
                "classes": list(served.classes),
                "image_size": list(served.pipeline.config.space.image_size),
                "token_grid": list(served.grid),
                "iterations": served.pipeline.config.iterations,
                "order": served.pipeline.config.order,
                "guidance": None if served.chain is None else served.chain.guidance,
                "steps": None if served.chain is None else served.chain.diffusion_steps,
            }
            for served in self.studio.models.values()
        ]

    def draw(
        self,
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
        if not 1 <= len(listed("classes", classes)) <= MOST_PICTURES:
            raise ValueError(f"{len(classes)} classes: expected 1 to {MOST_PICTURES}")
        whole_number("a seed", seed, 0, LAST_SEED)
        recipes = [
            self.studio.recipe(model, name, seed + i, iterations, order, guidance) for i, name in enumerate(classes)
        ]
        return [views.as_json(self.studio.picture(recipe)) for recipe in recipes]

    def edit(
        self, model: str, png: str, tokens: list[int], class_name: str, seed: int = 0, iterations: int | None = None
    ) -> dict:
        """Redraw some tokens (numbered row by row from 0) of a picture (a file's content in base64) in a class; the
        others stay as they are."""
        picture = self._upload(png, model)
        recipe = self.studio.edit(picture, self.studio.recipe(model, class_name, seed, iterations), tokens)
        return views.as_json(self.studio.picture(recipe, picture))

    def vary(
        self,
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
        desk = Desk(self._upload(png, model))
        *_, (varied, _, _) = actions.vary(self.studio, desk, keep, count, model, class_name, seed, iterations)
        return [views.as_json(picture) for picture in varied]

    def _upload(self, png: Given, model: str) -> Picture:
        if not isinstance(png, str):
            raise ValueError("png must be a file's content in base64")
        if len(png) > UPLOAD_BYTES * 4 // 3 + 4:
            raise ValueError(f"this file is too large: at most {UPLOAD_BYTES / 2**20:.0f} MB")
        try:
            content = base64.b64decode(png, validate=True)
        except ValueError as error:
            raise ValueError(f"png must be a file's content in base64 ({error})") from None
        return self.studio.upload(content, model)


def add_endpoints(studio: Studio) -> None:
    """Give the page that is being built its named endpoints."""
    on = Endpoints(studio)
    for function in (on.models, on.draw, on.edit, on.vary):
        described = " ".join((function.__doc__ or "").split())
        gr.api(friendly(function), api_name=function.__name__, api_description=described, **DRAW)
