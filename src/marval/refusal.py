"""Refusals under torchrun: one process says why, and all of them end at once.

A process that refuses leaves the others waiting for it in a collective. So each watches a key in torchrun's own store,
which the first to refuse sets.
"""

import os
import sys
import threading
import time
from datetime import timedelta
from typing import Any

INTERVAL = 0.1  # seconds between two looks at the key
GRACE = 1.0  # seconds in which the others see it, before torchrun notices that one has ended

_watched: list[Any] = []  # the store, once `watch` runs
_refused = threading.Event()  # by this process


def watch() -> None:
    """Under torchrun, end this process with exit code 2 as soon as another refuses. The command line calls it once."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return
    _watched.append(_connect())
    threading.Thread(target=_wait, args=(_connect(),), daemon=True).start()


def announce(error: ValueError) -> bool:
    """Say why this process refuses, unless another has; False where it is alone, and nothing is said.

    It returns when the others have ended.
    """
    if not _watched:
        return False
    if not _refused.is_set():
        _refused.set()
        if _watched[0].add(_key(), 1) == 1:
            print(f"marval: {error}", file=sys.stderr, flush=True)
        time.sleep(GRACE)
    return True


def _wait(store: Any) -> None:
    try:
        while not store.check([_key()]):
            time.sleep(INTERVAL)
    except RuntimeError:  # torchrun has ended
        return
    if not _refused.is_set():
        os._exit(2)  # the main thread may wait in a collective for ever


def _connect() -> Any:
    from torch.distributed import TCPStore

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(address, port, is_master=False, timeout=timedelta(seconds=60))


def _key() -> str:
    return f"marval-refused-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
