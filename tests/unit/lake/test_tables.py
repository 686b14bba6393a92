from __future__ import annotations

import datetime as dt
import errno
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bert_ray.errors import LakeError
from bert_ray.lake import tables, units
from bert_ray.lake.outputs import parts
from bert_ray.lake.tables import open_table, parquet_dataset
from bert_ray.lake.units import Unit, open_parquet, partition_values
from bert_ray.model.tokenization import as_strings
from tests.lakes import make_lake


def test_units_are_runs_of_row_groups_up_to_the_limit(tmp_path: Path) -> None:
    table = open_table(make_lake(tmp_path / "lake", partitions=1, files=1, rows=10, group=3))
    assert [(unit.row_groups, unit.rows) for unit in table.units(6)] == [((0, 2), 6), ((2, 4), 4)]
    # A row group is never split, however small the limit.
    assert [unit.rows for unit in table.units(1)] == [3, 3, 3, 1]
    assert [unit.rows for unit in table.units(100)] == [10]


def test_units_together_are_the_table(tmp_path: Path) -> None:
    table = open_table(make_lake(tmp_path / "lake"))
    reader = table.reader()
    ids = [
        value
        for unit in table.units(5)
        for batch in reader.read(unit, ["id"])
        for value in batch.column("id").to_pylist()
    ]
    assert sorted(ids) == list(range(48))


def test_ids_are_the_same_at_every_listing_and_change_with_the_file(tmp_path: Path) -> None:
    lake = make_lake(tmp_path / "lake", partitions=1, files=1)
    first = open_table(lake).units(4)
    assert [unit.id for unit in open_table(lake).units(4)] == [unit.id for unit in first]
    assert len({unit.id for unit in first}) == len(first)
    os.utime(lake / "source=s0" / "f0.parquet", ns=(1, 1))
    assert not {unit.id for unit in open_table(lake).units(4)} & {unit.id for unit in first}


def test_a_unit_survives_json() -> None:
    for groups in (None, (2, 5)):
        unit = Unit.of("a=1/b.parquet", groups, 7, 100, 12)
        assert Unit.from_json(unit.to_json()) == unit


def test_partition_columns_are_strings_of_the_directories(tmp_path: Path) -> None:
    lake = tmp_path / "lake"
    for folder in ("day=2024-01-01/lang=zh%2FCN", "day=2024-01-02/lang=__HIVE_DEFAULT_PARTITION__"):
        (lake / folder).mkdir(parents=True)
        pq.write_table(pa.table({"text": ["a"]}), lake / folder / "x.parquet")
    table = open_table(lake)
    assert table.partitions == ("day", "lang")
    assert table.schema == pa.schema([("text", pa.string()), ("day", pa.string()), ("lang", pa.string())])
    rows = [batch.to_pylist()[0] for unit in table.units(9) for batch in table.reader().read(unit, ["lang", "text"])]
    assert rows == [{"lang": "zh/CN", "text": "a"}, {"lang": None, "text": "a"}]
    assert partition_values("a=1/plain/b=x%20y/f.parquet") == {"a": "1", "b": "x y"}


def test_a_partition_column_that_files_have_too_is_the_files_own(tmp_path: Path) -> None:
    (tmp_path / "source=x").mkdir()
    pq.write_table(pa.table({"text": ["a"], "source": [7]}), tmp_path / "source=x" / "f.parquet")
    table = open_table(tmp_path)
    assert table.partitions == ()
    assert table.schema.field("source").type == pa.int64()


def test_one_file_is_a_table(tmp_path: Path) -> None:
    path = tmp_path / "reviews.parquet"
    pq.write_table(pa.table({"text": ["a", "b"]}), path)
    pq.write_table(pa.table({"text": ["no"]}), tmp_path / "other.parquet")
    assert [unit.path for unit in open_table(path).units(9)] == ["reviews.parquet"]
    assert open_table(f"file://{path}").name == str(path)


def test_which_files_belong(tmp_path: Path) -> None:
    table = pa.table({"text": ["a"]})
    for name in ("a.parquet", "b.PQ", "000000_0", "_hidden.parquet", ".dot.parquet", "_tmp/c.parquet", "d/e.parq"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        pq.write_table(table, tmp_path / name)
    (tmp_path / "README.txt").write_text("about this lake")
    (tmp_path / "loop").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "gone.parquet").symlink_to(tmp_path / "nowhere")  # Its unit will say so.
    os.mkfifo(tmp_path / "pipe.parquet")
    several = open_table(tmp_path)
    lost = {unit.path: unit for unit in several.units(9) if unit.path in ("gone.parquet", "pipe.parquet")}
    for name, why in (("gone.parquet", "is gone"), ("pipe.parquet", "is no file")):
        with pytest.raises(LakeError, match=why):
            list(several.reader().read(lost[name], ["text"]))
        (tmp_path / name).unlink()
    found = ["000000_0", "a.parquet", "b.PQ", "d/e.parq"]
    assert [unit.path for unit in open_table(tmp_path).units(9)] == found
    # As Spark has it: a partition may be of a column whose name begins so.
    (tmp_path / "_year=2026").mkdir()
    pq.write_table(table, tmp_path / "_year=2026" / "f.parquet")
    table_of_two = open_table(tmp_path)
    assert [unit.path for unit in table_of_two.units(9)] == [*found[:1], "_year=2026/f.parquet", *found[1:]]
    assert table_of_two.partitions == ("_year",)
    read = parquet_dataset(tmp_path).to_table()
    assert sorted(map(str, read["_year"].to_pylist())) == ["2026", "None", "None", "None", "None"]


@pytest.mark.parametrize("where", ["t", "my 数据/t", "part=z/t"])
def test_a_delta_table_s_replaced_rows_are_not_read(tmp_path: Path, where: str) -> None:
    deltalake = pytest.importorskip("deltalake")
    path = tmp_path / where
    path.mkdir(parents=True)
    rows = pa.table({"id": [1, 2, 3], "text": ["a", "b", "c"], "part": ["x", "x", "y y"]})
    deltalake.write_deltalake(path, rows, partition_by=["part"])
    deltalake.DeltaTable(path).update(updates={"text": "'B'"}, predicate="id = 2")
    deltalake.DeltaTable(path).delete("id = 1")
    assert len(list(path.rglob("*.parquet"))) > 2
    table = open_table(path)
    assert table.partitions == ("part",)
    columns = ["id", "text", "part"]
    batches = [batch for unit in table.units(9) for batch in table.reader().read(unit, columns)]
    assert sorted(map(str, pa.Table.from_batches(batches).to_pylist())) == sorted(
        map(str, ({"id": 2, "text": "B", "part": "x"}, {"id": 3, "text": "c", "part": "y y"}))
    )
    # As evaluation and training read it: their partitions are the table's own, not those of what it lies in.
    dataset = parquet_dataset(path)
    assert set(dataset.schema.names) == {"id", "text", "part"}
    rows_read = dataset.to_table(columns=["id", "text", "part"]).to_pylist()
    assert sorted(rows_read, key=lambda row: row["id"]) == [
        {"id": 2, "text": "B", "part": "x"},
        {"id": 3, "text": "c", "part": "y y"},
    ]
    deltalake.DeltaTable(path).delete()
    with pytest.raises(LakeError, match="has no rows"):
        open_table(path)


def test_a_part_of_a_delta_table_is_refused(tmp_path: Path) -> None:
    deltalake = pytest.importorskip("deltalake")
    rows = pa.table({"id": [1, 2], "text": ["a", "b"], "part": ["x", "y"]})
    deltalake.write_deltalake(tmp_path / "t", rows, partition_by=["part"])
    for place in (tmp_path / "t" / "part=x", next(tmp_path.glob("t/part=x/*.parquet"))):
        for read in (open_table, parquet_dataset):
            with pytest.raises(LakeError, match=r"lies in the Delta table .*/t, whose log says .*: give that"):
                read(place)
    (tmp_path / "link").symlink_to(tmp_path / "t" / "part=x")
    for read in (open_table, parquet_dataset):
        with pytest.raises(LakeError, match="lies in the Delta table"):
            read(tmp_path / "link")
    # A whole one within another has a log of its own.
    deltalake.write_deltalake(tmp_path / "t" / "own", rows)
    assert len(open_table(tmp_path / "t" / "own").units(9)) == 1
    assert parquet_dataset(tmp_path / "t" / "own").count_rows() == 2


def test_a_delta_table_whose_paths_do_not_say_its_partitions_is_refused(tmp_path: Path) -> None:
    """As `delta.randomizeFilePrefixes` has it."""
    deltalake = pytest.importorskip("deltalake")
    deltalake.write_deltalake(tmp_path, pa.table({"text": ["a"], "part": ["x"]}), partition_by=["part"])
    log = tmp_path / "_delta_log" / "00000000000000000000.json"
    (tmp_path / "part=x").rename(tmp_path / "aB")
    assert "part=x/" in log.read_text()
    log.write_text(log.read_text().replace("part=x/", "aB/"))
    with pytest.raises(LakeError, match=r"the path of aB/.* does not say its part, .*randomizeFilePrefixes"):
        open_table(tmp_path)


def test_a_delta_log_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    deltalake = pytest.importorskip("deltalake")
    deltalake.write_deltalake(tmp_path, pa.table({"text": ["a"]}))
    log = tmp_path / "_delta_log" / "00000000000000000000.json"
    for spoil in (lambda: log.write_text("{"), lambda: (log.unlink(), log.mkdir())):
        spoil()
        with pytest.raises(LakeError, match="cannot be read as a Delta table"):
            open_table(tmp_path)


def test_two_partitions_that_are_links_to_one_directory_are_refused(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "disk" / "f.parquet")
    lake = tmp_path / "lake"
    lake.mkdir()
    (lake / "day=1").symlink_to(tmp_path / "disk")
    assert [unit.path for unit in open_table(lake).units(9)] == ["day=1/f.parquet"]
    (lake / "day=2").symlink_to(tmp_path / "disk")
    with pytest.raises(LakeError, match=r"day=1 and .*day=2 are one directory by way of a link"):
        open_table(lake)
    (lake / "day=2").unlink()
    (lake / "day=2").mkdir()
    (lake / "day=2" / "data").symlink_to(tmp_path / "disk")
    with pytest.raises(LakeError, match=r"day=2/data and .*day=1 are one directory by way of a link"):
        open_table(lake)
    (lake / "day=2" / "data").unlink()
    (lake / "day=2").rmdir()
    # Nor does a link that leads back up lose anything.
    for place in (tmp_path / "disk", lake):
        (tmp_path / "disk" / "up=1").symlink_to(place)
        assert [unit.path for unit in open_table(lake).units(9)] == ["day=1/f.parquet"]
        (tmp_path / "disk" / "up=1").unlink()
    # One more name of a directory that stands there itself, "the latest", is one of its names.
    (lake / "day=1").unlink()
    (tmp_path / "disk").rename(lake / "day=1")
    (lake / "day=latest").symlink_to(lake / "day=1")
    assert [unit.path for unit in open_table(lake).units(9)] == ["day=1/f.parquet"]
    # But met before that, it would have taken the other's rows.
    (lake / "day=0").mkdir()
    (lake / "day=0" / "more").symlink_to(lake / "day=1")
    with pytest.raises(LakeError, match=r"day=0/more and .*day=1 are one directory by way of a link"):
        open_table(lake)


def test_a_link_to_another_file_of_the_table_is_not_read_twice(tmp_path: Path) -> None:
    lake = tmp_path / "lake"
    for day in ("1", "2"):
        (lake / f"day={day}").mkdir(parents=True)
        pq.write_table(pa.table({"text": [f"day {day}"]}), lake / f"day={day}" / "part.parquet")
    pq.write_table(pa.table({"text": ["elsewhere"]}), tmp_path / "elsewhere.parquet")
    (lake / "day=1" / "latest.parquet").symlink_to("part.parquet")
    for place in ("day=1/a=1", "day=2/one"):  # As a cache of files has equal ones.
        (lake / f"{place}.parquet").symlink_to(tmp_path / "elsewhere.parquet")
    texts = ["day 1", "day 2", "elsewhere", "elsewhere"]
    assert sorted(parquet_dataset(lake).to_table()["text"].to_pylist()) == texts
    table = open_table(lake)
    assert sum(unit.rows or 0 for unit in table.units(10)) == 4
    (lake / "day=2" / "first.parquet").symlink_to(lake / "day=1" / "part.parquet")
    for read in (open_table, parquet_dataset):
        with pytest.raises(LakeError, match=r"part\.parquet and .*first\.parquet are one file by way of a link"):
            read(lake)


def test_partitions_that_are_no_numbers_as_numbers_are_written_are_text(tmp_path: Path) -> None:
    """As Arrow has them 0111 is 111 and 0x1F is 31."""
    for code, day, size in (("0111", "1", "5"), ("0112", "2", "0x1F")):
        place = tmp_path / f"code={code}" / f"day={day}" / f"size={size}"
        place.mkdir(parents=True)
        pq.write_table(pa.table({"text": [code]}), place / "part.parquet")
    read = parquet_dataset(tmp_path).to_table().sort_by("text")
    assert read["code"].to_pylist() == read["text"].to_pylist() == ["0111", "0112"]
    assert read["size"].to_pylist() == ["5", "0x1F"]
    assert read["day"].to_pylist() == [1, 2]
    # What the files have too is theirs, whatever the directories make of it.
    for code in ("01", "02"):
        (tmp_path / "own" / f"month={code}").mkdir(parents=True)
        table = pa.table({"text": [code], "month": pa.array([int(code)], pa.int32())})
        pq.write_table(table, tmp_path / "own" / f"month={code}" / "part.parquet")
    assert sorted(parquet_dataset(tmp_path / "own").to_table()["month"].to_pylist()) == [1, 2]


@pytest.mark.parametrize(("log", "kind"), [(".hoodie", "Hudi table"), ("_spark_metadata", "table of a Spark stream")])
def test_tables_of_other_logs_are_refused(tmp_path: Path, log: str, kind: str) -> None:
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "part.parquet")
    (tmp_path / log).mkdir()
    for read in (open_table, parquet_dataset):
        with pytest.raises(LakeError, match=rf"is a {kind}, which is not read"):
            read(tmp_path)
        with pytest.raises(LakeError, match=rf"lies in the {kind} "):
            read(tmp_path / "part.parquet")


def test_a_partition_behind_a_link_to_nothing_is_not_passed_over(tmp_path: Path) -> None:
    """A disk that is not mounted."""
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "f.parquet")
    (tmp_path / "source=s1").symlink_to(tmp_path / "disk2" / "source=s1")
    for read in (open_table, parquet_dataset):
        with pytest.raises(LakeError, match=r"source=s1 is a link to .*disk2/source=s1, which is not there: mount it"):
            _ = read(tmp_path).schema
    with pytest.raises(LakeError, match="mount it"):
        parts(tmp_path)
    (tmp_path / "source=s1").unlink()
    for name, directory in (
        ("2024.01", True),
        ("year", True),
        ("day=1.txt", False),
        ("x.7z", False),
        ("a.log.1", False),
    ):
        (tmp_path / name).symlink_to(tmp_path / "nowhere")
        if directory:
            with pytest.raises(LakeError, match="mount it"):
                open_table(tmp_path)
        else:
            assert [unit.path for unit in open_table(tmp_path).units(9)] == ["f.parquet"]
        (tmp_path / name).unlink()


def test_a_file_that_does_not_fit_others_says_so(tmp_path: Path) -> None:
    """Numbers that floats do not hold, where another file has floats."""
    pq.write_table(pa.table({"id": [2**53 + 1], "text": ["a"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"id": [0.5], "text": ["b"]}), tmp_path / "b.parquet")
    table = open_table(tmp_path)
    first, second = table.units(9)
    with pytest.raises(
        LakeError, match=r"a\.parquet: column 'id' is int64, but double in the table, .* write those anew"
    ):
        list(table.reader().read(first, ["id", "text"]))
    assert [batch["id"].to_pylist() for batch in table.reader().read(second, ["id", "text"])] == [[0.5]]
    assert [batch["text"].to_pylist() for batch in table.reader().read(first, ["text"])] == [["a"]]


def test_a_column_whose_name_is_no_utf_8_is_one_files_fault(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": ["a"], "caffee": [1]}), tmp_path / "b.parquet", store_schema=False)
    raw = (tmp_path / "b.parquet").read_bytes()
    assert raw.count(b"caffee") >= 1
    (tmp_path / "b.parquet").write_bytes(raw.replace(b"caffee", b"caff\xe9e"[:6]))
    table = open_table(tmp_path)
    assert table.schema.names == ["text"]
    good, bad = table.units(9)
    assert [batch["text"].to_pylist() for batch in table.reader().read(good, ["text"])] == [["a"]]
    with pytest.raises(LakeError, match=r"b\.parquet"):
        list(table.reader().read(bad, ["text"]))


def test_an_iceberg_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "metadata").mkdir()
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "data" / "f.parquet")
    assert len(open_table(tmp_path).units(9)) == 1
    (tmp_path / "metadata" / "00001-ab.metadata.json").write_text("{}")
    for read in (open_table, parquet_dataset):
        with pytest.raises(LakeError, match="is an Iceberg table, which is not read"):
            read(tmp_path)
        with pytest.raises(LakeError, match="lies in the Iceberg table"):
            read(tmp_path / "data")
    (tmp_path / "metadata" / "00001-ab.metadata.json").rename(tmp_path / "metadata" / "reviews.metadata.json")
    assert len(open_table(tmp_path / "data").units(9)) == 1


def test_a_store_that_is_not_read_is_named() -> None:
    with pytest.raises(LakeError, match="s3 stores are not read"):
        open_table("s3://bucket/lake")


def test_a_changed_file_is_told(tmp_path: Path) -> None:
    lake = make_lake(tmp_path / "lake", partitions=1, files=1)
    table = open_table(lake)
    unit = table.units(99)[0]
    pq.write_table(pa.table({"id": [1], "text": ["other"]}), lake / unit.path)
    with pytest.raises(LakeError, match=r"f0\.parquet changed"):
        list(table.reader().read(unit, ["id"]))
    unit = open_table(lake).units(99)[0]
    rows = table.reader().read(unit, ["id"])
    assert next(rows).num_rows == 1
    os.utime(lake / unit.path, ns=(0, unit.modified_ns + 1))
    with pytest.raises(LakeError, match=r"f0\.parquet changed"):  # Also while it is read.
        next(rows)
    (lake / unit.path).unlink()
    with pytest.raises(LakeError, match=r"f0\.parquet is gone"):
        list(table.reader().read(unit, ["id"]))


def test_batches_are_small_where_rows_are_large(tmp_path: Path) -> None:
    path = tmp_path / "big.parquet"
    big = [os.urandom(2 * 2**20).hex() for _ in range(20)]  # 4 MiB a row
    pq.write_table(pa.table({"text": big}), path, compression="none", use_dictionary=False)
    table = open_table(path)
    sizes = [batch.num_rows for batch in table.reader().read(table.units(99)[0], ["text"])]
    assert sum(sizes) == 20
    assert max(sizes) <= 8
    # Nor are those that show how large rows are too many at once.
    pq.write_table(pa.table({"text": big * 5}), path, compression="none", use_dictionary=False)
    reader, taken = pq.ParquetFile(path), []

    class Counting:
        metadata = reader.metadata

        def iter_batches(self, batch_size: int, **more: Any) -> Any:
            taken.append(batch_size)
            return reader.iter_batches(batch_size, **more)

    assert units._batch_rows(Counting(), 0, ["text"]) <= 8  # type: ignore[arg-type]
    assert max(taken) <= 8
    # A text that many rows share stands in the file once.
    shared = pa.table({"text": [os.urandom(2**19).hex()] * 500})  # 1 MiB a row
    pq.write_table(shared, path)
    assert path.stat().st_size < 3 * 2**20
    table = open_table(path)
    sizes = [batch.num_rows for batch in table.reader().read(table.units(999)[0], ["text"])]
    assert sum(sizes) == 500
    assert max(sizes) <= 32


def test_a_column_with_a_dot_is_not_a_field_of_another(tmp_path: Path) -> None:
    path = tmp_path / "f.parquet"
    pq.write_table(pa.table({"a.b": ["plain"], "a": [{"b": "nested"}], "c": [1]}), path)
    table = open_table(path)
    batch = next(table.reader().read(table.units(9)[0], ["a.b"]))
    assert batch.to_pylist() == [{"a.b": "plain"}]


def test_types_that_parquet_has_by_other_names(tmp_path: Path) -> None:
    """INT96 timestamps of any year, UUIDs and JSON: planned and read alike, and unchanged."""
    times = [dt.datetime(9999, 12, 31), dt.datetime(1, 1, 1), dt.datetime(2020, 2, 29, 12, 30, 1, 5)]
    identities = [bytes([number]) * 16 for number in range(3)]
    table = pa.table(
        {
            "time": pa.array(times, pa.timestamp("us")),
            "id": pa.array(identities, pa.uuid()),
            "json": pa.array(['{"a": 1}', None, "[]"], pa.json_()),
        }
    )
    path = tmp_path / "f.parquet"
    pq.write_table(table, path, use_deprecated_int96_timestamps=True, store_schema=False)
    opened = open_table(path)
    (batch,) = opened.reader().read(opened.units(9)[0], ["time", "id", "json"])
    assert batch.schema.equals(opened.schema)
    assert batch.column("time").to_pylist() == times
    assert batch.column("id").cast(pa.binary(16)).to_pylist() == identities
    assert as_strings(batch.column("json"), "json").to_pylist() == ['{"a": 1}', None, "[]"]


def test_a_file_that_cannot_be_looked_into_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hive's files have no suffix: what they are is told by their first bytes."""
    for name in ("000000_0", "000001_0"):
        pq.write_table(pa.table({"text": ["a"]}), tmp_path / name)
    plain = Path.open

    def closed(path: Path, *arguments: Any, **more: Any) -> Any:
        if path.name == "000001_0":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return plain(path, *arguments, **more)

    monkeypatch.setattr(Path, "open", closed)
    assert [unit.path for unit in open_table(tmp_path).units(9)] == ["000000_0", "000001_0"]


def test_a_file_that_planning_could_not_read_waits_for_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its columns are not in the table's schema: they would be missing in what is written, and nobody would know."""
    lake = make_lake(tmp_path / "lake", partitions=1, files=2)
    with monkeypatch.context() as patch:
        plain, failed = open_parquet, []

        def once(file: Any) -> Any:
            if not failed:
                failed.append(True)
                raise OSError(errno.EIO, "I/O error")
            return plain(file)

        patch.setattr(tables, "open_parquet", once)
        table = open_table(lake)
        unread = next(unit for unit in table.units(99) if unit.row_groups is None)
    assert failed
    with pytest.raises(LakeError, match="could not be read when the run was planned, and now it can: run again"):
        list(table.reader().read(unread, ["id"]))
