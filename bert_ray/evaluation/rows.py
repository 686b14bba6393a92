"""A labelled table as what a task compares: inputs and truth, rows that cannot be compared counted and left out."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from bert_ray.errors import ColumnError, LakeError, meant
from bert_ray.lake.files import printable
from bert_ray.lake.tables import parquet_dataset
from bert_ray.training.data import one_array, usable_rows

if TYPE_CHECKING:
    import pyarrow.dataset as pads

    from bert_ray.model.tasks.base import Task


@dataclass(kw_only=True, slots=True)
class Rows:
    """What is compared.

    Attributes:
        inputs: as the task reads them, (B,) each, none null.
        truth: the task's truth columns, (B,) each.
        numbers: int64 (B,), each row's number in the table, from 0.
        without_label: rows whose truth is null.
        without_text: rows with a truth whose input is null, or blank where the task gives such a row no annotation.
        faulty: reason -> further rows that the task finds fault with.
    """

    inputs: list[pa.Array]
    truth: list[pa.Array]
    numbers: np.ndarray
    without_label: int
    without_text: int
    faulty: dict[str, int] = field(default_factory=dict)


def open_table(path: str) -> pads.Dataset:
    """A Parquet file or directory, with the columns of all of its files.

    Raises:
        LakeError: there is none.
    """
    try:
        path.encode()
    except UnicodeEncodeError:  # Arrow takes no such names, and no report could be written of it.
        raise LakeError(f"{printable(path)} is no UTF-8: give the table a name that is") from None
    if not os.path.exists(path):
        raise LakeError(f"no table at {path}: give a Parquet file or a directory of them")
    try:
        table = parquet_dataset(path)
    except (pa.ArrowException, OSError) as error:
        raise LakeError(f"{path} cannot be read as Parquet: {error}") from error
    if not table.files:
        raise LakeError(f"no Parquet file in {path}")
    return table


def read_rows(table: pads.Dataset, path: str, task: Task, columns: Mapping[str, str]) -> Rows:
    """Read a task's input and truth columns, and leave out what cannot be compared.

    Args:
        table: of `open_table`.
        path: what the user calls it.
        task: says which columns.
        columns: the table's columns by the task's inputs and truths.

    Raises:
        ColumnError: a column is missing or of the wrong type, or the truth is not what the model says.
        LakeError: the table cannot be read, or no row of it can be compared.
    """
    for name in task.truths:
        _check(columns[name], name, table.schema.names, path)
        if columns[name] in [columns[item] for item in task.inputs]:
            raise ColumnError(
                f"{path}: {name} and an input are both column {columns[name]!r}; name the one that holds what is so"
            )
    try:
        read = table.to_table(columns=list(dict.fromkeys(columns.values())))
    except (pa.ArrowException, OSError) as error:
        raise LakeError(f"{path} cannot be read: {error}") from error
    try:
        truth, inputs = task.read_truth(
            [one_array(read.column(columns[name])) for name in task.truths],
            [one_array(read.column(columns[name])) for name in task.inputs],
        )
        rows = _comparable(task, list(inputs), list(truth))
        if len(rows.numbers):
            task.check_truth(rows.truth)
    except ColumnError as error:
        raise ColumnError(f"{path}: {error}") from error
    if not len(rows.numbers):
        reasons = "".join(f"; {count} with {what}" for what, count in rows.faulty.items())
        raise LakeError(
            f"{path}: none of its {read.num_rows:,} rows has both a text and a label{reasons}; nothing to measure"
        )
    return rows


def _check(column: str, name: str, known: list[str], path: str) -> None:
    if column in known:
        return
    flag = "--label" if name == "label" else f"--columns.{name}"
    raise ColumnError(f"{path} has no {name} column {column!r}; {meant(column, known)} Name it with {flag}")


def _comparable(task: Task, inputs: list[pa.Array], truth: list[pa.Array]) -> Rows:
    """Leave out rows without a truth or an input, and those that the task finds fault with."""
    keep, left_out = usable_rows(task, inputs, truth)
    counts = Counter[str]()
    for found in left_out:
        counts[found.part] += int(found.where.sum())
    mask = pa.array(keep)
    return Rows(
        inputs=[array.filter(mask) for array in inputs],
        truth=[array.filter(mask) for array in truth],
        numbers=np.flatnonzero(keep),
        without_label=counts["truth"],
        without_text=counts["input"],
        faulty={found.what: int(found.where.sum()) for found in left_out if found.part == "fault"},
    )
