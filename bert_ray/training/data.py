"""Labelled tables -> token ids and targets, checked, with every dropped row accounted for.

Everything that can be wrong with a table is found here, before a worker starts.
"""

from __future__ import annotations

import difflib
import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads

from bert_ray.errors import ColumnError, JobError
from bert_ray.model.tokenization import as_strings, is_blank, to_python_strings
from bert_ray.training.order import held_out

if TYPE_CHECKING:
    from bert_ray.model.tasks import Task
    from bert_ray.model.tokenization import Ragged, Tokenizer
    from bert_ray.training.job import TrainJob

# More distinct labels than this, and most rows with one of their own: the column is an id or a text, not a label.
_MANY_LABELS = 50


@dataclass(kw_only=True, slots=True)
class Examples:
    """Tokenised rows with their targets.

    Attributes:
        tokens: token ids of N rows.
        targets: int64 (N,).
    """

    tokens: Ragged
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.targets)

    def digest(self) -> str:
        """Sha256 over token ids, offsets and targets: what a run has learned from."""
        parts = (self.tokens.ids, self.tokens.offsets, self.targets)
        return hashlib.sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in parts)).hexdigest()


@dataclass(kw_only=True, slots=True)
class LabelledTable:
    """Texts and labels of a table, nulls and blanks gone.

    Attributes:
        path: where it was read.
        texts: large_string (N,), none null or blank.
        labels: the label column (N,), none null.
        notes: what was dropped, for the user to read.
    """

    path: str
    texts: pa.Array
    labels: pa.Array
    notes: list[str] = field(default_factory=list)


@dataclass(kw_only=True, slots=True)
class TrainingData:
    """What a run learns from and is judged by.

    Attributes:
        train: rows to learn from.
        validation: rows to judge by; may be empty.
        baseline: share of the validation rows that the most frequent training label gets right; None without any.
    """

    train: Examples
    validation: Examples
    baseline: float | None

    def digest(self) -> str:
        """Tells these data from others."""
        return hashlib.sha256(f"{self.train.digest()} {self.validation.digest()}".encode()).hexdigest()[:16]


def read_labelled(path: str, text: str, label: str) -> LabelledTable:
    """Read the text and label column of a Parquet file or directory; drop rows without a text or without a label.

    Raises:
        JobError: nothing there, not Parquet, no usable row.
        ColumnError: a column is missing or of the wrong type.
    """
    table = _read(path, text, label)
    if table.num_rows == 0:
        raise JobError(f"{path} has no rows: there is nothing to learn from")
    texts, labels = as_strings(table.column(text), text), table.column(label).combine_chunks()
    if pa.types.is_dictionary(labels.type):
        labels = labels.cast(labels.type.value_type)
    if labels.null_count == len(labels):
        raise JobError(f"{path}: column {label!r} is null in all {len(labels)} rows; name another with data.label")
    no_text, no_label = pc.is_null(texts), pc.is_null(labels)
    blank = pc.fill_null(is_blank(texts), False)
    keep = pc.invert(pc.or_(pc.or_(no_text, no_label), blank))
    dropped = [
        f"{count} with {what}"
        for count, what in (
            (_count(no_text), "no text (null)"),
            (_count(blank), "a blank text"),
            (_count(pc.and_not(no_label, pc.or_(no_text, blank))), "no label (null)"),
        )
        if count
    ]
    rows = _count(keep)
    notes = [f"{path}: {len(texts) - rows} of {len(texts)} rows left out: {', '.join(dropped)}"] if dropped else []
    if rows == 0:
        raise JobError(f"{path}: none of its {len(texts)} rows has both a text and a label ({', '.join(dropped)})")
    return LabelledTable(path=path, texts=texts.filter(keep), labels=labels.filter(keep), notes=notes)


def labels_for(job: TrainJob, table: LabelledTable) -> list[str]:
    """The labels to train: the job's, else those that stand in the table.

    Raises:
        JobError: fewer than two, or so many that the column cannot be a label.
    """
    from bert_ray.model.tasks.classification import labels_of

    column = job.data.label
    found = labels_of(table.labels)
    if len(found) < 2:
        raise JobError(
            f"{table.path}: column {column!r} has one label only ({found[0]!r}) in all {len(table.labels)} rows; a "
            "model needs rows of at least two to tell apart"
        )
    if job.labels is not None:
        return job.labels
    if len(found) > _MANY_LABELS and 2 * len(found) > len(table.labels):
        raise JobError(
            f"{table.path}: column {column!r} has {len(found)} different values in {len(table.labels)} rows, which "
            "looks like no label; name another with data.label, or list the labels in `labels`"
        )
    if job.name == "sentiment" and found == ["0", "1"]:
        return ["negative", "positive"]
    return found


def training_data(
    job: TrainJob, table: LabelledTable, task: Task, tokenize: Tokenizer
) -> tuple[TrainingData, list[str]]:
    """Split, tokenise and number the labels.

    Returns:
        the data, and notes for the user.

    Raises:
        JobError: the validation split is empty or has nothing to tell apart.
        ColumnError: a label that is none of the task's.
    """
    options, notes = job.data, list(table.notes)
    train_texts, train_targets = table.texts, _targets(task, table)
    if options.validation is not None:
        other = read_labelled(options.validation, options.text, options.label)
        notes += other.notes
        texts, targets = other.texts, _targets(task, other)
        known = pc.is_in(texts, train_texts)
        if shared := _count(known):
            notes.append(
                f"{shared} of the {len(texts)} texts in {other.path} also stand in {table.path}: the validation "
                "metrics will flatter the model"
            )
    elif options.validation_fraction > 0:
        out = held_out(to_python_strings(train_texts), options.validation_fraction)
        if not out.any() or out.all():
            raise JobError(
                f"data.validation_fraction {options.validation_fraction} of the {len(out)} rows in {table.path} "
                f"leaves none for {'validation' if not out.any() else 'training'}: raise it, or give data.validation"
            )
        texts, targets = train_texts.filter(pa.array(out)), train_targets[out]
        train_texts, train_targets = train_texts.filter(pa.array(~out)), train_targets[~out]
    else:
        texts, targets = train_texts.slice(0, 0), train_targets[:0]
    majority = int(np.bincount(train_targets).argmax())
    if (train_targets == majority).all():
        raise JobError(f"{table.path}: all {len(train_targets)} training rows have the same label")
    data = TrainingData(
        train=Examples(tokens=tokenize([train_texts]), targets=train_targets),
        validation=Examples(tokens=tokenize([texts]), targets=targets),
        baseline=float((targets == majority).mean()) if len(targets) else None,
    )
    return data, notes


def _read(path: str, text: str, label: str) -> pa.Table:
    place = Path(path)
    if not place.exists():
        raise JobError(f"{path} does not exist; data.train and data.validation name Parquet files or directories")
    try:
        dataset = pads.dataset(place, format="parquet", partitioning="hive")
        names = dataset.schema.names
    except (pa.ArrowInvalid, OSError) as error:
        raise JobError(f"{path} cannot be read as Parquet: {error}") from error
    if place.is_dir() and not dataset.files:
        raise JobError(f"{path} holds no Parquet file")
    for key, column in (("text", text), ("label", label)):
        if column not in names:
            near = difflib.get_close_matches(column, names, 3, 0.5)
            hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"it has {', '.join(map(repr, names))}"
            raise ColumnError(f"{path} has no column {column!r}; {hint} Name it with data.{key}")
    try:
        return dataset.to_table(columns=[text, label])
    except (pa.ArrowInvalid, pa.ArrowTypeError, OSError) as error:
        raise JobError(f"{path} cannot be read as Parquet: {error}") from error


def _targets(task: Task, table: LabelledTable) -> np.ndarray:
    try:
        return task.targets(table.labels)
    except ColumnError as error:
        raise ColumnError(f"{table.path}: {error}") from error


def _count(mask: pa.BooleanArray) -> int:
    return pc.sum(mask).as_py() or 0
