from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bert_ray.errors import JobError, LakeError
from bert_ray.lake import outputs
from bert_ray.lake.journal import Journal


def test_places_that_are_refused(tmp_path: Path) -> None:
    lake = tmp_path / "lake"
    lake.mkdir()
    for output, message in (
        (lake, "same place"),
        (lake / "out", "inside the input"),
        (tmp_path, "inside the output"),
    ):
        with pytest.raises(JobError, match=message):
            outputs.check_place(output, lake)
    (tmp_path / "link").symlink_to(lake)
    with pytest.raises(JobError, match="inside the input"):
        outputs.check_place(tmp_path / "link" / "out", lake)
    (tmp_path / "file").touch()
    with pytest.raises(JobError, match="is a file"):
        outputs.check_place(tmp_path / "file", lake)
    with pytest.raises(LakeError, match="there is no"):
        outputs.check_place(tmp_path / "out", tmp_path / "missing")


def test_places_that_are_taken(tmp_path: Path) -> None:
    lake, output = tmp_path / "lake", tmp_path / "out"
    lake.mkdir()
    assert outputs.check_place(output, lake) == output
    output.mkdir()
    assert outputs.check_place(str(output), lake) == output
    (output / "thesis.doc").touch()
    with pytest.raises(JobError, match=r"not empty.*thesis\.doc"):
        outputs.check_place(output, lake)
    Journal(output).write_run({})
    assert outputs.check_place(output, lake) == output
    # A name that only begins like the input's is beside it, not inside.
    assert outputs.check_place(tmp_path / "lake2", lake) == tmp_path / "lake2"


def test_parts_that_cannot_be_listed_are_not_taken_for_missing(tmp_path: Path) -> None:
    with pytest.raises(LakeError, match="gone cannot be listed: No such file"):
        outputs.parts(tmp_path / "gone")


def test_a_part_is_zstd_and_says_where_it_is_from(tmp_path: Path) -> None:
    batch = pa.record_batch({"id": [1, 2], "text": ["a", None]})
    with outputs.writing(tmp_path, tmp_path / "p", batch.schema, {"bert_ray.task": "classification"}) as writer:
        writer.write(batch)
        writer.write(batch)
    file = pq.ParquetFile(tmp_path / "p")
    assert file.read().to_pydict() == {"id": [1, 2, 1, 2], "text": ["a", None, "a", None]}
    assert file.metadata.row_group(0).column(0).compression == "ZSTD"
    assert file.metadata.num_row_groups == 1
    assert file.metadata.metadata[b"bert_ray.task"] == b"classification"


def test_row_groups_are_of_a_bounded_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "_ROW_GROUP_ROWS", 5)
    batch = pa.record_batch({"id": list(range(3))})
    with outputs.writing(tmp_path, tmp_path / "p", batch.schema, {}) as writer:
        for _ in range(5):
            writer.write(batch)
    meta = pq.read_metadata(tmp_path / "p")
    assert [meta.row_group(index).num_rows for index in range(meta.num_row_groups)] == [6, 6, 3]


def test_no_rows_still_make_a_file_with_the_columns(tmp_path: Path) -> None:
    schema = pa.schema([("id", pa.int64())])
    with outputs.writing(tmp_path, tmp_path / "p", schema, {}):
        pass
    assert pq.read_table(tmp_path / "p").schema.names == ["id"]


def test_a_block_that_fails_leaves_no_whole_file(tmp_path: Path) -> None:
    batch = pa.record_batch({"id": [1]})
    with pytest.raises(RuntimeError), outputs.writing(tmp_path, tmp_path / "p", batch.schema, {}) as writer:
        writer.write(batch)
        raise RuntimeError
    with pytest.raises(pa.ArrowInvalid):
        pq.read_table(tmp_path / "p")


def test_an_output_in_a_delta_table_is_refused(tmp_path: Path) -> None:
    """None could read it: its files are not in the log."""
    lake = tmp_path / "lake"
    lake.mkdir()
    pq.write_table(pa.table({"text": ["a"]}), lake / "a.parquet")
    (tmp_path / "t" / "_delta_log").mkdir(parents=True)
    with pytest.raises(JobError, match=r"lies in the table .*/t, whose log would not know of it"):
        outputs.check_place(tmp_path / "t" / "annotated", lake)
