"""Processes that a test starts, kills and waits for, forked from a server that has imported torch and transformers.

They are processes like any other, with an id, memory and files of their own; only the seconds that imports take are
spent once. The server is started anew (not forked from pytest), so it has no threads, no Ray and no Spark.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["tests.preloaded", "deepspeed"])


def begin(target: Callable[..., None], *arguments: Any) -> BaseProcess:
    """Start a process that calls `target`, a function of a module, and ends."""
    process = context.Process(target=target, args=arguments)
    process.start()
    return process
