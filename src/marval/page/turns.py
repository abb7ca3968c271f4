"""Turns: one picture is drawn at a time, and nobody takes every place."""

import asyncio
import contextlib
import ipaddress
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from starlette.exceptions import HTTPException

PLACES = 64  # requests, under way or waiting; more are turned away
OF_ADDRESS = 8  # and of one address
Result = TypeVar("Result")


def network_of(host: str) -> str:
    """The visitor behind an address: a host may choose among the addresses of its IPv6 network, which count as one."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    return host if address.version == 4 else str(ipaddress.ip_network((address, 64), strict=False))


class Turns:
    """Share the drawing thread: the next turn goes to the visitor whose last turn was longest ago.

    One thread draws, so that times stay honest. All methods belong to the server's event loop.
    """

    def __init__(self) -> None:
        self.places: Counter[str] = Counter()  # requests of each visitor
        self.last: dict[str, int] = {}  # which turn each had last; a newcomer counts as just served
        self.waiting: list[tuple[str, asyncio.Future[None]]] = []
        self.count, self.busy = 0, False
        self.thread = ThreadPoolExecutor(1, "marval-draw")

    @contextlib.contextmanager
    def place(self, visitor: str) -> Iterator[None]:
        """Hold a place for a request.

        Raises:
            HTTPException: the visitor has too many (429), or all are taken (503).
        """
        if self.places[visitor] >= OF_ADDRESS:
            raise HTTPException(429, f"you have {OF_ADDRESS} drawings under way or waiting: wait until one is done")
        if self.places.total() >= PLACES:
            raise HTTPException(503, "too many visitors at the moment: try again in a minute")
        self.places[visitor] += 1
        self.last.setdefault(visitor, self.count)
        try:
            yield
        finally:
            self.places[visitor] -= 1
            if not self.places[visitor]:
                del self.places[visitor], self.last[visitor]

    async def run(self, visitor: str, job: Callable[[], Result]) -> Result:
        """Wait for a turn, and do a job in the drawing thread. Call it within a `place`."""
        async with self._turn(visitor):
            return await asyncio.get_running_loop().run_in_executor(self.thread, job)

    @contextlib.asynccontextmanager
    async def _turn(self, visitor: str) -> AsyncIterator[None]:
        waiter = visitor, asyncio.get_running_loop().create_future()
        self.waiting.append(waiter)
        self._next()
        try:
            await waiter[1]
            yield
        finally:
            if waiter in self.waiting:  # who leaves while waiting has had no turn
                self.waiting.remove(waiter)
            else:
                self.busy = False
            self._next()

    def _next(self) -> None:
        if self.busy or not self.waiting:
            return
        self.busy, self.count = True, self.count + 1
        waiter = min(self.waiting, key=lambda one: self.last[one[0]])  # of equals, the first to come
        self.waiting.remove(waiter)
        self.last[waiter[0]] = self.count
        waiter[1].set_result(None)
