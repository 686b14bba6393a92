"""Processes that a test starts, kills and waits for, forked from a server that has imported torch and transformers.

They are processes like any other, with an id, memory and files of their own; only the seconds that imports take are
spent once. The server is started anew (not forked from pytest), so it has no threads, no Ray and no Spark.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import socket
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

_GROUPS_SECONDS = 600.0

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.preloaded"])


def begin(target: Callable[..., None], *arguments: Any) -> BaseProcess:
    """Start a process that calls `target`, a function of a module, and ends."""
    process = _context.Process(target=target, args=arguments)
    process.start()
    return process


def run_groups(worlds: tuple[int, ...], target: Callable[..., Any], *arguments: Any) -> dict[int, Any]:
    """Run groups of 1, 2, ... workers on loopback, one group after the other: what rank 0 of each gives back.

    Each worker calls `target(rank, world, *arguments)` in a gloo process group, with one thread.
    """
    answers = _context.Queue()
    nursery = begin(_nurse, worlds, target, arguments, answers)
    found: dict[int, Any] = {}
    until = time.monotonic() + _GROUPS_SECONDS
    while len(found) < len(worlds):
        alive = nursery.is_alive()
        try:
            world, answer = answers.get(timeout=1)
            found[world] = answer
        except queue.Empty:
            assert alive, "a worker died; standard error says of what"
            assert time.monotonic() < until
    nursery.join(60)
    assert nursery.exitcode == 0
    return found


def _nurse(worlds: tuple[int, ...], target: Callable[..., Any], arguments: tuple[Any, ...], answers: Any) -> None:
    import deepspeed  # noqa: F401, for all workers at once

    forks = multiprocessing.get_context("fork")
    for world in worlds:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        workers = [
            forks.Process(target=_work, args=(rank, world, port, target, arguments, answers)) for rank in range(world)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if any(worker.exitcode for worker in workers):
            raise SystemExit(1)


def _work(
    rank: int, world: int, port: int, target: Callable[..., Any], arguments: tuple[Any, ...], answers: Any
) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
    }
    import torch

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    answer = target(rank, world, *arguments)
    if rank == 0:
        answers.put((world, answer))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
