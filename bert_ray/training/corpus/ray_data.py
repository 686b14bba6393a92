"""The tasks of a corpus on Ray Data, done by Ray's tasks, which wait for no pool."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence

import pyarrow as pa
import ray.data

from bert_ray.errors import EngineError
from bert_ray.ray_session import each_done
from bert_ray.training.corpus.tokens import quiet_threads
from bert_ray.training.corpus.work import Outcome, Task, Work, do


def run(work: Work, tasks: Sequence[Task], workers: int | None) -> Generator[Outcome, None, None]:
    """Do tasks on the cluster; outcomes come as they end. A task whose worker dies is given to another.

    Args:
        work: what all have in common.
        tasks: what there is to do.
        workers: tasks at a time; None: as many as there are CPUs.

    Raises:
        EngineError: Ray gave up.
    """
    if not tasks:
        return

    def do_some(batch: pa.Table) -> pa.Table:
        quiet_threads()
        return pa.table({"outcome": [do(work, Task.from_json(text)).to_json() for text in batch["item"].to_pylist()]})

    pool = ray.data.TaskPoolStrategy(size=workers)
    try:
        with contextlib.closing(
            each_done([task.to_json() for task in tasks], do_some, compute=pool, num_cpus=1)
        ) as outcomes:
            for text in outcomes:
                yield Outcome.from_json(text)
    except EngineError as error:
        raise EngineError(f"{error}; the same command goes on with what is left") from error
