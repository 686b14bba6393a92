"""The same tasks in this process, or on Ray Data."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

from bert_ray.errors import JobError
from bert_ray.training.corpus.job import CorpusJob, VocabularyJob
from bert_ray.training.corpus.work import Outcome, Task, Work, do

Run = Callable[[Work, Sequence[Task], Callable[[int], None]], Generator[Outcome, None, None]]


def _local(work: Work, tasks: Sequence[Task], watch: Callable[[int], None]) -> Generator[Outcome, None, None]:
    for task in tasks:
        yield do(work, task, watch)


@contextlib.contextmanager
def engine(job: CorpusJob | VocabularyJob) -> Iterator[Run]:
    """A function that does tasks and gives their outcomes as they end; closing its generator ends the work.

    Raises:
        JobError: the engine is not installed, or its cluster cannot be reached.
    """
    if job.engine == "local":
        yield _local
        return
    try:
        from bert_ray.ray_session import quiet_data, session
        from bert_ray.training.corpus import ray_data
    except ImportError as error:
        if (error.name or "").startswith("bert_ray"):
            raise
        raise JobError(f"engine ray needs {error.name}: pip install 'bert-ray[train]'") from error
    with session(job.ray), quiet_data():

        def run(work: Work, tasks: Sequence[Task], watch: Any) -> Generator[Outcome, None, None]:
            return ray_data.run(work, tasks, job.workers)

        yield run
