"""The server behind the page: its files, and what they ask for. docs/serve.md shows the same to programs."""

import asyncio
import contextlib
import json
import logging
import os
import socket
import threading
import webbrowser
from collections.abc import AsyncGenerator, Sequence
from importlib.resources import files
from typing import Any, get_args

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from marval.config import Order
from marval.io.files import one_line
from marval.page.bundled import quality_points, tuning_rows
from marval.page.guard import PATIENCE, Guard, is_local
from marval.page.studio import Event, Job, Studio, Wanted
from marval.page.turns import Turns, network_of

MOST_PICTURES = 64  # of one request
CONNECTIONS = 128  # open at once
BROKEN = "something went wrong here; it has been logged"
log = logging.getLogger("uvicorn.error")


class _LeftError(Exception):
    """Nobody waits for this picture any more."""


async def body_of(request: Request) -> bytes:
    """Read the whole body of a request.

    Raises:
        HTTPException: it does not arrive in time (408).
    """
    try:
        async with asyncio.timeout(PATIENCE):
            return await request.body()
    except TimeoutError:
        raise HTTPException(408, "this request did not arrive in time") from None


class Drawings(StreamingResponse):
    """The pictures of a request as JSON, a line as soon as there is something to show; it ends when the visitor leaves.

    A line is an event of `Studio.draw` with the picture's `index`, or an `error`.
    """

    def __init__(self, studio: Studio, turns: Turns, visitor: str, jobs: Sequence[Job]):
        super().__init__(self.lines(), media_type="application/x-ndjson")
        self.studio, self.turns, self.visitor, self.jobs = studio, turns, visitor, jobs

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer, in one of the visitor's places."""
        with self.turns.place(self.visitor):
            async with contextlib.aclosing(self.body_iterator):  # type: ignore[type-var]
                await super().__call__(scope, receive, send)

    async def lines(self) -> AsyncGenerator[str, None]:
        """Yield the answer's lines."""
        try:
            for index, job in enumerate(self.jobs):
                async with contextlib.aclosing(self.events(job)) as events:
                    async for event in events:
                        yield json.dumps({"index": index, **event}) + "\n"
        except ValueError as error:
            yield json.dumps({"error": one_line(error)}) + "\n"
        except Exception:
            log.exception("the page could not draw a picture")
            yield json.dumps({"error": BROKEN}) + "\n"

    async def events(self, job: Job) -> AsyncGenerator[Event, None]:
        """Yield one picture's events. They wait in a queue, so a slow reader does not hold up the drawing thread."""
        loop, left = asyncio.get_running_loop(), threading.Event()
        shown: asyncio.Queue[Event | None] = asyncio.Queue()

        def show(event: Event) -> None:
            if left.is_set():
                raise _LeftError
            loop.call_soon_threadsafe(shown.put_nowait, event)

        drawing = asyncio.create_task(self.turns.run(self.visitor, lambda: self.studio.draw(job, show)))
        drawing.add_done_callback(lambda _: shown.put_nowait(None))
        try:
            while (event := await shown.get()) is not None:
                yield event
            yield drawing.result()
        finally:
            left.set()
            drawing.cancel()


def build(studio: Studio) -> Starlette:
    """Build the web application of a studio."""
    turns, measured = Turns(), {"curves": quality_points(), "tuning": tuning_rows()}

    async def models(request: Request) -> Response:
        served = [served.to_json(name) for name, served in studio.models.items()]
        return JSONResponse({"models": served, "orders": get_args(Order), **measured})

    async def draw(request: Request) -> Response:
        """Pictures one after the other, each of which `Wanted` describes."""
        if request.headers.get("content-type", "").split(";")[0] != "application/json":
            raise HTTPException(415, "send JSON: content-type application/json")
        try:
            wanted = json.loads(await body_of(request))
        except RecursionError:
            raise ValueError("this JSON is nested too deeply") from None
        if not isinstance(wanted, dict) or not isinstance(wanted.get("pictures"), list):
            raise ValueError('expected {"pictures": [...]}, see docs/serve.md')
        if not 1 <= len(wanted["pictures"]) <= MOST_PICTURES:
            raise ValueError(f"{len(wanted['pictures'])} pictures: expected 1 to {MOST_PICTURES} in one request")
        jobs = [studio.job(Wanted.from_json(values)) for values in wanted["pictures"]]
        return Drawings(studio, turns, visitor(request), jobs)

    async def upload(request: Request) -> Response:
        """A file's content to a picture that can be edited."""
        model = request.query_params.get("model", next(iter(studio.models)))
        with turns.place(visitor(request)):
            content = await body_of(request)
            return JSONResponse(await turns.run(visitor(request), lambda: studio.upload(content, model)))

    def visitor(request: Request) -> str:
        return network_of(request.client.host if request.client else "")

    def refuse(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            return JSONResponse({"error": error.detail}, error.status_code, error.headers)
        return JSONResponse({"error": one_line(error)}, 400)

    def fail(request: Request, error: Exception) -> Response:  # Starlette raises it again, and uvicorn logs its trace
        return JSONResponse({"error": BROKEN}, 500)

    return Starlette(
        routes=[
            Route("/models", models),
            Route("/draw", draw, methods=["POST"]),
            Route("/upload", upload, methods=["POST"]),
            Mount("/", StaticFiles(directory=str(files("marval.page") / "static"), html=True)),
        ],
        exception_handlers={ValueError: refuse, HTTPException: refuse, Exception: fail},
    )


def listen(host: str, port: int) -> socket.socket:
    """Listen at an address; visitors wait until `serve` begins.

    Raises:
        ValueError: an unknown host, or a port that is out of range, taken or reserved.
    """
    if not 1 <= port <= 65535:
        raise ValueError(f"--port {port}: expected a number from 1 to 65535")
    try:
        flags = socket.AI_PASSIVE
        family, _, _, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=flags)[0]
        return socket.create_server(address[:2], family=family, backlog=128)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot serve on {host[:200]}:{port} ({reason}): choose another --port or --host") from None


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
        app = Guard(build(Studio.open(names, device)), host, auth)
        shown = f"[{host}]" if ":" in host and "[" not in host else host
        address = f"http://{'localhost' if host in ('0.0.0.0', '::') else shown}:{port}/"
        print(f"marval is on {address}  (Ctrl-C ends it)", flush=True)
        if not is_local(host) and auth is None:
            print("everybody who reaches this machine can draw: --auth name:password asks for a password", flush=True)
        if browser:
            webbrowser.open(address)
        config = uvicorn.Config(
            app,
            log_level="warning",
            server_header=False,
            lifespan="off",
            limit_concurrency=CONNECTIONS,
            timeout_graceful_shutdown=1,
        )
        uvicorn.Server(config).run(sockets=[listening])
