"""The tasks of a corpus on Ray Data: each a block of its own, done by Ray's tasks, which wait for no pool."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Generator, Iterator, Sequence

import pyarrow as pa
import ray
import ray.data

from bert_ray.errors import BertRayError
from bert_ray.training.corpus.tokens import quiet_threads
from bert_ray.training.corpus.work import Outcome, Task, Work, do

# Blocks of the tasks' dataset. One task each up to here, so that its outcome is known when it ends.
_MOST_BLOCKS = 10_000


class EngineError(BertRayError):
    """Ray gave up in the middle of a run. What is done stays done."""


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
        return pa.table({"outcome": [do(work, Task.from_json(text)).to_json() for text in batch["task"].to_pylist()]})

    dataset = ray.data.from_items(
        [{"task": task.to_json()} for task in tasks], override_num_blocks=min(len(tasks), _MOST_BLOCKS)
    ).map_batches(
        do_some,
        batch_format="pyarrow",
        batch_size=1,
        compute=ray.data.TaskPoolStrategy(size=workers),
        num_cpus=1,
    )
    try:
        # Closing Ray's generator shuts its executor down.
        with contextlib.closing(
            iter(dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0))
        ) as batches:
            for batch in batches:
                for text in batch["outcome"].to_pylist():
                    yield Outcome.from_json(text)
    except ray.exceptions.RayError as error:
        raise EngineError(
            f"Ray gave up: {' '.join(str(error).split())[:500]}; the same command goes on with what is left"
        ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without Ray Data's limit of time, and its progress, which counts blocks, beside ours, which counts documents."""
    context, logger = ray.data.DataContext.get_current(), logging.getLogger("ray.data")
    before = context.enable_progress_bars, getattr(context, "execution_no_progress_timeout_s", -1), logger.level
    context.enable_progress_bars = False
    # Ray 2.60 gives up where nothing ends for half an hour, which a task may take, and would at every try anew.
    context.execution_no_progress_timeout_s = -1
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        context.enable_progress_bars, context.execution_no_progress_timeout_s = before[:2]
        logger.setLevel(before[2])
