"""The page's pieces as HTML and SVG: panels of pictures, the painter, the table over K, the two loops, the plot."""

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from marval.page.studio import Calls, Frame, Picture, Served
from marval.recipe import plain_name

COLOURS = ("var(--mv-1)", "var(--mv-2)", "var(--mv-3)", "var(--mv-4)")


@dataclass
class Panel:
    """What a model has drawn so far in one request."""

    served: Served
    colour: str
    wanted: int
    note: str = ""  # what it is drawn with
    pictures: list[Picture] = field(default_factory=list)
    strip: list[Frame] = field(default_factory=list)  # of the picture that is being drawn, or was drawn last
    now: Frame | None = None

    def add(self, frame: Frame) -> None:
        """Take in a moment of a drawing."""
        if frame.iteration == 1:
            self.strip = []
        self.strip.append(frame)
        self.now = frame if frame.picture is None else None
        if frame.picture is not None:
            self.pictures.append(frame.picture)

    @property
    def seconds(self) -> float | None:
        """Mean time of a finished picture."""
        return sum(p.seconds for p in self.pictures) / len(self.pictures) if self.pictures else None


def data_url(content: bytes) -> str:
    """A PNG as an address that needs no request."""
    return "data:image/png;base64," + base64.b64encode(content).decode()


def duration(seconds: float) -> str:
    """Milliseconds below one second."""
    return f"{seconds * 1000:.0f} ms" if seconds < 0.9995 else f"{seconds:.2f} s"


def status(text: str, busy: bool = False) -> str:
    """The line that says what is going on."""
    return f'<p class="mv-status{" mv-busy" if busy else ""}" role="status" aria-live="polite">{escape(text)}</p>'


def file_name(picture: Picture) -> str:
    """What a saved picture is called."""
    recipe = picture.recipe
    if recipe is None:
        return "upload.png"
    words = [recipe.model.rsplit("/", 1)[-1], recipe.class_name, f"seed{recipe.seed}", f"K{recipe.iterations}"]
    return plain_name("-".join(words)) + ("-edited.png" if recipe.redrawn else ".png")


def figure(picture: Picture, key: str = "", caption: str = "") -> str:
    """A finished picture with its caption, a link that saves it and, with a key, a button that takes it to Edit."""
    url, recipe = data_url(picture.png), picture.recipe
    told = caption or ("upload" if recipe is None else f"{recipe.class_name} · seed {recipe.seed}")
    edit = f'<button type="button" data-picture="{escape(key)}" aria-label="Edit {escape(told)}">Edit</button>'
    return (
        f'<figure class="mv-picture"><img src="{url}" alt="{escape(told)}"><figcaption><span>{escape(told)}</span>'
        f'<span class="mv-actions">{edit if key else ""}<a href="{url}" download="{escape(file_name(picture))}" '
        f'aria-label="Save {escape(told)} as PNG">Save</a></span></figcaption></figure>'
    )


def growing(frame: Frame) -> str:
    """A picture that is being drawn."""
    url = data_url(frame.png)
    told = f"iteration {frame.iteration} of {frame.recipe.iterations}"
    return (
        f'<figure class="mv-picture mv-growing"><img src="{url}" alt="{escape(frame.recipe.class_name)}, {told}">'
        f"<figcaption><span>{told}</span><span>{duration(frame.seconds)}</span></figcaption></figure>"
    )


def waiting() -> str:
    """The place of a picture that is still to be drawn."""
    return '<figure class="mv-picture mv-waiting"><div></div><figcaption>&nbsp;</figcaption></figure>'


def strip(frames: Sequence[Frame]) -> str:
    """The partial picture after each iteration, with the time at which it was there."""
    cells = "".join(
        f'<figure><img src="{data_url(f.png)}" alt="after iteration {f.iteration}">'
        f"<figcaption>{f.iteration}<br>{duration(f.seconds)}</figcaption></figure>"
        for f in frames
    )
    return f'<div class="mv-strip" tabindex="0" role="group" aria-label="After each iteration">{cells}</div>'


def panel(of: Panel, row: int, teacher: Panel | None) -> str:
    """A model with its pictures, its time and how much faster than the teacher it is."""
    seconds, reference = of.seconds, teacher.seconds if teacher is not None else None
    time_told = f"<strong>{duration(seconds)}</strong> a picture" if seconds is not None else "<strong>–</strong>"
    if seconds is None and of.now is not None:
        time_told = f"<strong>{duration(of.now.seconds)}</strong> so far"
    faster = ""
    if seconds and reference and teacher is not of:
        faster = f'<span class="mv-speed">{reference / seconds:.0f}× faster</span>'
    cells = [figure(picture, f"{row}:{i}") for i, picture in enumerate(of.pictures)]
    if of.now is not None:
        cells.append(growing(of.now))
    cells += [waiting()] * (of.wanted - len(cells))
    done = len(of.pictures) + (of.now.iteration / of.now.recipe.iterations if of.now else 0)
    name = escape(of.served.name)
    return (
        f'<article class="mv-panel" style="--mv: {of.colour}" aria-label="{name}"><header><h3>{name}</h3>'
        f'<p>{escape(of.note)}</p></header><p class="mv-figures"><span>{time_told}</span>{faster}</p>'
        f'<progress max="{of.wanted}" value="{done:.3f}" aria-label="{name}: pictures drawn"></progress>'
        f'<div class="mv-pictures">{"".join(cells)}</div>{strip(of.strip) if of.strip else ""}'
        "</article>"
    )


def panels(of: Sequence[Panel], teacher: Panel | None) -> str:
    """Models side by side."""
    return f'<div class="mv-panels">{"".join(panel(p, i, teacher) for i, p in enumerate(of))}</div>'


def heading() -> str:
    """The page's name and what it is about."""
    shades = [0.95, 0.5, 0, 0.75, 0.3, 0.9, 0, 0.6, 0.85, 0.4, 1, 0, 0.55, 0.8, 0.2, 1]  # a picture half unmasked
    tokens = "".join(
        f'<rect x="{i % 4 * 12}" y="{i // 4 * 12}" width="11" height="11" rx="2" fill="var(--mv-2)" '
        f'opacity="{max(shade, 0.08)}"/>'
        for i, shade in enumerate(shades)
    )
    return (
        f'<div class="mv-head"><svg viewBox="0 0 47 47" aria-hidden="true">{tokens}</svg><div><h1>marval</h1>'
        "<p>Masked generation in one step: pictures drawn token by token, with one network call where the teacher "
        "needs a hundred.</p></div></div>"
    )


def saving(picture: Picture) -> str:
    """The link that saves the picture on the desk, and whether `marval sample --like` can draw it again."""
    url = data_url(picture.png)
    told = " with its recipe" if picture.recipe else " (an upload has no recipe until a part of it is redrawn)"
    return (
        f'<p class="mv-saving"><a href="{url}" download="{escape(file_name(picture))}">Save this picture as PNG</a>'
        f"{told}</p>"
    )


def welcome(text: str) -> str:
    """What stands where nothing has been drawn yet."""
    return f'<div class="mv-empty"><p>{escape(text)}</p></div>'


def painter(
    picture: Picture | None,
    grid: tuple[int, int],
    painted: Sequence[int] = (),
    frame: Frame | None = None,
) -> str:
    """The picture with a button over every token, pressed where it is painted over."""
    rows, columns = grid
    shown = frame or picture
    if shown is None:
        return welcome("Draw or upload a picture first.")
    url, image = data_url(shown.png), shown.image
    chosen = set(painted)
    cells = "".join(
        f'<button type="button" data-token="{i}" aria-pressed="{"true" if i in chosen else "false"}" '
        f'tabindex="{0 if i == 0 else -1}" aria-label="row {i // columns + 1}, column {i % columns + 1}"></button>'
        for i in range(rows * columns)
    )
    tools = "".join(
        f'<button type="button" data-tool="{tool}">{tool.capitalize()}</button>' for tool in ("all", "none", "invert")
    )
    return (
        f'<div class="mv-painter{" mv-fresh" if chosen else ""}" style="--columns: {columns}; '
        f'aspect-ratio: {image.shape[2]} / {image.shape[1]}">'
        f'<img src="{url}" alt="the picture to edit"><div class="mv-cells" role="group" '
        f'aria-label="Tokens: paint with the pointer, or move with the arrow keys and press Space">{cells}</div></div>'
        f'<div class="mv-tools"><span role="group" aria-label="Paint">{tools}</span>'
        f"<output>{len(chosen)} of {rows * columns} tokens painted</output></div>"
    )


def gallery(pictures: Sequence[tuple[Picture, str]], now: Frame | None = None) -> str:
    """Pictures with captions, side by side, and the one that is being drawn."""
    cells = [figure(picture, f"0:{i}", caption) for i, (picture, caption) in enumerate(pictures)]
    cells += [growing(now)] if now is not None else []
    return f'<div class="mv-pictures mv-gallery">{"".join(cells)}</div>'


def compare_table(
    columns: Sequence[int], rows: Sequence[tuple[str, str]], cells: Mapping[tuple[int, int], Picture | Frame]
) -> str:
    """Pictures of one seed: K to the right, models downwards; each with its time, which are drawn and which are not."""

    def cell(i: int, j: int) -> str:
        found = cells.get((i, j))
        if isinstance(found, Picture):
            return figure(found, caption=duration(found.seconds))
        if isinstance(found, Frame):
            return growing(found)
        return waiting()

    head = "".join(f'<th scope="col">K = {k}</th>' for k in columns)
    body = "".join(
        f'<tr style="--mv: {colour}"><th scope="row">{escape(name)}</th>'
        + "".join(f"<td>{cell(i, j)}</td>" for j in range(len(columns)))
        + "</tr>"
        for i, (name, colour) in enumerate(rows)
    )
    return (
        '<div class="mv-scroll" tabindex="0" role="group" aria-label="Pictures over K"><table class="mv-grid">'
        f"<thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def figures_table(header: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    """A table of figures."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<p class="mv-caption">{escape(caption)}</p><div class="mv-scroll" tabindex="0" role="group" '
        f'aria-label="Figures"><table class="mv-table">'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def loops(served: Served, colour: str, frame: Frame | None, iterations: int) -> str:
    """The two nested loops of a model with the calls of its networks so far, and the picture beside them."""
    calls, k = (Calls(), 0) if frame is None else (frame.calls, frame.iteration)
    chain = served.chain
    inner = f"inner loop: {chain.diffusion_steps} steps" if chain else "no inner loop: one call"
    around = '<path class="mv-arrow mv-live" d="M 377 146 h 14 l -7 13 z M 183 159 h 14 l -7 -13 z"/>' if chain else ""
    done = k / iterations

    def block(x: int, title: str, count: int) -> str:
        return (
            f'<rect class="mv-block" x="{x}" y="128" width="140" height="74" rx="8"/>'
            f'<text x="{x + 70}" y="151" text-anchor="middle">{title}</text>'
            f'<text class="mv-count" x="{x + 70}" y="185" text-anchor="middle">{count:,}</text>'
        )

    picture = "" if frame is None else growing(frame) if frame.picture is None else figure(frame.picture)
    name = escape(served.name)
    told = f"{name}: {calls.context} passes of the context network, {calls.head} calls of the token head"
    return (
        f'<article class="mv-panel mv-why" style="--mv: {colour}" aria-label="{name}"><header><h3>{name}</h3>'
        f"<p>{duration(frame.seconds) if frame else '–'}</p></header>"
        f'<svg viewBox="-4 16 408 216" role="img" aria-label="{told}">'
        '<rect class="mv-outer" x="4" y="22" width="392" height="206" rx="14"/>'
        f'<rect class="mv-done" x="16" y="56" width="{368 * done:.1f}" height="6" rx="3"/>'
        f'<text x="16" y="46">outer loop: iteration {k} of {iterations}</text>'
        '<path class="mv-arrow" d="M 389 120 h 14 l -7 13 z M -3 133 h 14 l -7 -13 z"/>'
        f'<rect class="mv-inner{"" if chain else " mv-single"}" x="190" y="78" width="194" height="138" rx="12"/>'
        f'<text class="mv-small" x="202" y="98">{inner}</text>{around}'
        f"{block(22, 'context network', calls.context)}{block(206, 'token head', calls.head)}</svg>"
        f'<p class="mv-figures"><span><strong>{calls.tokens:,}</strong> tokens through the head</span></p>'
        f'<div class="mv-pictures">{picture or waiting()}</div></article>'
    )


def plot(points: Mapping[str, Sequence[tuple[float, float, int]]], x_label: str, y_label: str) -> str:
    """Quality against time: (milliseconds, distance, K) of each model, time on a logarithmic axis, as SVG."""
    xs = [math.log10(x) for line in points.values() for x, _, _ in line]
    ys = [y for line in points.values() for _, y, _ in line]
    low_x, high_x = math.floor(min(xs) * 2) / 2, math.ceil(max(xs) * 2) / 2
    low_y, high_y = math.floor(min(ys) / 50) * 50, math.ceil(max(ys) / 50) * 50

    def place(x: float, y: float) -> tuple[float, float]:
        across = (math.log10(x) - low_x) / (high_x - low_x)
        return 60 + 560 * across, 24 + 256 * (high_y - y) / (high_y - low_y)

    parts = []
    for level in range(low_y, high_y + 1, 50):
        _, py = place(10**low_x, float(level))
        parts.append(
            f'<path class="mv-line" d="M 60 {py:.1f} h 560"/>'
            f'<text x="52" y="{py + 4:.1f}" class="mv-end">{level}</text>'
        )
    for tick in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000):
        if low_x <= math.log10(tick) <= high_x:
            px, _ = place(float(tick), float(low_y))
            parts.append(
                f'<path class="mv-line" d="M {px:.1f} 24 v 256"/>'
                f'<text x="{px:.1f}" y="299" class="mv-mid">{tick}</text>'
            )
    for i, ((name, line), colour) in enumerate(zip(points.items(), COLOURS, strict=False)):
        beside = 22 if i == 1 else -11  # lines that run close keep their labels on either side
        places = [place(x, y) for x, y, _ in line]
        path = " L ".join(f"{px:.1f} {py:.1f}" for px, py in places)
        parts.append(f'<g style="--mv: {colour}"><path class="mv-curve" d="M {path}"/>')
        for (px, py), (x, y, k) in zip(places, line, strict=True):
            told = f"{escape(name)}, K = {k}: {x:.0f} ms, {y:.1f}"
            parts.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="5"><title>{told}</title></circle>')
            parts.append(f'<text class="mv-small mv-mid" x="{px:.1f}" y="{py + beside:.1f}">{k}</text>')
        parts.append("</g>")
    legend = "".join(
        f'<li style="--mv: {colour}">{escape(name)}</li>' for name, colour in zip(points, COLOURS, strict=False)
    )
    return (
        f'<figure class="mv-plot"><ul>{legend}</ul><svg viewBox="0 0 640 330" role="img" '
        f'aria-label="{escape(y_label)} against {escape(x_label)}">{"".join(parts)}'
        f'<text x="340" y="322" class="mv-mid">{escape(x_label)}</text>'
        f'<text transform="translate(14 152) rotate(-90)" class="mv-mid">{escape(y_label)}</text></svg>'
        f"<figcaption>Numbers beside the points are K. Further down and to the left is better.</figcaption></figure>"
    )


def colours(names: Sequence[str]) -> dict[str, str]:
    """A colour for each model of the page."""
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}


def as_json(picture: Picture) -> dict[str, Any]:
    """A picture as the API gives it: a PNG in base64, its recipe, and the seconds that it took."""
    recipe = None if picture.recipe is None else json.loads(picture.recipe.to_json())
    return {"png": base64.b64encode(picture.png).decode(), "recipe": recipe, "seconds": round(picture.seconds, 4)}
