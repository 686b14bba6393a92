"""A connection to Ray, for training and for corpora."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator

import ray

from bert_ray.errors import JobError


@contextlib.contextmanager
def session(address: str | None, cpus: int | None = None) -> Iterator[None]:
    """A Ray to work on, quiet but for its errors: the caller's where there is one, the cluster's, or one of our own.

    Args:
        address: of the cluster; None: RAY_ADDRESS's, else this machine.
        cpus: so many has a Ray of our own; None: the machine's.

    Raises:
        JobError: no cluster answers.
    """
    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    try:
        if address == "local":
            ray.init(
                address="local",
                num_cpus=cpus,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        else:
            ray.init(address=address, log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise JobError(f"Ray at {address!r} cannot be reached: {' '.join(str(error).split())[:300]}") from error
    try:
        yield
    finally:
        ray.shutdown()
