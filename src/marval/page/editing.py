"""The Edit tab's handlers: from a visitor's desk and choices to what the tab shows next."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from marval.page import actions, views
from marval.page.actions import Desk
from marval.page.studio import Picture, Studio


@dataclass(frozen=True)
class Editing:
    """Every handler gives: the desk, the painter, the link that saves, the variations, and the line."""

    studio: Studio

    def shown(self, now: Desk, told_now: str, name: str) -> tuple[Any, ...]:
        """What the tab shows of a desk: state, painter, link, no variations, line."""
        picture = now.picture
        save = "" if picture is None else views.saving(picture)
        return now, views.painter(picture, self.studio.served(name).grid, now.painted), save, "", views.status(told_now)

    def begin(self, now: Desk, name: str, *given: Any) -> Iterator[Any]:
        """Draw a new picture onto the desk."""
        recipe = self.studio.recipe(name, *given)
        grid = self.studio.served(name).grid
        for frame, due in actions.watch(self.studio, recipe):
            if frame.picture is not None:
                yield self.shown(now.put(frame.picture), f"Drawn in {views.duration(frame.seconds)}. Now paint.", name)
            elif due:
                canvas_now = views.painter(now.picture, grid, (), frame)
                yield gr.skip(), canvas_now, "", "", views.status(actions.progress(frame, name), True)

    def take(self, content: bytes | None, now: Desk, name: str) -> Any:
        """Put an uploaded file onto the desk."""
        if content is None:
            raise ValueError("choose a picture to upload")
        picture = self.studio.upload(content, name)
        return self.shown(now.put(picture), "Uploaded, cropped and encoded once. Now paint.", name)

    def change(self, cells: list[int], now: Desk, name: str, *given: Any) -> Iterator[Any]:
        """Redraw what is painted."""
        grid = self.studio.served(name).grid
        for after, frame, told_now in actions.edit(self.studio, now, cells, name, *given):
            if frame is None:
                yield self.shown(after, told_now, name)
            else:
                canvas_now = views.painter(now.picture, grid, cells, frame)
                yield gr.skip(), canvas_now, gr.skip(), gr.skip(), views.status(told_now, True)

    def variations(self, now: Desk, *given: Any) -> Iterator[Any]:
        """Draw variations below the desk."""
        for pictures, frame, told_now in actions.vary(self.studio, now, *given):
            cells = views.gallery([(p, f"seed {p.recipe.seed}" if p.recipe else "") for p in pictures], frame)
            kept = dataclasses.replace(now, varied=tuple(pictures))  # always those that are shown
            yield kept, gr.skip(), gr.skip(), cells, views.status(told_now, frame is not None)

    def undo(self, now: Desk, name: str) -> Any:
        """Put the picture before onto the desk."""
        return self.shown(now.undo(), "Taken back.", name)

    def choose(self, now: Desk, name: str, event: gr.EventData) -> Any:
        """Put a variation onto the desk."""
        return self.shown(now.put(clicked([now.varied], event)), "This variation is the picture now.", name)

    def bring(self, pictures: list[list[Picture]], now: Desk, event: gr.EventData) -> Any:
        """Put a picture from Generate onto the desk, and open the tab with that picture's model and class."""
        picture = clicked(pictures, event)
        assert picture.recipe is not None  # it was drawn
        name, own = picture.recipe.model, picture.recipe
        values = self.shown(now.put(picture), "From Generate. Now paint.", name)
        return *values, gr.Tabs(selected="edit"), name, own.class_name, own.class_name, own.iterations


def clicked(shown: Sequence[Sequence[Picture]], event: gr.EventData) -> Picture:
    """The picture whose button was pressed: its key says the row and the place in it.

    Raises:
        ValueError: no such picture; a visitor's pictures are forgotten after an hour.
    """
    try:
        row, place = (int(part) for part in event.picture.split(":"))
        if row < 0 or place < 0:
            raise IndexError
        return shown[row][place]
    except (AttributeError, TypeError, ValueError, IndexError):
        raise ValueError("this picture is no longer here: draw it again") from None
