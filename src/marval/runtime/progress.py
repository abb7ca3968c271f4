"""Progress of long work: a bar on a terminal, a line now and then elsewhere, nothing for short work."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PATIENCE = 2.0  # seconds that pass before a bar appears
INTERVAL = 30.0  # seconds between two lines where there is no terminal

_shown: list[str] = []  # what is shown now: a terminal has room for one bar


@contextlib.contextmanager
def progress(total: int, label: str, *, quiet: bool = False) -> Iterator[Callable[[int], None]]:
    """Show on standard error how much of `total` is done; the block gets a function that adds to it.

    Args:
        total: how many images, steps, ... there are.
        label: what is done, for example "drawing images".
        quiet: show nothing, as in all processes but the main one. Work within other work that is shown is quiet, too.
    """
    console = Console(stderr=True)
    if quiet or _shown:
        yield lambda count: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # Lines printed meanwhile go above the bar, but not to the terminal when standard output goes elsewhere.
    bar = Progress(*columns, console=console, transient=True, redirect_stdout=sys.stdout.isatty())
    task = bar.add_task(escape(label), total=total)  # a folder's name may hold brackets
    began = printed = time.monotonic()
    done = 0

    def advance(count: int) -> None:
        nonlocal done, printed
        done, now = done + count, time.monotonic()
        bar.update(task, completed=done)
        if console.is_terminal:
            if now - began >= PATIENCE:
                bar.start()
        elif now - printed >= INTERVAL:
            printed = now
            left = (now - began) * (total - done) / max(done, 1)
            print(f"{label}: {done} of {total}, {minutes(left)} left", file=sys.stderr, flush=True)

    _shown.append(label)
    try:
        yield advance
    finally:
        _shown.remove(label)
        if bar.live.is_started:
            bar.stop()


def minutes(seconds: float) -> str:
    """Say a time as minutes and seconds."""
    return f"{int(seconds // 60)} min {int(seconds % 60)} s"
