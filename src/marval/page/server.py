"""The server behind the page: its files, and what they ask for. docs/serve.md shows the same to programs."""

import asyncio
import contextlib
import json
import logging
import os
import socket
import threading
import webbrowser
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from typing import get_args

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from marval.config import Order
from marval.io.files import one_line
from marval.page.guard import Guard, is_local
from marval.page.studio import Event, Job, Studio, Wanted
from marval.text import SUGGESTED

MOST_PICTURES = 64  # of one request
CONNECTIONS = 128  # open at once; uvicorn answers 503 to more
log = logging.getLogger("uvicorn.error")


async def draw_lines(studio: Studio, thread: ThreadPoolExecutor, jobs: Sequence[Job]) -> AsyncIterator[str]:
    """Draw pictures, and yield a line of JSON as soon as there is something to show.

    A line is an event of `Studio.draw` with the picture's `index`, or an `error`. Requests take turns in the drawing
    thread, a picture each; who leaves is not drawn for any more. Events wait in a queue: a slow reader does not hold
    up the thread.
    """
    loop, left = asyncio.get_running_loop(), threading.Event()
    events: asyncio.Queue[Event | None] = asyncio.Queue()

    def show(event: Event) -> None:
        if left.is_set():
            raise asyncio.CancelledError
        loop.call_soon_threadsafe(events.put_nowait, event)

    try:
        for index, job in enumerate(jobs):
            drawing = loop.run_in_executor(thread, studio.draw, job, show)
            drawing.add_done_callback(lambda _: events.put_nowait(None))
            while (event := await events.get()) is not None:
                yield json.dumps({"index": index, **event}) + "\n"
            yield json.dumps({"index": index, **drawing.result()}) + "\n"
    except ValueError as error:
        yield json.dumps({"error": one_line(error)}) + "\n"
    except Exception:
        log.exception("the page could not draw a picture")
        yield json.dumps({"error": "something went wrong here; it has been logged"}) + "\n"
    finally:
        left.set()
        drawing.cancel()


def build(studio: Studio) -> Starlette:
    """Build the web application of a studio. One thread draws, so that times stay honest."""
    thread = ThreadPoolExecutor(1, "marval-draw")

    async def models(request: Request) -> Response:
        served = [served.to_json(name) for name, served in studio.models.items()]
        return JSONResponse({"models": served, "orders": get_args(Order), "suggested": SUGGESTED})

    async def draw(request: Request) -> Response:
        """Pictures one after the other, each of which `Wanted` describes."""
        if request.headers.get("content-type", "").split(";")[0] != "application/json":
            raise HTTPException(415, "send JSON: content-type application/json")
        wanted = await request.json()
        if not isinstance(wanted, dict) or not isinstance(wanted.get("pictures"), list):
            raise ValueError('expected {"pictures": [...]}, see docs/serve.md')
        if not 1 <= len(wanted["pictures"]) <= MOST_PICTURES:
            raise ValueError(f"{len(wanted['pictures'])} pictures: expected 1 to {MOST_PICTURES} in one request")
        jobs = [studio.job(Wanted.from_json(values)) for values in wanted["pictures"]]
        return StreamingResponse(draw_lines(studio, thread, jobs), media_type="application/x-ndjson")

    async def upload(request: Request) -> Response:
        """A file's content to a picture that can be edited."""
        model, content = request.query_params.get("model", next(iter(studio.models))), await request.body()
        return JSONResponse(await asyncio.get_running_loop().run_in_executor(thread, studio.upload, content, model))

    def refuse(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            return JSONResponse({"error": error.detail}, error.status_code, error.headers)
        return JSONResponse({"error": one_line(error)}, 400)

    return Starlette(
        routes=[
            Route("/models", models),
            Route("/draw", draw, methods=["POST"]),
            Route("/upload", upload, methods=["POST"]),
            Mount("/", StaticFiles(directory=str(files("marval.page") / "static"), html=True)),
        ],
        exception_handlers={ValueError: refuse, RecursionError: refuse, HTTPException: refuse},
    )


def listen(host: str, port: int) -> socket.socket:
    """Listen at an address, port 0 being any free one; visitors wait until `serve` begins.

    Raises:
        ValueError: an unknown host, or a port that is out of range, taken or reserved.
    """
    try:
        flags = socket.AI_PASSIVE
        family, _, _, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=flags)[0]
        return socket.create_server((address[0], port), family=family, backlog=128)
    except (OSError, UnicodeError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot serve on {host}:{port} ({reason}): choose another --port or --host") from None


def serve(
    names: Sequence[str], device: str, host: str, port: int, auth: str | None = None, browser: bool = False
) -> None:
    """Serve a page with these models until Ctrl-C; all is checked before the models are loaded.

    Raises:
        ValueError: the address cannot be had, `auth` is no "name:password", or a model is not there.
    """
    auth = os.environ.get("MARVAL_AUTH") if auth is None else auth
    if auth is not None and not all(part.strip() for part in auth.partition(":")):
        raise ValueError("--auth: expected a name and a password with a colon between them, such as anna:secret")
    with listen(host, port) as listening:
        app = Guard(build(Studio(names, device)), host, auth)
        shown = f"[{host}]" if ":" in host and "[" not in host else host
        shown = "localhost" if host in ("0.0.0.0", "::") else shown
        address = f"http://{shown}:{listening.getsockname()[1]}/"
        print(f"marval is on {address}  (Ctrl-C ends it)", flush=True)
        if not is_local(host) and auth is None:
            print("everybody who reaches this machine can draw: --auth name:password asks for a password", flush=True)
        if browser:
            webbrowser.open(address)
        settings = uvicorn.Config(
            app, log_level="warning", server_header=False, lifespan="off", ws="none", limit_concurrency=CONNECTIONS,
            timeout_graceful_shutdown=1,
        )  # fmt: skip
        with contextlib.suppress(KeyboardInterrupt):  # as was said
            uvicorn.Server(settings).run(sockets=[listening])
