"""Small lakes for tests, and how a run's table is read back and compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq

WORDS = ["the film was good", "terrible service and bad food", "I love this phone", "waste of money", "works well"]


def make_lake(
    root: Path, *, partitions: int = 2, files: int = 2, rows: int = 12, group: int = 4, repeat: int = 1
) -> Path:
    """A hive-partitioned lake of partitions x files x rows rows; ids are unique, `repeat` makes the texts long."""
    number = 0
    for partition in range(partitions):
        folder = root / f"source=s{partition}"
        folder.mkdir(parents=True)
        for index in range(files):
            ids = list(range(number, number + rows))
            number += rows
            texts = [f"{WORDS[i % len(WORDS)]} {i} " * repeat for i in ids]
            pq.write_table(pa.table({"id": ids, "text": texts}), folder / f"f{index}.parquet", row_group_size=group)
    return root


def read_output(output: Path) -> pa.Table:
    """The output as any reader of Parquet directories sees it, in the order of the ids."""
    return pa.dataset.dataset(output, format="parquet", partitioning="hive").to_table().sort_by("id")


def assert_same_table(one: pa.Table, other: pa.Table, annotation: str = "sentiment", atol: float = 1e-5) -> None:
    """Equal columns, and annotations equal but for floats, within the tolerance that engines are held to."""
    assert one.schema.names == other.schema.names
    for name in one.schema.names:
        if name != annotation:
            assert one[name].equals(other[name]), name
    left, right = (table[annotation].combine_chunks() for table in (one, other))
    # Spark has no lists of fixed size.
    assert _unfixed(left.type) == _unfixed(right.type)
    for row, (mine, theirs) in enumerate(zip(left.to_pylist(), right.to_pylist(), strict=True)):
        _assert_same(mine, theirs, atol, f"row {row}")


def _unfixed(kind: pa.DataType) -> pa.DataType:
    return pa.list_(kind.value_type) if pa.types.is_fixed_size_list(kind) else kind


def _assert_same(one: Any, other: Any, atol: float, where: str) -> None:
    """Equal values of any nesting; floats within `atol`."""
    if isinstance(one, float) and isinstance(other, float):
        assert abs(one - other) <= atol, where
    elif isinstance(one, dict) and isinstance(other, dict):
        assert list(one) == list(other), where
        for key in one:
            _assert_same(one[key], other[key], atol, f"{where}, {key}")
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple):
        assert len(one) == len(other), where
        for index, (left, right) in enumerate(zip(one, other, strict=True)):
            _assert_same(left, right, atol, f"{where}, [{index}]")
    else:
        assert one == other, where


def journal_names(output: Path, folder: str) -> list[str]:
    """The names in one of the journal's folders."""
    where = output / "_bert_ray" / folder
    return sorted(path.name for path in where.iterdir()) if where.exists() else []


def receipts(output: Path) -> list[dict]:
    """All receipts of a run."""
    where = output / "_bert_ray" / "receipts"
    return [json.loads((where / name).read_text()) for name in journal_names(output, "receipts")]
