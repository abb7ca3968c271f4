"""Refusals under torchrun: one process says why, and all of them end together with exit code 2.

A process that refuses leaves the others waiting for it in a collective, for minutes. So each watches a key in
torchrun's own store, which the first to refuse sets. They end at one moment: torchrun kills those that outlive the
first.
"""

import atexit
import os
import sys
import threading
import traceback
from datetime import timedelta
from typing import Any

INTERVAL = 0.1  # seconds between two looks at the key
GRACE = timedelta(seconds=5)  # that the processes wait for each other, before they end

_watching, _refused = threading.Event(), threading.Event()  # in this process, by this process
_leaving = threading.Event()  # at this process's end


def watch() -> None:
    """Under torchrun, end this process as soon as another refuses. The command line calls it once."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        _watching.set()
        watcher = threading.Thread(target=_wait, args=(_store(),), daemon=True)
        watcher.start()

        def leave() -> None:  # a thread that returns from the store into a finished interpreter aborts the process
            _leaving.set()
            watcher.join(timeout=10)

        atexit.register(leave)


def announce(error: ValueError | OSError) -> None:
    """Under `watch`, print why this process refuses, unless another was first, and end; elsewhere do nothing."""
    if not _watching.is_set():
        return
    _refused.set()
    store = _store()
    if store.add("refused", 1) == 1:
        if os.environ.get("MARVAL_DEBUG"):
            traceback.print_exception(error)
        print(f"marval: {error}", file=sys.stderr)
    _end(store)


def _wait(store: Any) -> None:
    try:
        while not store.check(["refused"]):
            if _leaving.wait(INTERVAL):
                return
    except RuntimeError:  # torchrun has ended
        return
    if not _refused.is_set():
        _end(store)


def _end(store: Any) -> None:
    try:
        if store.add("ended", 1) == int(os.environ["WORLD_SIZE"]):
            store.set("all ended", "")
        store.wait(["all ended"], GRACE)
    except RuntimeError:  # one is too busy to notice, or gone
        pass
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(2)  # the main thread may wait in a collective for ever


def _store() -> Any:
    from torch.distributed import PrefixStore, TCPStore

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=60))
    return PrefixStore(f"marval-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
