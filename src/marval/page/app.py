"""The page itself: gradio's components, wired to `actions`; and the server behind it."""

import atexit
import json
import os
import socket
import tempfile
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args

import gradio as gr
from gradio.exceptions import ServerFailedToStartError
from starlette.middleware import Middleware

from marval.config import Order
from marval.page import actions, bundled, views
from marval.page.actions import Desk
from marval.page.editing import Editing
from marval.page.endpoints import add_endpoints
from marval.page.guard import DRAW, Guard, Page, friendly
from marval.page.shares import WAITING
from marval.page.studio import LAST_SEED, MOST_PICTURES, Studio, listed
from marval.page.uploads import UPLOAD_BYTES

OWN_ORDER = "the model's own"
PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
PICK = """element.addEventListener('click', (event) => {
  const button = event.target.closest('[data-picture]');
  if (button) trigger('select', {picture: button.dataset.picture});
});"""
PAINTED = "(...given) => [[...document.querySelectorAll('#mv-painter [data-token][aria-pressed=true]')].map((cell) => Number(cell.dataset.token)), ...given.slice(1)]"  # noqa: E501
STOPPED = "Stopped."


def draws(button: gr.Button, function: Any, given: list[Any], shown: list[Any], line: gr.HTML, js: Any = None) -> Any:
    """Wire a button that draws; the line says at once that it was pressed, and whether nothing came of it.

    Returns the event, for `stops`.
    """

    def say(text: str, busy: bool = False) -> str:
        return json.dumps(views.status(text, busy))

    waiting, failed = say("Waiting for a turn…", busy=True), say("Nothing was drawn: the message says why.")
    button.click(None, None, line, js=f"() => {{ window.marvalStopped = false; return {waiting}; }}", **PRIVATE)
    event = button.click(friendly(function), given, shown, js=js, **PRIVATE, **DRAW)
    # What Stop cancels fails too, and that may come after Stop's own words.
    event.failure(None, None, line, js=f"() => window.marvalStopped ? {say(STOPPED)} : {failed}", **PRIVATE)
    return event


def stops(button: gr.Button, events: list[Any], line: gr.HTML) -> None:
    """Wire a button that ends the drawings of other buttons; what they have shown stays."""
    button.click(
        lambda: views.status(STOPPED), None, line, js="() => { window.marvalStopped = true; return []; }",
        cancels=events, queue=False, **PRIVATE,
    )  # fmt: skip


class Controls:
    """Choices that several tabs offer: made once, so that they look and mean the same everywhere."""

    def __init__(self, studio: Studio):
        self.studio, self.names = studio, list(studio.models)
        self.classes = studio.classes(self.names[:1])
        self.students = [name for name in self.names if studio.served(name).chain is None] or self.names

    def model(self, label: str = "Model") -> gr.Dropdown:
        return gr.Dropdown(self.names, value=self.students[0], label=label)

    def models(self) -> gr.CheckboxGroup:
        fitting = [n for n in self.names if self.studio.served(n).classes == self.studio.served(self.names[0]).classes]
        return gr.CheckboxGroup(self.names, value=fitting[:3], label="Models", min_width=260)

    def label(self) -> gr.Dropdown:
        return gr.Dropdown(
            self.classes, value="sneaker" if "sneaker" in self.classes else self.classes[0], label="Class"
        )

    def stop(self, tab: str = "") -> gr.Button:
        return gr.Button("Stop", elem_id=f"mv-stop{tab and '-' + tab}", scale=1, min_width=90)

    def seed(self, value: int = 0) -> gr.Slider:
        return gr.Slider(0, LAST_SEED, value=value, step=1, label="Seed")

    def iterations(self, value: int = 8) -> gr.Slider:
        most = min(served.num_tokens for served in self.studio.models.values())
        return gr.Slider(1, most, value=min(value, most), step=1, label="Iterations K")


def generate_tab(studio: Studio, make: Controls) -> tuple[gr.State, gr.HTML]:
    """Generate: models side by side on the same seeds. Returns the session's pictures and where they are shown."""
    some = [c for c in ("sneaker", "bag", "dress", "ankle boot") if c in make.classes] or make.classes[:4]
    chains = [served for served in studio.models.values() if served.chain is not None]
    with gr.Row():
        models = make.models()
        classes = gr.Dropdown(make.classes, value=some, multiselect=True, label="Classes, in turn", min_width=260)
    with gr.Row():
        seed, iterations = make.seed(), make.iterations()
        count = gr.Slider(1, MOST_PICTURES, value=min(4, MOST_PICTURES), step=1, label="Pictures of each model")
    with gr.Accordion("Guidance and order", open=False), gr.Row():
        first = chains[0].chain if chains else None
        guidance = gr.Slider(
            0, 10, value=first.guidance if first else 1.0, step=0.1, visible=bool(chains),
            label="Guidance w of a teacher (a student has it baked in)",
        )  # fmt: skip
        order = gr.Dropdown([OWN_ORDER, *get_args(Order)], value=OWN_ORDER, label="Unmasking order")
    with gr.Row():
        draw = gr.Button("Draw", variant="primary", elem_id="mv-draw", scale=4)
        stop = make.stop()
    line = gr.HTML(views.status("Ready. The students draw first; the teacher follows, token by token."))
    shown = gr.HTML(
        views.welcome("Press Draw: every model draws the same seeds."), js_on_load=PICK, elem_id="mv-generated"
    )
    drawn = gr.State([], time_to_live=3600)

    def run(*given: Any) -> Iterator[Any]:
        own = None if given[-1] == OWN_ORDER else given[-1]
        for panels, told_now in actions.generate(studio, *(*given[:-1], own)):
            html = views.panels(panels, actions.reference(panels))
            pictures = [panel.pictures for panel in panels]  # always those that are shown: Stop may come at any time
            yield html, views.status(told_now, busy=not told_now.startswith("Done")), pictures

    given = [models, classes, seed, count, iterations, guidance, order]
    stops(stop, [draws(draw, run, given, [shown, line, drawn], line)], line)

    def fit(names: list[str], chosen: list[str]) -> Any:
        known = studio.classes(names or make.names[:1])
        guided = any(studio.served(name).chain is not None for name in names)
        return gr.update(choices=known, value=[c for c in listed("classes", chosen) if c in known]), gr.update(
            interactive=guided
        )

    models.change(friendly(fit), [models, classes], [classes, guidance], queue=False, **PRIVATE)
    return drawn, shown


def edit_tab(studio: Studio, make: Controls, tabs: gr.Tabs, drawn: gr.State, generated: gr.HTML) -> None:
    """Edit: draw or upload a picture, paint over tokens and redraw them; or vary it."""
    desk = gr.State(Desk(), time_to_live=3600)
    line = gr.HTML(views.status("Draw or upload a picture, paint over a part of it, and redraw that part."))
    with gr.Row(equal_height=False):
        with gr.Column(scale=3, min_width=260):
            gr.HTML('<h2 class="mv-step">1 · A picture</h2>')
            model = make.model()
            label, seed, iterations = make.label(), make.seed(), make.iterations()
            start = gr.Button("Draw a new picture", elem_id="mv-start")
            upload = gr.UploadButton(
                "Upload a picture", file_types=[".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"], type="binary",
                elem_id="mv-upload",
            )  # fmt: skip
        with gr.Column(scale=5, min_width=300):
            gr.HTML('<h2 class="mv-step">2 · Paint over what is to change</h2>')
            script = (files("marval.page") / "painter.js").read_text()
            canvas = gr.HTML(views.painter(None, (1, 1)), js_on_load=script, elem_id="mv-painter")
            saved = gr.HTML("")
        with gr.Column(scale=3, min_width=260):
            gr.HTML('<h2 class="mv-step">3 · Redraw it</h2>')
            new_label, new_seed = make.label(), make.seed(1)
            redraw = gr.Button("Redraw the painted tokens", variant="primary", elem_id="mv-redraw")
            undo = gr.Button("Undo", elem_id="mv-undo")
            gr.HTML('<h2 class="mv-step">or vary it</h2>')
            keep = gr.Slider(0, 1, value=0.5, step=0.05, label="Share of tokens to keep")
            count = gr.Slider(1, MOST_PICTURES, value=6, step=1, label="Variations")
            vary = gr.Button("Vary", elem_id="mv-vary")
            stop = make.stop("edit")
    varied = gr.HTML("", js_on_load=PICK, elem_id="mv-varied")
    painted = gr.JSON([], visible=False)
    everything = [desk, canvas, saved, varied, line]

    on = Editing(studio)
    begun = draws(start, on.begin, [desk, model, label, seed, iterations], everything, line)
    upload.upload(friendly(on.take), [upload, desk, model], everything, **PRIVATE, **DRAW)
    changed = draws(
        redraw, on.change, [painted, desk, model, new_label, new_seed, iterations], everything, line, js=PAINTED
    )
    undo.click(friendly(on.undo), [desk, model], everything, queue=False, **PRIVATE)
    more = draws(vary, on.variations, [desk, keep, count, model, new_label, new_seed, iterations], everything, line)
    stops(stop, [begun, changed, more], line)
    varied.select(friendly(on.choose), [desk, model], everything, queue=False, **PRIVATE)
    targets = [*everything, tabs, model, label, new_label, iterations]
    generated.select(friendly(on.bring), [drawn, desk], targets, queue=False, **PRIVATE)

    def fit(name: str) -> Any:
        known = studio.classes([name])
        return [gr.update(choices=known), gr.update(choices=known)]

    model.change(friendly(fit), model, [label, new_label], queue=False, **PRIVATE)


def compare_tab(studio: Studio, make: Controls) -> None:
    """Compare: one seed over K and models, the figures before and after tuning, and quality against time."""
    most = min(served.num_tokens for served in studio.models.values())
    choices = [k for k in (1, 2, 4, 6, 8, 16, 32, 64, 128, 256) if k <= most]
    with gr.Row():
        models = make.models()
        columns = gr.CheckboxGroup(choices, value=[k for k in (1, 2, 4, 8, 16) if k <= most], label="Iterations K")
    with gr.Row():
        label, seed = make.label(), make.seed()
    with gr.Row():
        draw = gr.Button("Draw the grid", variant="primary", elem_id="mv-compare", scale=4)
        stop = make.stop("compare")
    line = gr.HTML(views.status("One seed, drawn with more and more iterations."))
    table = gr.HTML(views.welcome("Models downwards, iterations to the right."), elem_id="mv-compared")
    colour = views.colours(list(studio.models))

    def run(*given: Any) -> Iterator[Any]:
        for found, told_now in actions.compare(studio, *given):
            rows = [(name, colour[name]) for name in found.rows]
            cells = views.compare_table(found.columns, rows, found.cells)
            yield cells, views.status(told_now, busy=not told_now.startswith("Done"))

    stops(stop, [draws(draw, run, [models, label, seed, columns], [table, line], line)], line)
    gr.HTML('<h2 class="mv-step">Quality against time</h2>')
    gr.HTML(
        views.plot(
            bundled.quality_points(),
            "milliseconds a picture (batch 1, two CPU threads)",
            "FD-EfficientNet, less is better",
        )
    )
    gr.HTML('<h2 class="mv-step">Before and after tuning with a reward (MARVAL-RL)</h2>')
    caption = (
        "2,000 samples each; of three seeds, the mean, but for the reward. Reward: mean log-probability of the class "
        "by fashion-classifier, which was optimised; held-out reward: the same by fashion-judge, which was not. More "
        "is better, but for the distance."
    )
    gr.HTML(views.figures_table(*bundled.tuning_rows(), caption))


def why_tab(studio: Studio, make: Controls) -> None:
    """Why is it faster: the two nested loops of each model, with live counters of network calls."""
    gr.HTML(
        '<h2 class="mv-step">Why is it faster?</h2>'
        "<p>A teacher runs an <em>inner</em> loop of diffusion steps for the tokens of every iteration of the "
        "<em>outer</em> loop. A student's head is called once instead. The counters are hooks in the networks.</p>"
    )
    with gr.Row():
        models, label = make.models(), make.label()
        seed, iterations = make.seed(), make.iterations()
    with gr.Row():
        draw = gr.Button("Draw and count", variant="primary", elem_id="mv-race", scale=4)
        stop = make.stop("why")
    line = gr.HTML(views.status("Ready to count."))
    colour = views.colours(list(studio.models))

    def drawing(names: list[str], latest: Any, k: int) -> str:
        cells = "".join(views.loops(studio.served(name), colour[name], latest.get(name), k) for name in names)
        return f'<div class="mv-panels">{cells}</div>'

    shown = gr.HTML(drawing(models.value, {}, 8), elem_id="mv-loops")

    def run(names: list[str], *given: Any) -> Iterator[Any]:
        for latest, told_now in actions.race(studio, names, *given):
            html = drawing(list(dict.fromkeys(names)), latest, int(given[-1]))
            yield html, views.status(told_now, busy=not told_now.startswith("Done"))

    stops(stop, [draws(draw, run, [models, label, seed, iterations], [shown, line], line)], line)


def build(studio: Studio) -> Page:
    """The page of a studio."""
    make = Controls(studio)
    with Page(title="marval", analytics_enabled=False, delete_cache=(60, 300), fill_width=True) as page:
        gr.HTML(views.heading())
        with gr.Tabs() as tabs:
            with gr.Tab("Generate", id="generate"):
                drawn, generated = generate_tab(studio, make)
            with gr.Tab("Edit", id="edit"):
                edit_tab(studio, make, tabs, drawn, generated)
            with gr.Tab("Compare", id="compare"):
                compare_tab(studio, make)
            with gr.Tab("Why?", id="why"):
                why_tab(studio, make)
        add_endpoints(studio)
    return page.queue(max_size=WAITING, api_open=False)  # nobody draws past the queue


def check_address(host: str, port: int) -> None:
    """Check that a server can listen there, before models are loaded.

    Raises:
        ValueError: an unknown host, or a port that is out of range, taken or reserved.
    """
    if not 1 <= port <= 65535:
        raise ValueError(f"--port {port}: expected a number from 1 to 65535")
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, at = found[0]
        with socket.socket(family, kind, protocol) as tried:
            if os.name != "nt":  # Windows would share a taken port
                tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(at)
    except (OSError, UnicodeError) as error:
        told = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot serve on {host[:200]}:{port} ({told}): choose another --port or --host") from None


def check_auth(auth: str | None) -> tuple[str, str] | None:
    """The name and the password in "name:password".

    Raises:
        ValueError: there are not two.
    """
    if auth is None:
        return None
    name, _, password = auth.partition(":")
    if not name.strip() or not password:
        raise ValueError("--auth: expected a name and a password with a colon between them, such as anna:secret")
    return name.strip(), password


def serve(
    studio: Studio, host: str = "127.0.0.1", port: int = 7860, browser: bool = False, auth: str | None = None
) -> tuple[gr.Blocks, str]:
    """Start the page in the background; returns it (`close` ends it, `block_thread` waits) and its address.

    Raises:
        ValueError: the port is taken, or the host cannot be bound, or `auth` is no "name:password".
    """
    check_address(host, port)
    sans = ["system-ui", "sans-serif"]  # names alone: gradio would fetch its own fonts from another host
    theme = gr.themes.Base(
        primary_hue="teal", secondary_hue="teal", neutral_hue="stone", font=sans,
        font_mono=["ui-monospace", "monospace"], radius_size="md",
    ).set(
        button_primary_background_fill="#0f766e", button_primary_background_fill_hover="#115e59",
        button_primary_background_fill_dark="#0f766e", button_primary_background_fill_hover_dark="#0d9488",
        link_text_color="#0f766e", link_text_color_hover="#115e59",
    )  # fmt: skip
    uploads = tempfile.TemporaryDirectory(prefix="marval-uploads-", dir=os.environ.get("GRADIO_TEMP_DIR"))
    os.environ["GRADIO_TEMP_DIR"] = uploads.name  # this page's alone, and gone with it
    page = build(studio)
    page.uploads = uploads.name
    atexit.register(uploads.cleanup)
    guard = Middleware(Guard, host=host, uploads=Path(uploads.name))
    try:
        _, address, _ = page.launch(
            server_name=host, server_port=port, inbrowser=browser, prevent_thread_lock=True, quiet=True, share=False,
            show_error=False, ssr_mode=False, pwa=False, run_history=False, mcp_server=False, enable_monitoring=False,
            footer_links=["api"], max_file_size=UPLOAD_BYTES, state_session_capacity=1000, theme=theme,
            auth=check_auth(auth), css=(files("marval.page") / "page.css").read_text(),
            app_kwargs={"middleware": [guard]},
        )  # fmt: skip
    except (OSError, ServerFailedToStartError) as error:
        raise ValueError(f"cannot serve on {host}:{port} ({error}): choose another --port or --host") from None
    return page, address
