"""Small lakes for tests, and how a run's table is read back and compared."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
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
    """Equal columns, equal labels, scores within the tolerance that engines are held to."""
    assert one.schema.names == other.schema.names
    for name in one.schema.names:
        if name != annotation:
            assert one[name].equals(other[name]), name
    left, right = (table[annotation].combine_chunks() for table in (one, other))
    assert left.type == right.type
    assert left.is_valid().equals(right.is_valid())
    assert left.field("label").equals(right.field("label"))
    np.testing.assert_allclose(scores(left), scores(right), atol=atol)


def scores(annotation: pa.Array) -> np.ndarray:
    return np.asarray(annotation.field("score").to_numpy(zero_copy_only=False), np.float32)


def journal_names(output: Path, folder: str) -> list[str]:
    """The names in one of the journal's folders."""
    where = output / "_bert_ray" / folder
    return sorted(path.name for path in where.iterdir()) if where.exists() else []


def receipts(output: Path) -> list[dict]:
    """All receipts of a run."""
    where = output / "_bert_ray" / "receipts"
    return [json.loads((where / name).read_text()) for name in journal_names(output, "receipts")]
