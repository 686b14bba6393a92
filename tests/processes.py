"""Processes that a test starts, kills and waits for, forked from a server that has imported torch and transformers.

They are processes like any other, with an id, memory and files of their own; only the seconds that imports take are
spent once. The server is started anew at the first use, not forked from pytest: it has no Ray and no Spark, and its
environment, which all of them have, is that of this moment.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["tests.preloaded", "deepspeed"])


_started: list[BaseProcess] = []


def begin(target: Callable[..., None], *arguments: Any) -> BaseProcess:
    """Start a process that calls `target`, a function of a module, and ends."""
    process = context.Process(target=target, args=arguments)
    process.start()
    _started.append(process)
    return process


def drive(run: Callable[[Any], Any], job: Any, fault: Callable[[], None] | None = None) -> None:
    """A driver of its own: its exit status is the job's. `fault` is run first: it may put a kill where it is wanted."""
    if fault:
        fault()
    sys.exit(run(job).exit_status)


def kill_at(kind: str, number: int, when: str) -> None:
    """This process kills itself when it puts the `number`-th file whose path has `kind` in its place: "before" that, so
    that it lies under its temporary name, or right "after".
    """
    real, seen = os.replace, []

    def dying(source: Any, target: Any) -> None:
        if kind in str(target):
            seen.append(target)
            if len(seen) == number:
                if when == "after":
                    real(source, target)
                os.kill(os.getpid(), signal.SIGKILL)
        real(source, target)

    os.replace = dying


def ended(process: BaseProcess, seconds: float = 240) -> int | None:
    """The exit status, None where the process still runs."""
    process.join(seconds)
    return process.exitcode


def wait_for(condition: Callable[[], Any], process: BaseProcess, seconds: float = 240) -> Any:
    """What the condition gives, once it holds; the process has to live until then."""
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert process.is_alive(), "the driver ended before the fault could be made"
        assert time.monotonic() < until
        time.sleep(0.005)
    return found


def end_all() -> None:
    """Kill what a failed test has left; Python would wait for it at its end."""
    while _started:
        process = _started.pop()
        if process.is_alive():
            process.kill()
            process.join(30)
