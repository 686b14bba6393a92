"""A connection to Ray, for training and for corpora."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import ray

from bert_ray.errors import JobError
from bert_ray.options import RayOptions


@contextlib.contextmanager
def session(options: RayOptions, cpus: int | None = None) -> Iterator[None]:
    """A Ray to work on: the caller's where there is one, the cluster's, or one of our own of so many CPUs.

    Raises:
        JobError: no cluster answers.
    """
    if ray.is_initialized():
        yield
        return
    arguments = options.init(cpus)
    try:
        ray.init(**arguments)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise JobError(options.unreachable(arguments["address"], error)) from error
    try:
        yield
    finally:
        ray.shutdown()
