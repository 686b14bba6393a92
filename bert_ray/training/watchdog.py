"""Ends a worker that no longer gets on: one that hangs, or that waits for one that does.

A collective of gloo or NCCL may wait for half an hour and more, and groups that a library makes have times of their
own. So each worker looks at itself: where no step, evaluation batch or checkpoint has ended for the job's
`timeout_minutes`, it says where every thread stands and ends; Ray Train starts the group anew from the last checkpoint.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def watchdog(timeout_sec: float, end: Callable[[], None] | None = None) -> Iterator[Callable[[], None]]:
    """While open, wait for the function that this yields to be called at least every `timeout_sec` seconds.

    Args:
        timeout_sec: counted from the first call.
        end: what to do when it is not; None: end the process.
    """
    last: list[float] = []
    closed = threading.Event()

    def beat() -> None:
        last[:] = [time.monotonic()]

    def watch() -> None:
        while not closed.wait(min(1.0, timeout_sec / 4)):
            if last and time.monotonic() - last[0] > timeout_sec:
                print(f"no progress for {timeout_sec:.0f} s; this worker ends", file=sys.stderr, flush=True)
                (end or _end)()
                return

    thread = threading.Thread(target=watch, name="watchdog", daemon=True)
    thread.start()
    try:
        yield beat
    finally:
        closed.set()
        thread.join()


def _end() -> None:
    with contextlib.suppress(Exception):  # Standard error may be no file.
        faulthandler.dump_traceback(all_threads=True)
    os._exit(1)
