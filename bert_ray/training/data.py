"""Labelled tables -> samples of tokens with targets, checked, with every dropped row accounted for.

Everything that can be wrong with a table is found here, before a worker starts. What a table must hold is the task's
to say: its input columns and its truth columns.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import fs

from bert_ray.errors import ColumnError, JobError, meant
from bert_ray.lake.tables import parquet_dataset
from bert_ray.model.tasks.base import Learning
from bert_ray.model.tokenization import is_blank, is_text, to_python_strings
from bert_ray.stores import open_store
from bert_ray.training.job import is_uri
from bert_ray.training.order import held_out

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    import torch

    from bert_ray.model.bundle import Bundle
    from bert_ray.model.card import Card
    from bert_ray.model.examples import Examples
    from bert_ray.model.tasks import Task
    from bert_ray.model.tokenization import Tokenizer
    from bert_ray.training.job import TrainJob
    from bert_ray.training.sources import Source

# What an array of Arrow's strings holds at most; large_string has no such limit.
_MOST_STRING_BYTES = 2**31 - 1


@dataclass(kw_only=True, slots=True)
class LabelledTable:
    """Inputs and truth of a table, rows that cannot be used left out.

    Attributes:
        path: where it was read.
        inputs: the task's inputs, large_string (N,) each, none null.
        truth: the task's truth columns, (N,) each.
        notes: what was left out, for the user to read.
    """

    path: str
    inputs: list[pa.Array]
    truth: list[pa.Array]
    notes: list[str] = field(default_factory=list)

    def filter(self, keep: np.ndarray) -> LabelledTable:
        """The rows where `keep`, bool (N,)."""
        mask = pa.array(keep)
        return LabelledTable(
            path=self.path,
            inputs=[array.filter(mask) for array in self.inputs],
            truth=[array.filter(mask) for array in self.truth],
            notes=self.notes,
        )


class Data(Protocol):
    """What a run learns from, wherever it stems from; attributes as TrainingData has them."""

    baseline: float | None
    train_rows: int
    validation_rows: int
    learning: Learning

    def sources(self, job: TrainJob, base: Bundle, card: Card, device: torch.device) -> tuple[Source, Source]:
        """What to train on, and what to be judged by."""

    def identity(self) -> dict[str, Any]:
        """Tells these data from others, by named features."""


@dataclass(kw_only=True, slots=True)
class TrainingData:
    """What a run learns from and is judged by.

    Attributes:
        train: samples to learn from.
        validation: samples to judge by; may be empty.
        baseline: the task's metric of the best constant answer on the validation rows; None where there is none.
        train_rows, validation_rows: rows of the tables that these samples stem from.
        learning: what the loss goes by.
    """

    train: Examples
    validation: Examples
    baseline: float | None
    train_rows: int
    validation_rows: int
    learning: Learning = field(default_factory=Learning)

    def sources(self, job: TrainJob, base: Bundle, card: Card, device: torch.device) -> tuple[Source, Source]:
        """What to train on, and what to be judged by."""
        from bert_ray.training.augmentation import Augmentation
        from bert_ray.training.sources import TableSource

        augmentation = None
        if job.augmentation.any:
            augmentation = Augmentation(job.augmentation, base.tokenizer(), card.max_length, job.seed, device)
        train = TableSource(
            self.train, batch_size=job.batch_size, epochs=job.epochs, seed=job.seed, augmentation=augmentation
        )
        return train, TableSource(self.validation)

    def identity(self) -> dict[str, Any]:
        """Tells these data from others."""
        rows = hashlib.sha256(f"{self.train.digest()} {self.validation.digest()}".encode()).hexdigest()[:16]
        return {"rows": rows}


def read_labelled(
    path: str, task: Task, columns: Mapping[str, str] | None = None, key: str = "data.columns"
) -> LabelledTable:
    """Read a task's input and truth columns of a Parquet file or directory; leave out rows that cannot be used.

    Args:
        path: the table.
        task: says which columns.
        columns: table columns by the task's inputs and truths; what is not named reads the column of its own name.
        key: under which the user names them.

    Raises:
        JobError: nothing there, not Parquet, no usable row.
        ColumnError: a column is missing or of the wrong type.
    """
    names = {name: (columns or {}).get(name, name) for name in (*task.inputs, *task.truths)}
    if strange := sorted(set(columns or {}) - set(names)):
        raise ColumnError(f"{key} names {strange[0]!r}; task {task.kind} learns from {', '.join(names)}")
    for truth_name in task.truths:
        for task_input in task.inputs:
            if names[truth_name] == names[task_input]:
                raise JobError(
                    f"{key}: {truth_name} and {task_input} both name the column {names[truth_name]!r}; a model "
                    "cannot learn a column from itself"
                )
    table = read_columns(path, names, key=key)
    if table.num_rows == 0:
        raise JobError(f"{path} has no rows: there is nothing to learn from")
    try:
        truth, inputs = task.read_truth(
            [one_array(table.column(names[name])) for name in task.truths],
            [one_array(table.column(names[name])) for name in task.inputs],
        )
    except ColumnError as error:
        raise ColumnError(f"{path}: {error}") from error
    if not task.truth_may_be_null:
        for name, array in zip(task.truths, truth, strict=True):
            if array.null_count == len(array):
                raise JobError(
                    f"{path}: column {names[name]!r} is null in all {len(array)} rows; name another with {key}.{name}"
                )
    found = LabelledTable(path=path, inputs=list(inputs), truth=list(truth))
    usable = _usable(found, task)
    usable.notes += leaks(usable, names, task)
    return usable


def leaks(table: LabelledTable, names: Mapping[str, str], task: Task) -> list[str]:
    """A note where a truth is for the most part the text itself: two columns that hold the same."""
    notes = []
    for truth_name, truth in zip(task.truths, table.truth, strict=True):
        if not is_text(truth.type):
            continue
        for task_input, array in zip(task.inputs, table.inputs, strict=True):
            same = int(pc.sum(pc.equal(truth.cast(array.type), array)).as_py() or 0)
            if 2 * same > len(array):
                notes.append(
                    f"{table.path}: in {same} of {len(array)} rows column {names[truth_name]!r} is the text in "
                    f"{names[task_input]!r}: what is to be learned stands in the input"
                )
    return notes


@dataclass(kw_only=True, slots=True)
class LeftOut:
    """Rows that nobody can learn from or compare with, and why.

    Attributes:
        part: "truth" or "input" where that is missing, "fault" where the task finds fault with the row.
        what: what is wrong.
        where: bool (N,), the rows; each counts under the first thing that is wrong with it.
    """

    part: str
    what: str
    where: np.ndarray

    def __str__(self) -> str:
        first = f" (first: row {int(self.where.argmax())})" if self.part == "fault" else ""
        return f"{int(self.where.sum())} with {self.what}{first}"


def usable_rows(task: Task, inputs: Sequence[pa.Array], truth: Sequence[pa.Array]) -> tuple[np.ndarray, list[LeftOut]]:
    """Tell rows without truth or inputs, and those that the task finds fault with, from the rest.

    Args:
        task: says what a row needs.
        inputs: as the task reads them, (N,) each.
        truth: its truth columns, (N,) each.

    Returns:
        bool (N,), the rows to keep; and why the others are not.
    """
    keep = np.ones(len(inputs[0]), bool)
    found: list[LeftOut] = []

    def leave_out(part: str, what: str, where: np.ndarray) -> None:
        fresh = where & keep
        if fresh.any():
            keep[fresh] = False
            found.append(LeftOut(part=part, what=what, where=fresh))

    if not task.truth_may_be_null:
        for name, array in zip(task.truths, truth, strict=True):
            leave_out("truth", f"no {name} (null)", as_mask(pc.is_null(array)))
    for name, array in zip(task.inputs, inputs, strict=True):
        leave_out("input", f"no {name} (null)", as_mask(pc.is_null(array)))
        if task.blank_is_null:
            leave_out("input", f"a blank {name}", as_mask(pc.fill_null(is_blank(array), False)))
    if keep.any():
        places, mask = np.flatnonzero(keep), pa.array(keep)
        faults = task.faults([array.filter(mask) for array in inputs], [array.filter(mask) for array in truth])
        for what, where in faults.items():
            whole = np.zeros(len(keep), bool)
            whole[places[where]] = True
            leave_out("fault", what, whole)
    return keep, found


def _usable(table: LabelledTable, task: Task) -> LabelledTable:
    """Leave out what cannot be used; a note says how many rows and why."""
    keep, left_out = usable_rows(task, table.inputs, table.truth)
    reasons = ", ".join(map(str, left_out))
    if not keep.any():
        raise JobError(f"{table.path}: none of its {len(keep)} rows can be used ({reasons})")
    kept = table.filter(keep)
    if left_out:
        missing = len(keep) - int(keep.sum())
        kept.notes = [*kept.notes, f"{table.path}: {missing} of {len(keep)} rows left out: {reasons}"]
    return kept


def labels_for(job: TrainJob, task: Task, table: LabelledTable) -> list[str]:
    """The labels to train: the job's, else those that stand in the table; see `labels_in`."""
    found = labels_in(task, table, job.data.columns)
    return job.labels if job.labels is not None else found


def labels_in(task: Task, table: LabelledTable, columns: Mapping[str, str] | None) -> list[str]:
    """The labels that stand in a table, where its columns are called `columns` or as the task has it.

    Raises:
        ColumnError: fewer than two, or so many that the column cannot be a label.
    """
    try:
        return task.labels_in(table.truth)
    except ColumnError as error:
        column = (columns or {}).get(task.truths[0], task.truths[0])
        raise ColumnError(f"{table.path}: column {column!r}: {error}") from error


def training_data(
    job: TrainJob, table: LabelledTable, task: Task, tokenize: Tokenizer
) -> tuple[TrainingData, list[str]]:
    """Split and tokenise, and turn the truth into targets.

    Args:
        job: what to do.
        table: of `data.train`.
        task: bound to the card of the bundle to come, labels included.
        tokenize: of the base, as the task uses it.

    Returns:
        the data, and notes for the user.

    Raises:
        JobError: the validation split is empty.
        ColumnError: a label that is none of the task's.
    """
    options, notes = job.data, list(table.notes)
    key = task.inputs.index(task.split_by)
    if options.validation is not None:
        train, validation = table, read_labelled(options.validation, task, options.columns)
        notes += validation.notes
        seen = set(rows_known(train.inputs, validation.inputs))
        if shared := sum(row in seen for row in rows_known(validation.inputs, train.inputs)):
            notes.append(
                f"{shared} of the {len(validation.inputs[0])} rows in {validation.path} also stand in {table.path}: "
                "the validation metrics will flatter the model"
            )
    elif options.validation_fraction > 0:
        out = held_out(to_python_strings(table.inputs[key]), options.validation_fraction)
        if not out.any() or out.all():
            raise JobError(
                f"data.validation_fraction {options.validation_fraction} of the {len(out)} rows in {table.path} "
                f"leaves none for {'validation' if not out.any() else 'training'}: raise it, or give data.validation"
            )
        train, validation = table.filter(~out), table.filter(out)
    else:
        train, validation = table, table.filter(np.zeros(len(table.inputs[0]), bool))
    try:
        taught = task.labels_in(train.truth)
    except ColumnError as error:
        raise JobError(f"{table.path}: in the training rows: {error}") from error
    notes += _untaught(task, taught, table.path)
    for name, array in zip(task.inputs, train.inputs, strict=True):
        if note := tokenize.unknown_note(array):
            notes.append(f"{table.path}: {name}: {note}")
    data = TrainingData(
        train_rows=len(train.inputs[0]),
        validation_rows=len(validation.inputs[0]),
        train=task.for_training(_examples(task, tokenize, train)),
        validation=_examples(task, tokenize, validation),
        baseline=task.baseline(train.truth, validation.truth) if len(validation.inputs[0]) else None,
        learning=task.learning_for(job.label_smoothing, job.class_weights, train.truth),
    )
    # Only validation's own columns are compared with annotations; the others need not travel to the workers.
    data.train.inputs, data.train.truth = (), ()
    return data, notes


def rows_known(inputs: Sequence[pa.Array], others: Sequence[pa.Array]) -> Iterator[tuple[str, ...]]:
    """The rows of a table that have each of their inputs somewhere in another's, not needfully in one row of it.

    Args:
        inputs: as the task reads them, (N,) each.
        others: of the other table, (M,) each.
    """
    known = np.ones(len(inputs[0]), bool)
    for one, other in zip(inputs, others, strict=True):
        # A null is in no list here: it is no text that could be known by heart.
        known &= as_mask(pc.is_in(one, other, skip_nulls=True))
    which = pa.array(known)
    return zip(*(to_python_strings(array.filter(which)) for array in inputs), strict=True)


def _untaught(task: Task, taught: Sequence[str], path: str) -> list[str]:
    """A note on labels of the bundle to come that no training row has: one row a label, or a rare one held out."""
    if not set(taught) <= set(task.card.labels):  # The rows hold positions of labels, not their names.
        return []
    if not (lacking := [label for label in task.card.labels if label not in taught]):
        return []
    named = ", ".join(map(repr, lacking[:5])) + (", …" if len(lacking) > 5 else "")
    return [
        f"{path}: no training row has {named} ({len(lacking)} of {len(task.card.labels)} labels): the model will "
        "hardly ever say so; give more rows, or a smaller data.validation_fraction"
    ]


def _examples(task: Task, tokenize: Tokenizer, table: LabelledTable) -> Examples:
    try:
        return task.examples(tokenize, table.inputs, table.truth)
    except ColumnError as error:
        raise ColumnError(f"{table.path}: {error}") from error


def read_columns(
    path: str, names: Mapping[str, str], optional: Collection[str] = (), key: str = "data.columns"
) -> pa.Table:
    """Read columns of a Parquet file or directory, also on a store (`s3://bucket/train`).

    Args:
        path: the table.
        names: what a task calls a column -> the table's column.
        optional: keys of `names` that the table may lack.
        key: under which the user names them.

    Raises:
        JobError: nothing there, not Parquet.
        LakeError: a Delta table that cannot be read, or a table of another log.
        ColumnError: a column is missing.
    """
    try:
        system, place = open_store(path) if is_uri(path) else (fs.LocalFileSystem(), path)
        kind = system.get_file_info(place).type
    except pa.ArrowInvalid as error:
        raise JobError(f"{path} is no address of a store that is known: {error}") from error
    except (pa.ArrowException, OSError) as error:
        raise JobError(f"{path} cannot be reached: {error}") from error
    if kind == fs.FileType.NotFound:
        raise JobError(f"{path} does not exist; data.train and data.validation name Parquet files or directories")
    try:
        dataset = parquet_dataset(place, system)
        known = dataset.schema.names
    except (pa.ArrowException, OSError) as error:
        raise JobError(f"{path} cannot be read as Parquet: {error}") from error
    if not dataset.files:
        raise JobError(f"{path} holds no Parquet file")
    names = {key: column for key, column in names.items() if column in known or key not in optional}
    for name, column in names.items():
        if column not in known:
            raise ColumnError(f"{path} has no column {column!r}; {meant(column, known)} Name it with {key}.{name}")
    try:
        return dataset.to_table(columns=list(dict.fromkeys(names.values())))
    except (pa.ArrowException, OSError) as error:
        raise JobError(f"{path} cannot be read as Parquet: {error}") from error


def one_array(column: pa.ChunkedArray) -> pa.Array:
    """A column as one array, dictionaries written out; of more than Arrow's strings can hold, large_string."""
    # Of views, as deltalake writes them, Arrow can neither filter nor take.
    if pa.types.is_string_view(column.type) or (pa.types.is_string(column.type) and column.nbytes > _MOST_STRING_BYTES):
        column = column.cast(pa.large_string())
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):  # A column without rows keeps its chunks.
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], array.type)
    return array.cast(array.type.value_type) if pa.types.is_dictionary(array.type) else array


def as_mask(values: pa.BooleanArray) -> np.ndarray:
    """An array without nulls as bool (N,)."""
    return values.to_numpy(zero_copy_only=False).astype(bool)
