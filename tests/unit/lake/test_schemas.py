from __future__ import annotations

import pyarrow as pa
import pytest

from bert_ray.lake.schemas import conform, merge, merge_fields, plain

DICTIONARY = pa.dictionary(pa.int8(), pa.string())


@pytest.mark.parametrize(
    ("one", "other", "merged"),
    [
        (pa.int32(), pa.int64(), pa.int64()),
        (pa.null(), pa.string(), pa.string()),
        (pa.string(), pa.large_string(), pa.large_string()),
        (pa.string(), pa.string_view(), pa.string()),
        (DICTIONARY, pa.string(), pa.string()),
        (DICTIONARY, DICTIONARY, DICTIONARY),
        (pa.struct([("x", pa.int8())]), pa.struct([("x", pa.int8()), ("y", pa.int8())]), None),
        (pa.int64(), pa.string(), "conflict"),
        (pa.binary(), pa.string(), "conflict"),
        (pa.timestamp("us", "UTC"), pa.timestamp("us"), "conflict"),
        (pa.decimal128(20, 2), pa.decimal128(24, 4), pa.decimal128(24, 4)),
        (pa.decimal128(20, 2), pa.float64(), "conflict"),
        (pa.float32(), pa.decimal128(9, 2), "conflict"),
        (pa.struct([("x", pa.string())]), pa.struct([("x", pa.binary())]), "conflict"),
        (pa.list_(pa.binary()), pa.list_(pa.string()), "conflict"),
        (pa.list_(pa.null()), pa.list_(pa.string()), pa.list_(pa.string())),
        (pa.map_(pa.string(), pa.decimal128(20, 2)), pa.map_(pa.string(), pa.float64()), "conflict"),
        (pa.map_(pa.string(), pa.binary()), pa.map_(pa.string(), pa.string()), "conflict"),
        (pa.map_(pa.string(), pa.int32()), pa.map_(pa.string(), pa.int64()), pa.map_(pa.string(), pa.int64())),
    ],
)
def test_types_that_meet(one: pa.DataType, other: pa.DataType, merged: pa.DataType | str | None) -> None:
    found = merge_fields(pa.field("a", one), pa.field("a", other))
    if merged == "conflict":
        assert found is None
    else:
        assert found is not None
        assert found.type == (merged or other)


def test_merge_adds_columns_and_leaves_conflicts_alone() -> None:
    first = pa.schema([("id", pa.int32()), ("text", pa.string())])
    second = pa.schema([("text", pa.int64()), ("id", pa.int64()), ("more", pa.string())])
    assert merge(first, second) == pa.schema([("id", pa.int64()), ("text", pa.string()), ("more", pa.string())])


def test_the_writers_own_metadata_goes() -> None:
    field = pa.field("a", pa.int8(), metadata={"PARQUET:field_id": "1", "comment": "kept"})
    found = plain(pa.schema([field], metadata={"org.apache.spark.sql.parquet.row.metadata": "{}"}))
    assert found.metadata is None
    assert found.field("a").metadata == {b"comment": b"kept"}


def test_conform_casts_orders_and_fills() -> None:
    batch = pa.record_batch({"b": pa.array([1, 2], pa.int32()), "a": ["x", "y"]})
    target = pa.schema([("a", pa.large_string()), ("b", pa.int64()), ("day", pa.string()), ("none", pa.float64())])
    found = conform(batch, target, {"day": "mon"})
    assert found.schema == target
    assert found.to_pylist()[1] == {"a": "y", "b": 2, "day": "mon", "none": None}


def test_a_directory_s_value_where_other_files_hold_a_number() -> None:
    batch = pa.record_batch({"a": ["x", "y"]})
    target = pa.schema([("a", pa.string()), ("year", pa.int64())])
    assert conform(batch, target, {"year": "2020"})["year"].to_pylist() == [2020, 2020]
    assert conform(batch, target, {"year": None})["year"].to_pylist() == [None, None]
    with pytest.raises(pa.ArrowInvalid, match="soon"):
        conform(batch, target, {"year": "soon"})
