"""Reading many files: in threads, a few ahead of what is asked for, with a line about how far it is."""

import itertools
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Given = TypeVar("Given")
Result = TypeVar("Result")


def in_threads(
    function: Callable[[Given], Result], items: Iterable[Given], ahead: int | None = None
) -> Iterator[Result]:
    """`function` of every item, in order, computed in threads; at most `ahead` results wait."""
    threads = min(8, (os.cpu_count() or 1) + 1)
    waiting: deque[Future[Result]] = deque()
    rest = iter(items)
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in itertools.islice(rest, ahead or 4 * threads):
                waiting.append(pool.submit(function, item))
            while waiting:
                yield waiting.popleft().result()
                waiting.extend(pool.submit(function, item) for item in itertools.islice(rest, 1))
        finally:
            pool.shutdown(cancel_futures=True)


class Progress:
    """A line about long work, every few seconds and at its end; nothing of what is done sooner."""

    def __init__(self, what: str, total: int, seconds: float = 5.0):
        self.what, self.total, self.seconds = what, total, seconds
        self.began = self.printed = time.monotonic()
        self.long = False

    def __call__(self, done: int) -> None:
        """Say how far it is."""
        now = time.monotonic()
        if now - self.printed > self.seconds or (self.long and done == self.total):
            self.printed, self.long = now, True
            rate = done / (now - self.began)
            left = int((self.total - done) / rate)
            line = f"{self.what}: {done:,} of {self.total:,}, {rate:.0f}/s, {left // 60} min {left % 60} s left"
            print(line, flush=True)
