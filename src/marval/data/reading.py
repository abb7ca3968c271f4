"""Reading many files: in threads, a few ahead of what is asked for."""

import itertools
import os
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
