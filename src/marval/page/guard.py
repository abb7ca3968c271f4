"""What stands before every request: no other host, no endless bodies or queues, and refusals in one friendly line."""

import asyncio
import contextlib
import functools
import inspect
import ipaddress
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.route_utils import FnIndexInferError
from gradio_client.utils import is_http_url_like, traverse

from marval.page.shares import UNFIT as UNFIT_REQUEST
from marval.page.shares import VISITORS, Functions, Memory, Places
from marval.page.studio import STAYS
from marval.page.uploads import remove_upload, room_for_uploads

DRAW: dict[str, Any] = {"concurrency_id": "draw", "concurrency_limit": VISITORS}
LARGEST_BODY = 8_000_000  # bytes; an upload may have 5 MB, and a third more in base64
UNFIT = "a value that was sent does not fit its control: set it again, or reload the page"
BROKEN = "something went wrong here; it has been logged"
UPLOAD = re.compile(r"(/gradio_api)?/upload/?")
CALL = re.compile(r"(/gradio_api)?/(call|run|api)/")  # these only read a request: the queue, or they, catch the rest
MISREAD = (FnIndexInferError, LookupError, TypeError, ValueError)
LOCAL = {"localhost", "127.0.0.1", "[::1]"}
ELSEWHERE = re.compile(r"/(proxy=|file=\s*https?:)", re.IGNORECASE)  # gradio's routes that fetch from other hosts
UNUSED = re.compile(  # and others, for which this page has no use
    r"(/gradio_api)?/(component_server|custom_component|deep_link|dev|monitoring|process_recording|stream|(undo-)?vibe)"
)
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; media-src 'self' data: blob:; "
    "worker-src 'self' blob:; frame-ancestors 'self'; base-uri 'self'; form-action 'self'"
)
HEADERS = [
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]
log = logging.getLogger("marval.page")


def refusal(told: str) -> gr.Error:
    """A message for the visitor, which leaves no trace in the server's log."""
    return gr.Error(told, title="Not possible", print_exception=False)


@contextlib.contextmanager
def _messages() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise refusal(str(error)) from None


def friendly(function: Callable[..., Any]) -> Callable[..., Any]:
    """A handler, function or generator, whose `ValueError`s are messages for the visitor."""

    @functools.wraps(function)
    def generator(*given: Any) -> Iterator[Any]:
        with _messages():
            yield from function(*given)

    @functools.wraps(function)
    def plain(*given: Any) -> Any:
        with _messages():
            return function(*given)

    return generator if inspect.isgeneratorfunction(function) else plain


class Page(gr.Blocks):
    """Gradio's blocks: they refuse in one line what none of their controls sends, log every other error with its trace,
    notice who leaves, and bound what they keep for a visitor."""

    def __init__(self, *given: Any, **options: Any):
        super().__init__(*given, **options)
        self.memory = Memory()
        self.uploads = ""  # the folder with visitors' files

    def queue(self, *given: Any, **options: Any) -> "Page":
        """As gradio's, with places that are shared out."""
        super().queue(*given, **options)
        self._queue.__class__ = Places
        self.default_config.fns = Functions(self.default_config.fns)
        return self

    async def process_api(self, *given: Any, **options: Any) -> dict[str, Any]:
        """As gradio's; called for every event and every step of a generator.

        Raises:
            gradio.Error: a refusal, or an error of the server, which is in its log.
        """
        event = self._queue.event_ids_to_events.get(options.get("event_id"))
        STAYS.set(lambda: event is None or event.alive)
        try:
            return await super().process_api(*given, **options)
        except asyncio.CancelledError:  # Stop
            if event is not None:
                event.alive = False
            raise
        except gr.Error:
            raise
        except Exception:
            log.exception("the page could not serve a request")
            raise gr.Error(BROKEN, title="Error", print_exception=False) from None
        finally:
            self.memory.tidy(self.state_holder, options.get("session_hash"))

    async def preprocess_data(self, block_fn: Any, inputs: list[Any], *rest: Any, **options: Any) -> list[Any]:
        """As gradio's; called for every event, whichever way it came.

        Raises:
            gradio.Error: too few values, a value that its control does not offer, or an address in a file's place.
        """
        sent: list[dict] = []
        traverse(inputs, sent.append, lambda value: isinstance(value, dict) and isinstance(value.get("path"), str))
        try:
            if any(is_http_url_like(file["path"]) for file in sent):  # gradio would fetch it
                raise refusal("an address is no file: upload the picture itself")
            return await super().preprocess_data(block_fn, inputs, *rest, **options)
        except gr.Error as error:
            raise refusal(error.message.split("\n")[0][:300]) from None
        except Exception as error:
            cause = error.__cause__ or error
            if isinstance(cause, (OSError, MemoryError)) and not isinstance(cause, FileNotFoundError):
                raise  # the server's own trouble, such as a full disk
            log.warning("refused: %.300s", f"{type(error).__name__}: {error}".split("\n")[0])
            raise refusal(UNFIT) from None
        finally:
            for file in sent if self.uploads else ():  # what was sent has been read
                remove_upload(Path(self.uploads), file["path"])


async def _answer(send: Any, status: int, told: str) -> None:
    body = b'{"detail": "%s"}' % told.encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *HEADERS]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def is_local(host: str) -> bool:
    """Whether a server that listens on `host` is reached from this machine only."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


class Guard:
    """ASGI middleware: forbids the browser and gradio every other host, refuses what other sites' pages send (status
    403), bodies that are too large (413) and more files than there is room for (507); errors of the server are logged
    with their trace and answered with one line (500).

    Args:
        host: where the server listens. On a local address, requests must name it or this machine (421): else any name
            on the web could be made to lead here, and its page would count as ours (DNS rebinding).
        uploads: the folder with visitors' files.
    """

    def __init__(self, app: Any, host: str, uploads: Path):
        self.app, self.uploads = app, uploads
        self.hosts = {*LOCAL, host} if is_local(host) else None

    def refused(self, scope: dict[str, Any], headers: dict[bytes, bytes]) -> tuple[int, str] | None:
        """Why a request is not served: status and message, before anything of its body is read."""
        host = headers.get(b"host", b"").decode("latin-1").lower()
        if self.hosts is not None and re.sub(r":\d*$", "", host) not in self.hosts:
            return 421, "this page answers to localhost only: see --host"
        if scope["method"] != "GET" and headers.get(b"sec-fetch-site") == b"cross-site":
            return 403, "another site's page may not draw here"
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > LARGEST_BODY:
            return 413, "too large: at most 5 MB"
        if ELSEWHERE.search(scope["path"]):
            return 404, "this page fetches nothing from other hosts"
        if UNUSED.match(scope["path"]):
            return 404, "this page has no such route"
        if scope["method"] == "POST" and UPLOAD.fullmatch(scope["path"]) and not room_for_uploads(self.uploads):
            return 507, "too many uploads at the moment: try again in a few minutes"
        return None

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if (answer := self.refused(scope, dict(scope["headers"]))) is not None:
            await _answer(send, *answer)
            return
        received, started = 0, False

        async def counted() -> dict[str, Any]:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            # Without a declared length, a body that goes on for ever is cut off as if the visitor had left.
            return {"type": "http.disconnect"} if received > LARGEST_BODY else message

        async def sealed(message: dict[str, Any]) -> None:
            nonlocal started
            started = True
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *HEADERS]}
            await send(message)

        try:
            await self.app(scope, counted, sealed)
        except Exception as error:
            if started:
                raise
            if CALL.match(scope["path"]) and isinstance(error, MISREAD):
                log.warning("refused: %s %.300s: %.300r", scope["method"], scope["path"], error)
                await _answer(send, 400, UNFIT_REQUEST)
            else:
                log.exception("the page could not serve %s %.300s", scope["method"], scope["path"])
                await _answer(send, 500, BROKEN)
