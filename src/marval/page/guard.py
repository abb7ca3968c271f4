"""Checks before every request: who may ask, from where, and how much. The browser may load nothing from other hosts."""

import asyncio
import base64
import contextlib
import ipaddress
import re
import secrets
from collections import Counter
from typing import Any

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse

LARGEST_BODY = 8 * 2**20  # bytes
OF_ADDRESS = 8  # drawings and uploads of one address, under way or waiting
LOCAL = {"localhost", "127.0.0.1", "[::1]"}
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def is_local(host: str) -> bool:
    """Tell whether a server that listens on `host` is reached from this machine only."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


class Guard:
    """ASGI middleware that refuses requests for another host (421), without the password (401), from other sites' pages
    (403), with too much in them (413), and too many at once (429).

    Args:
        host: where the server listens. On a local address requests must name it or this machine: else any name on the
            web could be made to lead here, and its page would count as ours (DNS rebinding).
        auth: the "name:password" to ask for, if any.
    """

    def __init__(self, app: Any, host: str, auth: str | None = None):
        self.app, self.hosts = app, {*LOCAL, host} if is_local(host) else None
        self.auth = None if auth is None else b"Basic " + base64.b64encode(auth.encode())
        self.posts: Counter[str] = Counter()  # under way, of each address

    def check(self, method: str, headers: Headers, address: str) -> None:
        """Raise HTTPException for a request that is refused, before its body is read."""
        host = re.sub(r":\d*$", "", headers.get("host", "").lower())
        if self.hosts is not None and host not in self.hosts:
            raise HTTPException(421, "this page answers to localhost only: see --host")
        given = headers.get("authorization", "").encode()
        if self.auth is not None and not secrets.compare_digest(given, self.auth):
            raise HTTPException(401, "this page asks for a name and a password", {"www-authenticate": "Basic"})
        if method != "GET" and headers.get("sec-fetch-site") == "cross-site":
            raise HTTPException(403, "another site's page may not draw here")
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > LARGEST_BODY:
            raise HTTPException(413, f"too large: at most {LARGEST_BODY // 2**20} MB")
        if method != "GET" and self.posts[address] >= OF_ADDRESS:
            raise HTTPException(429, f"you have {OF_ADDRESS} drawings under way or waiting: wait until one is done")

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on, or refuse it."""
        method, address, received = scope["method"], (scope["client"] or [""])[0], 0

        async def counted() -> Any:  # a body may come without its length
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > LARGEST_BODY:
                raise HTTPException(413, f"too large: at most {LARGEST_BODY // 2**20} MB")
            return message

        async def sealed(message: Any) -> None:
            if message["type"] == "http.response.start":
                added = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *added]}
            await send(message)

        try:
            self.check(method, Headers(scope=scope), address)
        except HTTPException as refusal:
            answer = JSONResponse({"error": refusal.detail}, refusal.status_code, refusal.headers)
            return await answer(scope, receive, sealed)
        self.posts[address] += method != "GET"
        try:
            with contextlib.suppress(ClientDisconnect):
                await self.app(scope, counted, sealed)
        except asyncio.CancelledError:  # the server ends: so does the answer, without a trace in the log
            await send({"type": "http.response.body"})
        finally:
            self.posts[address] -= method != "GET"
            self.posts = +self.posts  # forgets addresses without a request
