"""Ray, as everything here uses it: a session, and pieces of work that Ray Data hands out. Imports ray."""

from __future__ import annotations

import contextlib
import logging
import re
import socket
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import pyarrow as pa
import ray
import ray.data

from bert_ray.errors import EngineError, JobError
from bert_ray.options import RayOptions

# How long a cluster's host has to take a connection.
_KNOCK_SEC = 10.0
# Blocks of a dataset. One item each up to here, so that what came of it is known when it ends.
_MOST_BLOCKS = 10_000


@contextlib.contextmanager
def session(options: RayOptions, cpus: int | None = None) -> Iterator[None]:
    """A Ray to work on: the one in use, the one at the address, the one this process is a job of, or one of our own.

    Args:
        options: where it runs.
        cpus: of a Ray of our own; None: the machine's.

    Raises:
        JobError: no cluster answers.
    """
    if ray.is_initialized():
        yield
        return
    arguments = options.init(cpus)
    try:
        knock(arguments["address"])
        ray.init(**arguments)
    except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        raise JobError(options.unreachable(arguments["address"], error)) from error
    try:
        yield
    finally:
        ray.shutdown()


def knock(address: str) -> None:
    """See whether anybody listens at host:port: Ray itself asks for minutes, and says nothing meanwhile.

    Raises:
        OSError: nobody does.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_SEC).close()


@contextlib.contextmanager
def quiet_data() -> Iterator[None]:
    """Without Ray Data's limit of time, and its progress, which counts blocks, beside ours, which counts rows."""
    context, logger = ray.data.DataContext.get_current(), logging.getLogger("ray.data")
    before = context.enable_progress_bars, getattr(context, "execution_no_progress_timeout_s", -1), logger.level
    context.enable_progress_bars = False
    # Ray 2.60 gives up where nothing ends for half an hour, which an item may take, and would at every try anew.
    context.execution_no_progress_timeout_s = -1
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        context.enable_progress_bars, context.execution_no_progress_timeout_s = before[:2]
        logger.setLevel(before[2])


def each_done(items: Sequence[str], do: Callable[[pa.Table], pa.Table], **how: Any) -> Generator[str, None, None]:
    """What came of each item, as items end. One whose worker dies is given to another; closing this ends the work.

    Args:
        items: what there is to do, at least one.
        do: a function, or a class whose objects are one: column `item` with one of the items -> column `outcome`.
        how: further arguments of `map_batches`: `compute`, `num_cpus`, ….

    Raises:
        EngineError: Ray gave up.
    """
    dataset = ray.data.from_items(
        [{"item": item} for item in items], override_num_blocks=min(len(items), _MOST_BLOCKS)
    ).map_batches(do, batch_format="pyarrow", batch_size=1, **how)
    try:
        # Closing Ray's generator shuts its executor down, actors and all.
        with contextlib.closing(
            iter(dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0))
        ) as batches:
            for batch in batches:
                yield from batch["outcome"].to_pylist()
    except ray.exceptions.RayError as error:
        raise EngineError(f"Ray gave up: {_why(error)}") from error


def _why(error: Exception) -> str:
    """What ended it in one line: of a worker's error, which comes as the text of its traceback, the first cause."""
    cause = re.search(r"^[\w.]*(?:Error|Exception): .*", str(error), re.MULTILINE)
    return " ".join((cause.group() if cause else str(error)).split())[:500]
