"""Make a bundle from a table where nothing is trained: for tasks that say so (`Task.builds`)."""

from __future__ import annotations

import datetime
import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from bert_ray.errors import ColumnError, JobError
from bert_ray.training.data import read_columns
from bert_ray.training.launch import TrainResult, ended, new_task, versions

if TYPE_CHECKING:
    from bert_ray.model.bundle import Bundle
    from bert_ray.training.job import TrainJob


def build(job: TrainJob, base: Bundle, tell: Callable[[dict[str, Any]], None]) -> TrainResult:
    """Run a job whose task builds its bundle, in this process; one that has ended is not repeated.

    Raises:
        JobError: settings or data are at fault, or the output is taken.
        ColumnError: a column is missing or of the wrong type.
        BundleError: the base cannot be used.
    """
    started = time.perf_counter()
    task, output, named = new_task(job, base), Path(job.output), job.data.columns or {}
    if strange := sorted(set(named) - set(task.builds)):
        raise ColumnError(f"data.columns names {strange[0]!r}; task {task.kind} reads {', '.join(task.builds)}")
    names = {name: named.get(name, name) for name in task.builds}
    # What a job does not name may be missing; what the task cannot do without, it says itself.
    table = read_columns(job.data.train, names, optional=set(names) - set(named))
    if table.num_rows == 0:
        raise JobError(f"{job.data.train} has no rows: there is nothing to make a bundle from")
    columns = {name: table.column(column) for name, column in names.items() if column in table.column_names}
    for name, column in columns.items():
        if pa.types.is_nested(column.type):
            raise ColumnError(f"{job.data.train}: column {names[name]!r} is {column.type}, not text: cast it to string")
    identity = job.identity() | {"base": base.fingerprint, "rows": _digest(columns)}
    rows, done = table.num_rows, output.exists() and any(output.iterdir())
    if done:
        rows = ended(output, identity).provenance["data"]["train_rows"]
    else:
        provenance = {
            "base": {"reference": job.model, "fingerprint": base.fingerprint},
            "data": {"train": job.data.train, "train_rows": rows, "validation_rows": 0},
            "job": identity,
            "versions": versions(),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        try:
            rows, notes = task.build(base, columns, output, provenance)
        except ColumnError as error:
            raise ColumnError(f"{job.data.train}: {error}") from error
        for text in notes:
            tell({"what": "note", "text": f"{job.data.train}: {text}"})
    return TrainResult(
        bundle=output,
        metrics={},
        history=[],
        baseline=None,
        best_epoch=0,
        train_rows=rows,
        validation_rows=0,
        seconds=time.perf_counter() - started,
        tokens_per_second=0.0,
        trained=not done,
    )


def _digest(columns: dict[str, pa.ChunkedArray]) -> str:
    """Tells these columns from others, however they are chunked."""
    found = hashlib.sha256()
    for name, column in columns.items():
        found.update(f"{name} {column.type}\n".encode())
        for value in column.cast(pa.large_string()).cast(pa.large_binary()):
            raw = value.as_py()
            found.update(b"-" if raw is None else b"%d:" % len(raw) + raw)
    return found.hexdigest()[:16]
