from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bert_ray.errors import ColumnError, JobError, LakeError
from bert_ray.training.corpus.job import ReadingOptions
from bert_ray.training.corpus.sources import Part, open_sources


def read(place: Path, columns: list[str], **options: Any) -> tuple[list[str | None], int]:
    (source,) = open_sources([str(place)], columns, ReadingOptions(**options))
    reader, texts, replaced = source.reader(), [], 0
    for part in source.parts(0, 1000, 2**20):
        assert Part.from_json(part.to_json()) == part
        for some, bad in reader.read(part):
            texts += some
            replaced += bad
    return texts, replaced


def test_every_column_that_a_table_has(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a", None], "more": ["b", "c"], "n": [1, 2]}), tmp_path / "a.parquet")
    assert read(tmp_path, ["text", "more", "other"])[0] == ["a", None, "b", "c"]
    with pytest.raises(ColumnError, match="has no column 'body', it has text, more, n: name"):
        read(tmp_path, ["body"])
    with pytest.raises(ColumnError, match="column 'n' is int64, not text"):
        read(tmp_path, ["n"])


def test_a_place_within_another_is_not_read_twice(tmp_path: Path) -> None:
    (tmp_path / "lake" / "day=1").mkdir(parents=True)
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "lake" / "day=1" / "f.parquet")
    (tmp_path / "lake" / "notes.txt").write_text("b\n")
    (tmp_path / "other").symlink_to(tmp_path / "lake" / "day=1")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "more").symlink_to(tmp_path / "lake")
    (tmp_path / "lake" / "_held").mkdir()
    pq.write_table(pa.table({"text": ["c"]}), tmp_path / "lake" / "_held" / "g.parquet")
    whole = str(tmp_path / "lake")
    assert len(open_sources([whole, str(tmp_path / "lake" / "_held")], ["text"], ReadingOptions())) == 2
    for inner in (tmp_path / "lake" / "day=1", tmp_path / "other", tmp_path / "lake" / "." / "day=1" / "f.parquet"):
        for places in ([whole, str(inner)], [str(inner), whole]):
            with pytest.raises(JobError, match=r"input has .*f\.parquet twice, in .* and in .*: leave out"):
                open_sources(places, ["text"], ReadingOptions())
    # By a link within the one to the other, too.
    with pytest.raises(JobError, match="twice"):
        open_sources([str(tmp_path / "linked"), whole], ["text"], ReadingOptions())
    # What the one passes over, the other may read. Text beside a table's files is none of the table's documents.
    assert len(open_sources([whole, str(tmp_path / "lake" / "notes.txt")], ["text"], ReadingOptions())) == 2


def test_text_beside_a_tables_files_is_told_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "f.parquet")
    (tmp_path / "notes.txt").write_text("b\n")
    assert read(tmp_path, ["text"])[0] == ["a"]
    assert "it holds 1 files of plain text too, such as notes.txt, which are left out" in capsys.readouterr().err
    assert read(tmp_path, ["text"], format="parquet")[0] == ["a"]
    assert capsys.readouterr().err == ""


def test_bytes_that_are_no_utf_8(tmp_path: Path) -> None:
    raw = pa.array([b"good", b"caf\xe9", None], pa.binary())
    bad = pa.StringArray.from_buffers(len(raw), raw.buffers()[1], raw.buffers()[2], raw.buffers()[0], raw.null_count)
    pq.write_table(pa.table({"text": bad}), tmp_path / "a.parquet")
    with pytest.raises(LakeError, match=r"a\.parquet: column 'text' holds bytes that are no UTF-8 \(0xe9 in row 1 "):
        read(tmp_path, ["text"])
    assert read(tmp_path, ["text"], bad_bytes="replace") == (["good", "caf\ufffd", None], 1)


def test_delta_gives_the_active_files_alone(tmp_path: Path) -> None:
    deltalake = pytest.importorskip("deltalake")
    place = tmp_path / "table"
    for text, mode in (("old", "overwrite"), ("new", "overwrite"), ("more", "append")):
        deltalake.write_deltalake(
            place, pa.table({"text": [text], "day of": ["a b"]}), mode=mode, partition_by=["day of"]
        )
    assert len(list(place.rglob("*.parquet"))) == 3
    assert sorted(read(place, ["text"])[0]) == ["more", "new"]
    # Also where its files are said to be what they are: what was deleted does not come back.
    assert sorted(read(place, ["text"], format="parquet")[0]) == ["more", "new"]


def test_a_delta_table_that_its_files_do_not_tell_is_refused(tmp_path: Path) -> None:
    deltalake = pytest.importorskip("deltalake")
    deltalake.write_deltalake(
        tmp_path / "t", pa.table({"text": ["a"]}), configuration={"delta.enableDeletionVectors": "true"}
    )
    with pytest.raises(LakeError, match="deletionVectors, which is not read"):
        read(tmp_path / "t", ["text"])


def test_an_iceberg_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t" / "metadata").mkdir(parents=True)
    (tmp_path / "t" / "metadata" / "1.metadata.json").write_text("{}")
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "t" / "f.parquet")
    with pytest.raises(LakeError, match="Iceberg"):
        read(tmp_path / "t", ["text"])


def test_a_delta_table_whose_columns_have_other_names_in_its_files_is_refused(tmp_path: Path) -> None:
    """As an upgrade by `delta.columnMapping.mode` leaves it: reader version 2, which lists no features."""
    deltalake = pytest.importorskip("deltalake")
    deltalake.write_deltalake(tmp_path / "t", pa.table({"text": ["a"]}))
    (log,) = (tmp_path / "t" / "_delta_log").glob("*.json")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    for line in lines:
        if "protocol" in line:
            line["protocol"] = {"minReaderVersion": 2, "minWriterVersion": 5}
        if "metaData" in line:
            column = {"delta.columnMapping.id": 1, "delta.columnMapping.physicalName": "text"}
            schema = json.loads(line["metaData"]["schemaString"])
            schema["fields"][0] |= {"name": "body", "metadata": column}
            line["metaData"]["schemaString"] = json.dumps(schema)
            line["metaData"]["configuration"]["delta.columnMapping.mode"] = "name"
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert deltalake.DeltaTable(tmp_path / "t").protocol().reader_features is None
    with pytest.raises(LakeError, match="columnMapping, which is not read"):
        read(tmp_path / "t", ["text"])
