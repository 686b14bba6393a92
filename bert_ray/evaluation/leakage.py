"""Rows of a test table that also stand in the training data: what is measured on them flatters the model."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from bert_ray.errors import BertRayError
from bert_ray.lake.tables import parquet_dataset
from bert_ray.model.tokenization import to_python_strings
from bert_ray.training.data import rows_known

if TYPE_CHECKING:
    import pyarrow.dataset as pads

    from bert_ray.model.tasks.base import Task

# Training data larger than this on disk are not looked at: measuring a small table should not read a lake. A quarter
# of a GiB of Parquet holds about a million reviews and is read in seconds.
MOST_BYTES = 256 * 2**20


def rows_also_trained_on(
    inputs: Sequence[pa.Array], task: Task, provenance: Mapping[str, Any], most_bytes: int = MOST_BYTES
) -> int | None:
    """How many rows have inputs that stand, to the letter, in a row of the training data.

    Args:
        inputs: as the task reads them, (B,) each.
        task: says how a column is read.
        provenance: of the bundle's card: where the training data lie, and how their columns are called.
        most_bytes: the largest training data to look at.

    Returns:
        The count; None where the training data cannot be looked at: not known, gone, too large, or without these
        columns.
    """
    path = (provenance.get("data") or {}).get("train")
    named = ((provenance.get("job") or {}).get("data") or {}).get("columns") or {}
    if not isinstance(path, str) or not os.path.exists(path):
        return None
    columns = [named.get(name, name) for name in task.inputs]
    try:
        table = parquet_dataset(path)
        if sum(Path(file).stat().st_size for file in table.files) > most_bytes:
            return None
        if not set(columns) <= set(table.schema.names):
            return None
        seen = _seen(inputs, task, table, columns)
    except (pa.ArrowException, OSError, BertRayError):
        return None
    rows = zip(*(to_python_strings(array) for array in inputs), strict=True)
    return sum(row in seen for row in rows)


def _seen(inputs: Sequence[pa.Array], task: Task, table: pads.Dataset, columns: Sequence[str]) -> set[tuple[str, ...]]:
    """The rows of the training data that have each of their inputs somewhere in the test table."""
    seen: set[tuple[str, ...]] = set()
    for batch in table.to_batches(columns=list(dict.fromkeys(columns))):
        read = [
            task.read(name, batch.column(column), column) for name, column in zip(task.inputs, columns, strict=True)
        ]
        seen.update(rows_known(read, inputs))
    return seen
