"""What the page's buttons do: generators that draw and give, again and again, what there is to show."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from marval.page.studio import LAST_SEED, MOST_PICTURES, Frame, Given, Picture, Studio, listed, whole_number
from marval.page.views import Panel, colours, duration
from marval.recipe import Recipe

PAST_BYTES = 16 * 2**20  # of the pictures that can be taken back
PAUSE = 0.04  # seconds between two looks at a drawing: more would only fill the line


def watch(studio: Studio, recipe: Recipe, before: Picture | None = None) -> Iterator[tuple[Frame, bool]]:
    """The frames of a drawing, and for each whether it is time to show it."""
    shown = 0.0
    for frame in studio.frames(recipe, before):
        due = frame.picture is not None or time.monotonic() - shown > PAUSE
        shown = time.monotonic() if due else shown
        yield frame, due


def progress(frame: Frame, what: str) -> str:
    """What is going on, in a line."""
    return f"{what} · iteration {frame.iteration} of {frame.recipe.iterations} · {duration(frame.seconds)}"


def generate(
    studio: Studio,
    models: Sequence[str],
    classes: Sequence[str],
    seed: Given,
    count: Given,
    iterations: Given,
    guidance: Given = None,
    order: Given = None,
) -> Iterator[tuple[list[Panel], str]]:
    """Draw the same seeds with every model, one-step students first; the classes take turns.

    Raises:
        ValueError: nothing chosen, an unknown name, or a number out of range; before anything is drawn.
    """
    known = studio.classes(models)
    if not listed("classes", classes):
        raise ValueError("choose at least one class")
    for name in classes:
        if name not in known:
            raise ValueError(f"no class {str(name)[:60]!r} here: expected one of {', '.join(known[:10])}")
    whole_number("a number of pictures", count, 1, MOST_PICTURES)
    whole_number("a seed", seed, 0, LAST_SEED)
    jobs = {
        name: [
            studio.recipe(name, classes[i % len(classes)], seed + i, iterations, order, guidance)
            for i in range(int(count))
        ]
        for name in dict.fromkeys(models)
    }
    colour = colours(list(studio.models))
    panels = {name: Panel(studio.served(name), colour[name], len(jobs[name]), noted(jobs[name][0])) for name in jobs}
    shown = list(panels.values())
    for name in sorted(jobs, key=lambda name: studio.served(name).chain is not None):
        for i, recipe in enumerate(jobs[name]):
            for frame, due in watch(studio, recipe):
                panels[name].add(frame)
                if due:
                    yield shown, progress(frame, f"{name} · picture {i + 1} of {len(jobs[name])}")
    yield shown, summary(shown)


def noted(recipe: Recipe) -> str:
    """How a model draws, in a few words."""
    inner = "one call per iteration" if recipe.steps is None else f"{recipe.steps} steps · w = {recipe.guidance:g}"
    return f"K = {recipe.iterations} · {inner} · {recipe.order}"


def reference(panels: Sequence[Panel]) -> Panel | None:
    """The teacher that the others are compared with: the first model with an inner loop."""
    return next((panel for panel in panels if panel.served.chain is not None), None)


def summary(panels: Sequence[Panel]) -> str:
    """What was drawn, and how long it took."""
    told = [f"{panel.served.name} {duration(panel.seconds)}" for panel in panels if panel.seconds is not None]
    return f"Done. Time of a picture: {', '.join(told)}."


@dataclass(frozen=True)
class Desk:
    """What one visitor is editing: a picture, the ones before it, its variations, and what is painted over."""

    picture: Picture | None = None
    past: tuple[Picture, ...] = ()
    varied: tuple[Picture, ...] = ()
    painted: tuple[int, ...] = ()

    @property
    def nbytes(self) -> int:
        """The memory that its pictures take."""
        return sum(picture.nbytes for picture in (self.picture, *self.past, *self.varied) if picture is not None)

    def put(self, picture: Picture, painted: Sequence[int] = ()) -> "Desk":
        """The desk with another picture on it; up to 30 of 16 MB in all can be taken back."""
        past = () if self.picture is None else (*self.past, self.picture)[-30:]
        while sum(one.nbytes for one in past) > PAST_BYTES:
            past = past[1:]
        return Desk(picture, past, (), tuple(painted))

    def undo(self) -> "Desk":
        """The desk with the picture before.

        Raises:
            ValueError: there is none.
        """
        if not self.past:
            raise ValueError("nothing to take back")
        return Desk(self.past[-1], self.past[:-1], (), self.painted)


def edit(
    studio: Studio, desk: Desk, redrawn: Given, model: str, label: str, seed: Given, iterations: Given
) -> Iterator[tuple[Desk, Frame | None, str]]:
    """Redraw the painted tokens of the desk's picture; the others are kept to the bit, which is checked.

    Raises:
        ValueError: no picture, nothing painted, or a bad name or number.
    """
    if desk.picture is None:
        raise ValueError("draw or upload a picture first")
    recipe = studio.edit(desk.picture, studio.recipe(model, label, seed, iterations), redrawn)
    for frame, due in watch(studio, recipe, desk.picture):
        if frame.picture is None and due:
            yield desk, frame, progress(frame, f"{model} · {len(recipe.redrawn or ())} tokens")
        if frame.picture is not None:
            others = [i for i in range(len(desk.picture.tokens)) if i not in set(recipe.redrawn or ())]
            kept = torch.equal(frame.picture.tokens[others], desk.picture.tokens[others])
            told = f"Done in {duration(frame.seconds)}: {len(recipe.redrawn or ())} tokens redrawn, "
            told += f"the other {len(others)} bit-identical." if kept else "but others changed: this is a bug."
            yield desk.put(frame.picture, redrawn), None, told


def vary(
    studio: Studio, desk: Desk, keep: Given, count: Given, model: str, label: str, seed: Given, iterations: Given
) -> Iterator[tuple[list[Picture], Frame | None, str]]:
    """Variations of the desk's picture, one for each seed: a share of its tokens stays, the rest is drawn anew.

    Raises:
        ValueError: as `edit`.
    """
    picture = desk.picture
    if picture is None:
        raise ValueError("draw or upload a picture first")
    whole_number("a number of variations", count, 1, MOST_PICTURES)
    whole_number("a seed", seed, 0, LAST_SEED)
    recipes = [studio.vary(picture, studio.recipe(model, label, seed + i, iterations), keep) for i in range(int(count))]
    varied: list[Picture] = []
    for i, recipe in enumerate(recipes):
        for frame, due in watch(studio, recipe, picture):
            if frame.picture is not None:
                varied.append(frame.picture)
            if due:
                now = frame if frame.picture is None else None
                yield varied, now, progress(frame, f"{model} · variation {i + 1} of {len(recipes)}")
    kept = studio.served(model).num_tokens - len(recipes[0].redrawn or ())
    yield varied, None, f"Done: {len(varied)} variations, {kept} tokens of the picture kept in each."


@dataclass
class Comparison:
    """Pictures of one seed and class over K (columns) and models (rows)."""

    columns: list[int]
    rows: list[str]
    cells: dict[tuple[int, int], Picture | Frame] = field(default_factory=dict)


def compare(
    studio: Studio, models: Sequence[str], label: str, seed: Given, columns: Sequence[Given]
) -> Iterator[tuple[Comparison, str]]:
    """Draw one seed at every K with every model, students first.

    Raises:
        ValueError: nothing chosen, or a bad name or number; before anything is drawn.
    """
    studio.classes(models)
    if not listed("numbers K", columns):
        raise ValueError("choose at least one K")
    for k in columns:
        whole_number("K, the iterations,", k, 1, min(studio.served(name).num_tokens for name in models))
    found = Comparison(sorted({int(k) for k in columns}), list(dict.fromkeys(models)))
    jobs = {
        (i, j): studio.recipe(name, label, seed, k)
        for i, name in enumerate(found.rows)
        for j, k in enumerate(found.columns)
    }
    order = sorted(jobs, key=lambda at: (studio.served(found.rows[at[0]]).chain is not None, at))
    for at in order:
        for frame, due in watch(studio, jobs[at]):
            found.cells[at] = frame if frame.picture is None else frame.picture
            if due:
                yield found, progress(frame, f"{found.rows[at[0]]}, K = {found.columns[at[1]]}")
    yield found, f"Done: {len(jobs)} pictures of one seed."


def race(
    studio: Studio, models: Sequence[str], label: str, seed: Given, iterations: Given
) -> Iterator[tuple[Mapping[str, Frame], str]]:
    """Draw one picture with each model, students first, for the sake of the counters.

    Raises:
        ValueError: as `compare`.
    """
    studio.classes(models)
    recipes = [studio.recipe(name, label, seed, iterations) for name in dict.fromkeys(models)]
    latest: dict[str, Frame] = {}
    for recipe in sorted(recipes, key=lambda recipe: studio.served(recipe.model).chain is not None):
        for frame, due in watch(studio, recipe):
            latest[recipe.model] = frame
            if due:
                yield latest, progress(frame, recipe.model)
    told = [f"{name} {frame.calls.head:,} calls of the head" for name, frame in latest.items()]
    yield latest, f"Done: {', '.join(told)}."
