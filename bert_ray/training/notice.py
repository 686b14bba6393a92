"""A notice to stop: SIGTERM, as a spot machine or a cluster's scheduler sends it some time before the end.

The process that got it leaves a mark in the run's directory; the workers see it, on whatever machine they are, write a
checkpoint and leave. The same command goes on from there. A hook on a worker's machine may leave the mark as well.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

STOP_FILE = "stop"
# Marks that this process should have left, also where they cannot be written: its own run heeds them all the same.
_asked: set[Path] = set()


def stop_asked(directory: Path) -> bool:
    """Whether the run in `directory` was asked to stop."""
    mark = directory / STOP_FILE
    return mark in _asked or mark.exists()


@contextlib.contextmanager
def heeded(directory: Path, here: bool) -> Iterator[None]:
    """While open, SIGTERM asks the run in `directory` to stop; a mark that an earlier run left is taken away first.

    Args:
        directory: the run's.
        here: whether it is this process that trains; others see the mark alone, and where it cannot be left the error
            ends what waits for them.
    """
    mark = directory / STOP_FILE
    mark.unlink(missing_ok=True)
    _asked.discard(mark)

    def leave() -> None:
        _asked.add(mark)
        try:
            mark.touch()
        except OSError:
            if not here:
                raise  # Else it would end the run wherever that is just now.

    try:
        with on_sigterm(leave):
            yield
    finally:
        _asked.discard(mark)


@contextlib.contextmanager
def on_sigterm(call: Callable[[], object]) -> Iterator[None]:
    """While open, SIGTERM does this and nothing else; in a thread other than the main one, whose alone signals are,
    nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda signum, frame: call())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
