"""What stands before every request: no other host, no endless bodies or queues, and refusals in one friendly line."""

import contextlib
import functools
import inspect
import logging
import re
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr
from gradio_client.utils import is_http_url_like, traverse

VISITORS = 16  # drawings that are under way at once; their pictures take turns
WAITING = 64  # requests that wait; more are turned away with a message
DRAW: dict[str, Any] = {"concurrency_id": "draw", "concurrency_limit": VISITORS}
LARGEST_BODY = 8_000_000  # bytes; an upload may have 5 MB, and a third more in base64
UNFIT = "a value that was sent does not fit its control: set it again, or reload the page"
ELSEWHERE = re.compile(r"/(proxy=|file=\s*https?:)", re.IGNORECASE)  # gradio's routes that fetch from other hosts
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
    except gr.Error:
        raise
    except Exception:
        log.exception("a handler of the page failed")
        raise refusal("something went wrong on the server: its log says what") from None


def friendly(function: Callable[..., Any]) -> Callable[..., Any]:
    """A handler, function or generator, whose `ValueError`s are messages for the visitor; other errors are logged."""

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
    """Gradio's blocks, which refuse in one line what none of their controls sends."""

    async def preprocess_data(self, block_fn: Any, inputs: list[Any], *rest: Any, **options: Any) -> list[Any]:
        """As gradio's; called for every event, whichever way it came.

        Raises:
            gradio.Error: too few values, a value that its control does not offer, or an address in a file's place.
        """
        elsewhere: list[dict] = []

        def named(value: Any) -> bool:
            return isinstance(value, dict) and isinstance(value.get("path"), str) and is_http_url_like(value["path"])

        try:
            traverse(inputs, elsewhere.append, named)
            if elsewhere:  # gradio would fetch it
                raise refusal("an address is no file: upload the picture itself")
            return await super().preprocess_data(block_fn, inputs, *rest, **options)
        except gr.Error as error:
            raise refusal(error.message.split("\n")[0][:300]) from None
        except Exception as error:
            log.warning("refused: %.300s", f"{type(error).__name__}: {error}".split("\n")[0])
            raise refusal(UNFIT) from None


async def _answer(send: Any, status: int, told: str) -> None:
    body = b'{"detail": "%s"}' % told.encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *HEADERS]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class Guard:
    """ASGI middleware: forbids the browser and gradio every other host, refuses bodies that are too large (status 413)
    and answers what gradio's routes fail on with one line (status 400)."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length) > LARGEST_BODY:
            await _answer(send, 413, "too large: at most 5 MB")
            return
        if ELSEWHERE.search(scope["path"]):
            await _answer(send, 404, "this page fetches nothing from other hosts")
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
            log.warning("refused: %s %.300s: %.300r", scope["method"], scope["path"], error)
            await _answer(send, 400, "this request does not fit the page: reload the page and try again")
