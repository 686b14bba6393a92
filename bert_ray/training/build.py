"""Make a bundle from a table where nothing is trained by gradient steps: for tasks that say so (`Task.builds`)."""

from __future__ import annotations

import datetime
import functools
import hashlib
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from bert_ray.errors import ColumnError, JobError, LakeError, why
from bert_ray.lake.files import put_in_place
from bert_ray.model.tokenization import is_blank
from bert_ray.training.data import LabelledTable, leaks, one_array, read_columns, read_labelled
from bert_ray.training.launch import TrainResult, new_task, versions
from bert_ray.training.run_directory import ended

if TYPE_CHECKING:
    from bert_ray.model.bundle import Bundle
    from bert_ray.model.tasks import Task
    from bert_ray.training.job import TrainJob

Columns = dict[str, pa.ChunkedArray]


def build(job: TrainJob, base: Bundle, tell: Callable[[dict[str, Any]], None]) -> TrainResult:
    """Run a job whose task builds its bundle, in this process; one that has ended is not repeated.

    All rows of `data.train` go into the bundle (`data.validation_fraction` holds none of them out); where
    `data.validation` names a table, the bundle is measured on it before it appears.

    Raises:
        JobError: settings or data are at fault, or the output is taken.
        ColumnError: a column is missing or of the wrong type.
        BundleError: the base cannot be used.
        LakeError: the output cannot be written.
    """
    import torch

    started = time.perf_counter()
    task, output = new_task(job, base), Path(job.output)
    columns = _read(job, task)
    identity = job.identity() | {"base": base.fingerprint, "rows": _digest(columns)}
    validation = None
    if job.data.validation is not None:
        validation = _validation(job, task)
        for key, names, columns_of in (
            ("validation_rows", task.inputs, validation.inputs),
            ("validation_truth", task.truths, validation.truth),
        ):
            read = {name: pa.chunked_array([array]) for name, array in zip(names, columns_of, strict=True)}
            identity[key] = _digest(read)
    done = output.exists() and any(output.iterdir())
    if not done:
        before = torch.get_num_threads()
        torch.set_num_threads(job.threads or os.cpu_count() or 1)
        try:
            _make(job, base, task, columns, validation, identity, tell)
        finally:
            torch.set_num_threads(before)
    card = ended(output, identity)
    return TrainResult(
        bundle=output,
        metrics=card.metrics,
        history=[],
        baseline=card.provenance.get("majority_baseline"),
        best_epoch=0,
        train_rows=card.provenance["data"]["train_rows"],
        validation_rows=card.provenance["data"]["validation_rows"],
        seconds=time.perf_counter() - started,
        tokens_per_second=0.0,
        trained=not done,
    )


def _read(job: TrainJob, task: Task) -> Columns:
    """What the table has of `Task.builds`, by these names."""
    named = job.data.columns or {}
    if strange := sorted(set(named) - set(task.builds)):
        raise ColumnError(f"data.columns names {strange[0]!r}; task {task.kind} reads {', '.join(task.builds)}")
    names = {name: named.get(name, name) for name in task.builds}
    # What a job does not name may be missing; what the task cannot do without, it says itself.
    table = read_columns(job.data.train, names, optional=set(names) - set(named))
    if table.num_rows == 0:
        raise JobError(f"{job.data.train} has no rows: there is nothing to make a bundle from")
    columns = {name: table.column(column) for name, column in names.items() if column in table.column_names}
    for name, column in columns.items():
        if pa.types.is_dictionary(column.type):
            column = columns[name] = column.cast(column.type.value_type)
        if pa.types.is_string_view(column.type):
            columns[name] = column.cast(pa.large_string())
        elif pa.types.is_nested(column.type) or _is_binary(column.type):
            raise ColumnError(f"{job.data.train}: column {names[name]!r} is {column.type}, not text: cast it to string")
    return columns


def _is_binary(kind: pa.DataType) -> bool:
    kinds = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary)
    return any(known(kind) for known in kinds)


def _validation(job: TrainJob, task: Task) -> LabelledTable:
    """The rows to measure the bundle on."""
    known = (*task.inputs, *task.truths)
    named = {name: column for name, column in (job.data.columns or {}).items() if name in known}
    return read_labelled(str(job.data.validation), task, named)


def _taught(path: str, task: Task, columns: Columns) -> LabelledTable:
    """The rows that the bundle was made from: those that have a truth, and texts that are not blank."""
    truth = [one_array(columns[name]) for name in task.truths if name in columns]
    texts = [task.read(name, columns[name], name) for name in task.inputs if name in columns]
    keep = [array.is_valid() for array in truth]
    keep += [pc.invert(pc.fill_null(is_blank(text), True)) for text in texts]
    known = functools.reduce(pc.and_, keep)
    inputs, truth = ([array.filter(known) for array in arrays] for arrays in (texts, truth))
    return LabelledTable(path=path, inputs=inputs, truth=truth)


def _make(
    job: TrainJob,
    base: Bundle,
    task: Task,
    columns: Columns,
    validation: LabelledTable | None,
    identity: dict[str, Any],
    tell: Callable[[dict[str, Any]], None],
) -> None:
    """Have the task write the bundle beside its place, measure it, and move it there whole."""
    from bert_ray.model.bundle import load_bundle
    from bert_ray.model.card import save_card

    output = Path(job.output)
    data = {"train": job.data.train, "validation": job.data.validation, "validation_rows": 0}
    provenance = {
        "base": {"reference": job.model, "fingerprint": base.fingerprint},
        "data": data,
        "job": identity,
        "seed": job.seed,
        "versions": versions(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    made = output.parent / f".{output.name}.{os.getpid()}.made"
    shutil.rmtree(made, ignore_errors=True)
    try:
        try:
            rows, notes = task.build(base, columns, made, provenance)
        except ColumnError as error:
            raise ColumnError(f"{job.data.train}: {error}") from error
        tokenize = task.tokenizer(base.tokenizer())
        for name in task.inputs:
            if name in columns and (note := tokenize.unknown_note(task.read(name, columns[name], name))):
                notes = [*notes, f"{name}: {note}"]
        taught = _taught(job.data.train, task, columns)
        notes = [f"{job.data.train}: {note}" for note in notes]
        if set(task.truths) <= set(columns):
            names = {name: (job.data.columns or {}).get(name, name) for name in task.builds}
            notes += leaks(taught, names, task)
        for text in notes:
            tell({"what": "note", "text": text})
        card = load_bundle(made).card
        data["train_rows"] = rows
        if validation is not None:
            for text in validation.notes:
                tell({"what": "note", "text": text})
            if shared := _shared(task, columns, validation):
                what = f"{shared} of its rows also stand in {job.data.train}: the metrics will flatter the bundle"
                tell({"what": "note", "text": f"{validation.path}: {what}"})
            card.metrics = _measure(made, validation)
            data["validation_rows"] = len(validation.inputs[0])
            card.provenance["majority_baseline"] = task.baseline(taught.truth, validation.truth)
        card.provenance["data"] = data
        save_card(made, card)
        try:
            put_in_place(made, output)
        except OSError as error:
            raise LakeError(
                f"{output} cannot be written: {why(error)}. When that is mended, give the command again"
            ) from error
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _measure(bundle: Path, validation: LabelledTable) -> dict[str, float]:
    """The task's metrics of what the bundle says of the validation rows."""
    from bert_ray.model.annotator import Annotator
    from bert_ray.model.bundle import load_bundle

    annotator = Annotator(load_bundle(bundle))
    return annotator.task.metrics(annotator.annotate(validation.inputs), validation.inputs, validation.truth)


def _shared(task: Task, columns: Columns, validation: LabelledTable) -> int:
    """How many validation rows stand in the table that the bundle is made of."""
    name = task.inputs[0]
    known = task.read(name, columns[name], name)
    return int(pc.sum(pc.is_in(validation.inputs[0], known)).as_py() or 0)


def _digest(columns: Columns) -> str:
    """Tells these columns from others, however they are chunked."""
    found = hashlib.sha256()
    for name, column in columns.items():
        found.update(f"{name} {column.type}\n".encode())
        for value in column.cast(pa.large_string()).cast(pa.large_binary()):
            raw = value.as_py()
            found.update(b"-" if raw is None else b"%d:" % len(raw) + raw)
    return found.hexdigest()[:16]
