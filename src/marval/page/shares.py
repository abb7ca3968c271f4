"""What one visitor may hold, so that the others get theirs: places in the queue, and memory."""

import ipaddress
import time
from collections import Counter
from typing import Any

from gradio.queueing import Event, Queue
from starlette.exceptions import HTTPException

VISITORS = 16  # drawings that are under way at once; their pictures take turns
WAITING = 64  # requests that wait; more are turned away with a message
OF_SESSION = 4  # requests, under way or waiting, of one tab of a browser or one program
OF_ADDRESS = (VISITORS + WAITING) // 4  # and of one address, which may have many sessions
UNDER_WAY = VISITORS // 2  # of one address
UNREAD = 250  # messages that a visitor does not fetch, before it counts as gone
SESSION_BYTES = 64 * 2**20  # that the server keeps for one session: pictures and what the page shows
ALL_BYTES = 512 * 2**20
EXPIRY = 3600  # seconds without a request
UNFIT = "this request does not fit the page: reload the page and try again"


class Functions(dict):
    """The functions of a page by number; a number that is not among them is the visitor's mistake."""

    def __missing__(self, number: Any) -> Any:
        raise HTTPException(400, UNFIT)


def address(event: Any) -> str:
    """Where a request comes from; a host may choose among the addresses of its IPv6 network, which count as one."""
    host = event.request.client.host if event.request.client else ""
    try:
        found = ipaddress.ip_address(host)
    except ValueError:
        return host
    return host if found.version == 4 else str(ipaddress.ip_network((found, 64), strict=False))


class Places(Queue):
    """Gradio's queue, in which nobody takes every place."""

    def under_way(self) -> list[Event]:
        """The requests that are being served."""
        return [event for job in self.active_jobs if job for event in job]

    async def push(self, body: Any, request: Any, username: str | None) -> Any:
        """Take in a request.

        Raises:
            HTTPException: an unknown function (400), or more requests than one visitor may have (429).
        """
        if body.fn_index is None:
            raise HTTPException(400, UNFIT)
        asked = Event(body.session_hash, self.blocks.fns[body.fn_index], request, username)
        waiting = [event for queue in self.event_queue_per_concurrency_id.values() for event in queue.queue]
        held = [event for event in (*waiting, *self.under_way()) if event.alive]
        if sum(event.session_hash == asked.session_hash for event in held) >= OF_SESSION:
            raise HTTPException(429, f"you have {OF_SESSION} drawings under way or waiting: wait until one is done")
        if sum(address(event) == address(asked) for event in held) >= OF_ADDRESS:
            raise HTTPException(429, f"your address has {OF_ADDRESS} drawings under way or waiting: try again later")
        return await super().push(body, request, username)

    def get_events(self) -> tuple[list[Event], bool, str] | None:
        """The next request to serve: that of the address with the fewest under way, the first to come of these."""
        busy = Counter(map(address, self.under_way()))
        for name, queue in self.event_queue_per_concurrency_id.items():
            if queue.concurrency_limit is not None and queue.current_concurrency >= queue.concurrency_limit:
                continue
            event = min(queue.queue, key=lambda event: busy[address(event)], default=None)
            if event is not None and busy[address(event)] < UNDER_WAY:
                queue.queue.remove(event)
                return [event], False, name
        return None

    def send_message(self, event: Event, event_message: Any) -> None:
        """Leave a message for a visitor; one who fetches none is gone, and gets no more."""
        super().send_message(event, event_message)
        messages = self.pending_messages_per_session.get(event.session_hash)
        if messages is not None and messages.qsize() > UNREAD:
            event.alive = False
            self.pending_messages_per_session.pop(event.session_hash, None)


def size_of(value: Any) -> int:
    """The bytes of texts and pictures in a value."""
    if isinstance(value, dict):
        return sum(map(size_of, value.values()))
    if isinstance(value, (list, tuple)):
        return sum(map(size_of, value))
    return len(value) if isinstance(value, (str, bytes)) else getattr(value, "nbytes", 8)


class Memory:
    """What the server keeps for the sessions of a page, by size: whoever was here last keeps theirs."""

    def __init__(self) -> None:
        self.sizes: dict[str, int] = {}

    def tidy(self, sessions: Any, now: str | None) -> None:
        """Measure the session `now`, which was just served, and forget the oldest ones where all are too much.

        Args:
            sessions: gradio's `StateHolder`; it holds sessions in the order in which they were last used.
        """
        if now is not None and now in sessions.session_data:
            state = sessions.session_data[now]
            shown = [config.get("props", {}).get("value") for config in state.config_values.values()]
            self.sizes[now] = size_of([*state.state_data.values(), shown])
            if self.sizes[now] > SESSION_BYTES:
                self.forget(sessions, now)
        self.sizes = {name: size for name, size in self.sizes.items() if name in sessions.session_data}
        for name in list(sessions.session_data):
            used = sessions.time_last_used.get(name)
            expired = used is not None and time.time() - used.timestamp() > EXPIRY
            if not expired and sum(self.sizes.values()) <= ALL_BYTES:
                break
            self.forget(sessions, name)

    def forget(self, sessions: Any, name: str) -> None:
        """Drop a session's pictures: its visitor is told to draw them again."""
        self.sizes.pop(name, None)
        sessions.session_data.pop(name, None)
        sessions.time_last_used.pop(name, None)
