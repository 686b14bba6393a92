"""Annotating with Ray Data: a dataset of rows, or the units of a run.

Both use a pool of actors, each with the model in its memory. A pool that takes every CPU of a small machine waits for
ever, since the tasks that read and write need one as well, and Ray says nothing; so the pool always leaves some.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import ray
import ray.data

from bert_ray.errors import JobError
from bert_ray.inference.specs import annotator_of
from bert_ray.inference.work import Outcome, Work, annotate_unit
from bert_ray.lake.units import Unit
from bert_ray.ray_session import each_done, quiet_data, session

if TYPE_CHECKING:
    from bert_ray.inference.bulk import Plan
    from bert_ray.model.annotator import AnnotatorSpec

# Torch threads of a CPU worker where nobody says: matrix products of a BERT's size scale well to about this many, and
# more workers would each hold the model.
_THREADS = 4
# On a machine of so few cores each worker has one thread: threads of one worker wait for each other several times in a
# millisecond, so whatever else takes a core for a moment (Ray itself, a neighbour) holds up all of them.
_FEW_CORES = 4
# Rows handed to an actor at a time: enough to pack rows of like length together, few enough to stay in memory.
_BATCH_ROWS = 2048


@dataclass(frozen=True, slots=True)
class Pool:
    """How many actors, and what each one takes. `cpus` is what Ray sets aside, `threads` what torch uses."""

    actors: int
    cpus: float
    gpus: float
    threads: int | None


def plan_pool(
    cpus: float,
    node_cpus: float,
    gpus: float,
    *,
    workers: int | None,
    threads: int | None,
    device: str,
    tasks: int | None,
) -> Pool:
    """Lay out a pool over a cluster.

    Args:
        cpus: CPUs of the cluster.
        node_cpus: CPUs of its largest node.
        gpus: GPUs of the cluster.
        workers: how many actors the user asked for, None to choose.
        threads: how many torch threads each, None to choose.
        device: "auto" takes a GPU per actor where the cluster has any.
        tasks: how many pieces of work there are at most; no more actors than that. None: they come from a dataset,
            whose own tasks need a CPU beside the pool.

    Raises:
        JobError: the cluster cannot hold the workers asked for, and would wait for ever.
    """
    most = tasks if tasks is not None else 2**31
    if device.partition(":")[2] not in ("", "0"):
        raise JobError(f"device is {device!r}, but Ray gives each worker a GPU of its own: give auto or cuda")
    if device.startswith("cuda") or (device == "auto" and gpus >= 1):
        if gpus < max(1, workers or 1):
            raise JobError(f"{workers or 1} workers with a GPU each are asked for, the cluster has {gpus:g} GPUs")
        actors = min(workers or int(gpus), most)
        share = 1 if cpus > actors else cpus / (2 * actors)
        return Pool(actors=actors, cpus=_beside(tasks, share, actors, cpus), gpus=1, threads=threads)
    cores = max(1, int(cpus))
    fit = max(1, int(node_cpus))
    if workers:
        threads = threads or max(1, min(fit, cores // workers))
    else:
        shared = cores // min(most, cores)  # Few pieces of work: the cores are for their workers.
        threads = threads or min(fit, _THREADS, max(shared, 1 if cores <= _FEW_CORES else _THREADS))
    actors = min(workers or max(1, cores // threads), most)
    # Each actor leaves one of its cores to reading and writing, unless there are enough beside the pool.
    share = threads if actors * threads < cores else max(0.5, threads - 1)
    share = min(share, fit)
    if actors * share > cpus:
        raise JobError(
            f"{actors} workers of {threads} threads are asked for, the cluster has {cpus:g} CPUs: "
            "lower workers or threads"
        )
    return Pool(actors=actors, cpus=_beside(tasks, share, actors, cpus), gpus=0, threads=threads)


def _beside(tasks: int | None, share: float, actors: int, cpus: float) -> float:
    """CPUs that an actor takes where tasks of the dataset's own need one: without it they would wait for ever."""
    return share if tasks is not None else min(share, math.floor(1000 * max(0.0, cpus - 1) / actors) / 1000)


def annotate(
    dataset: ray.data.Dataset,
    model: str,
    column: str | None = None,
    columns: Mapping[str, str] | None = None,
    *,
    workers: int | None = None,
    threads: int | None = None,
    batch_rows: int = _BATCH_ROWS,
    **options: Any,
) -> ray.data.Dataset:
    """Append a model's annotation to a Ray dataset; lazy, as Ray's own transformations are.

    Only the dataset's schema is asked for at once; where it is not known, Ray computes the first rows to tell it.

    Args:
        dataset: rows with the task's input columns.
        model: a bundle reference that every node can resolve.
        column: the text column, for a task of one input; default: the input's name, `text`.
        columns: table columns by task input, for a task of several.
        workers: actors; default: what the cluster holds beside reading and writing.
        threads: torch threads per actor.
        batch_rows: rows handed to an actor at a time.
        **options: `name`, `scores`, `task`, `options`, `batch_tokens`, `device`, `dtype` (see `AnnotatorSpec`).

    Returns:
        The dataset with one more column; null text has a null annotation.

    Raises:
        BundleError: the model cannot be used.
        ColumnError: the dataset lacks the column, has it in another type, or has the annotation's name already.
        JobError: the cluster cannot hold the workers asked for.
    """
    spec, annotator = annotator_of(model, column=column, columns=columns, **options)
    schema, known = _schema(dataset)
    if schema is not None:
        annotator.check(schema)
    pool = _pool(workers=workers, threads=threads, device=spec.device, tasks=None)
    annotated = dataset.map_batches(
        _RowAnnotator,
        fn_constructor_args=(dataclasses.replace(spec, threads=pool.threads),),
        batch_format="pyarrow",
        batch_size=batch_rows,
        compute=ray.data.ActorPoolStrategy(size=pool.actors),
        num_cpus=pool.cpus,
        num_gpus=pool.gpus or None,
    )
    if schema is None or not known:
        return annotated
    # A dataset of no rows never reaches the actors, and would come out without the column: these no rows have it.
    empty = pa.schema([*schema, annotator.output_field]).empty_table()
    return annotated.union(ray.data.from_arrow(empty))


class _RowAnnotator:
    """The actor that annotates rows."""

    def __init__(self, spec: AnnotatorSpec) -> None:
        self._annotator = spec.build()

    def __call__(self, table: pa.Table) -> pa.Table:
        return self._annotator(table)


class _UnitAnnotator:
    """The actor that annotates units, each from its file to its part of the output."""

    def __init__(self, work: Work) -> None:
        self._work = work

    def __call__(self, batch: pa.Table) -> pa.Table:
        units = [Unit.from_json(text) for text in batch["item"].to_pylist()]
        return pa.table({"outcome": [annotate_unit(self._work, unit).to_json() for unit in units]})


def run_units(plan: Plan, watch: Callable[[int], None]) -> Iterator[Outcome]:
    """Annotate the plan's units on a pool of actors; outcomes come as units end.

    An actor that dies is started again and its unit given to it anew. Closing the generator ends the work.

    Raises:
        EngineError: Ray gave up.
    """
    # Else a Ray of our own prints an error for every pool of actors, about what cannot happen here.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    with session(plan.job.ray), quiet_data():
        job = plan.job
        pool = _pool(workers=job.workers, threads=job.threads, device=job.device, tasks=len(plan.todo))
        spec = dataclasses.replace(plan.work.annotator, threads=pool.threads)
        outcomes = each_done(
            [unit.to_json() for unit in plan.todo],
            _UnitAnnotator,
            fn_constructor_args=(dataclasses.replace(plan.work, annotator=spec),),
            # One unit at a time each: a second one would wait behind the first while another actor is idle.
            compute=ray.data.ActorPoolStrategy(size=pool.actors, max_tasks_in_flight_per_actor=1),
            num_cpus=pool.cpus,
            num_gpus=pool.gpus or None,
        )
        with contextlib.closing(outcomes):
            for text in outcomes:
                yield Outcome.from_json(text)


def _pool(*, workers: int | None, threads: int | None, device: str, tasks: int | None) -> Pool:
    if not ray.is_initialized():  # As any use of ray.data does.
        ray.init()
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    whole = ray.cluster_resources()
    return plan_pool(
        whole.get("CPU", 1),
        max((node.get("CPU", 0) for node in nodes), default=1),
        whole.get("GPU", 0),
        workers=workers,
        threads=threads,
        device=device,
        tasks=tasks,
    )


def _schema(dataset: ray.data.Dataset) -> tuple[pa.Schema | None, bool]:
    """The dataset's schema, None where it is empty, and whether its types are known.

    Blocks of pandas hold what is no number as objects: text, until a worker sees it.
    """
    found = dataset.schema()
    if found is None:
        return None, False
    if isinstance(found.base_schema, pa.Schema):
        return found.base_schema, True
    kinds = [kind if isinstance(kind, pa.DataType) else pa.string() for kind in found.types]
    return pa.schema(list(zip(found.names, kinds, strict=True))), False
