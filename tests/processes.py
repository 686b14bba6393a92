"""Processes that a test starts, kills and waits for, forked from a server that has imported torch and transformers.

They are processes like any other, with an id, memory and files of their own; only the seconds that imports take are
spent once. The server is started anew at the first use, not forked from pytest: it has no Ray and no Spark, and its
environment, which all of them have, is that of this moment.
"""

from __future__ import annotations

import multiprocessing
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


def end_all() -> None:
    """Kill what a failed test has left; Python would wait for it at its end."""
    while _started:
        process = _started.pop()
        if process.is_alive():
            process.kill()
            process.join(30)
