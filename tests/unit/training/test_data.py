"""Labelled tables: each bad input has a stated outcome, found before anything is trained."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from bert_ray.errors import BertRayError, ColumnError, JobError, LakeError
from bert_ray.evaluation.rows import open_table
from bert_ray.model.bundle import load_bundle
from bert_ray.model.card import Card
from bert_ray.model.tasks import get_task
from bert_ray.model.tasks.classification import label_texts
from bert_ray.training import data
from bert_ray.training.data import read_columns, read_labelled
from bert_ray.training.job import DataOptions, TrainJob
from bert_ray.training.launch import prepare
from bert_ray.training.order import held_out

Jobs = Callable[..., TrainJob]
CLASSIFICATION = get_task(Card(task="classification"))


def write(path: Path, **columns: object) -> DataOptions:
    pq.write_table(pa.table(columns), path)
    return DataOptions(train=str(path), validation_fraction=0.5)


@pytest.fixture
def prepared(job_for: Jobs, tmp_path: Path) -> Callable[..., object]:
    """Prepare a table given by its columns."""

    def run(settings: dict[str, object] | None = None, **columns: object) -> object:
        job = job_for(data=write(tmp_path / "table.parquet", **columns), **(settings or {}))
        return prepare(job, load_bundle(job.model))

    return run


def texts(rows: int) -> list[str]:
    return [f"the film number {row} was good" for row in range(rows)]


def test_null_and_blank_rows_are_left_out_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "table.parquet"
    write(path, text=["a", None, "", "  \n", "b", "c"], label=[0, 1, 1, 0, None, 1])
    table = read_labelled(str(path), CLASSIFICATION)
    assert table.inputs[0].to_pylist() == ["a", "c"]
    assert table.truth[0].to_pylist() == [0, 1]
    assert "4 of 6 rows left out" in table.notes[0]
    assert "1 with no text" in table.notes[0]
    assert "2 with a blank text" in table.notes[0]
    assert "1 with no label" in table.notes[0]


def test_of_a_delta_table_the_rows_that_count(tmp_path: Path) -> None:
    deltalake = pytest.importorskip("deltalake")
    path = str(tmp_path / "t")
    deltalake.write_deltalake(path, pa.table({"text": ["a", "b"], "label": ["x", "y"]}))
    deltalake.DeltaTable(path).delete("text = 'a'")
    names = {"text": "text", "label": "label"}
    assert read_columns(path, names, key="columns").to_pylist() == [{"text": "b", "label": "y"}]
    assert open_table(path).to_table().to_pylist() == [{"text": "b", "label": "y"}]
    rows = {"text": [f"text {row}" for row in range(20)] + [None], "label": ["x", "y"] * 10 + ["x"]}
    deltalake.write_deltalake(path, pa.table(rows), mode="append")
    table = read_labelled(path, get_task(Card(task="classification")), None)
    assert len(table.inputs[0]) == 21
    assert set(table.truth[0].to_pylist()) == {"x", "y"}


@pytest.mark.parametrize("most", [2**31 - 1, 10])
def test_more_text_than_arrow_s_strings_hold(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(data, "_MOST_STRING_BYTES", most)
    column = pa.chunked_array([["a good film"], ["bad food", None]])
    array = data.one_array(column)
    assert array.type == (pa.large_string() if most == 10 else pa.string())
    assert array.to_pylist() == ["a good film", "bad food", None]


def test_a_table_on_a_store(object_store: str) -> None:
    store = fs.S3FileSystem(endpoint_override=object_store, scheme="http", allow_bucket_creation=True)
    store.create_dir("lake/source=a")
    pq.write_table(pa.table({"text": ["a", "b"], "label": [0, 1]}), "lake/source=a/part.parquet", filesystem=store)
    where = f"endpoint_override={object_store}&scheme=http"
    assert read_labelled(f"s3://lake?{where}", CLASSIFICATION).inputs[0].to_pylist() == ["a", "b"]
    # Arrow alone passes over what begins with _, a partition too, and has 0111 for 111.
    for code in ("0111", "0112"):
        place = f"lake/coded/_code={code}/part.parquet"
        pq.write_table(pa.table({"text": [code], "label": [0]}), place, filesystem=store)
    coded = read_labelled(f"s3://lake/coded?{where}", CLASSIFICATION, {"text": "_code"})
    assert coded.inputs[0].to_pylist() == ["0111", "0112"]
    for log in ("delta/_delta_log/0.json", "ice/metadata/v1.metadata.json", "hudi/.hoodie/hoodie.properties"):
        with store.open_output_stream(f"lake/{log}") as stream:
            stream.write(b"{}")
    for table, kind in (("delta", "Delta"), ("ice", "Iceberg"), ("hudi", "Hudi")):
        pq.write_table(pa.table({"text": ["a"], "label": [0]}), f"lake/{table}/day=1/p.parquet", filesystem=store)
        for part in ("", "/day=1"):
            with pytest.raises(LakeError, match=rf"lake/{table} is a {kind} table on a store, which is not read"):
                read_labelled(f"s3://lake/{table}{part}?{where}", CLASSIFICATION)
    with pytest.raises(JobError, match=r"s3://lake/none.*does not exist"):
        read_labelled(f"s3://lake/none?{where}", CLASSIFICATION)
    with pytest.raises(JobError, match=r"s3://lake\S* cannot be reached"):
        read_labelled("s3://lake?endpoint_override=127.0.0.1:9&scheme=http&region=us-east-1", CLASSIFICATION)
    for wrong in (f"s3://lake?{where}&timeout=1", "gopher://lake"):
        with pytest.raises(JobError, match="is no address of a store that is known"):
            read_labelled(wrong, CLASSIFICATION)


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([0, 1] * 10, ["negative", "positive"]),
        ([False, True] * 10, ["negative", "positive"]),
        (["negative", "positive"] * 10, ["negative", "positive"]),
        (["spam", "ham"] * 10, ["ham", "spam"]),
        (pa.array(["spam", "ham"] * 10).dictionary_encode(), ["ham", "spam"]),
        ([1, 2, 3, 4] * 5, ["1", "2", "3", "4"]),
    ],
)
def test_labels_of_every_type(prepared: Callable[..., object], labels: object, names: list[str]) -> None:
    card, data, _ = prepared(text=texts(20), label=labels)
    assert card.labels == names
    assert set(data.train.targets.values) | set(data.validation.targets.values) == set(range(len(names)))


def test_integer_labels_are_positions_in_the_jobs_labels(prepared: Callable[..., object]) -> None:
    card, data, _ = prepared({"labels": ["no", "yes", "perhaps"]}, text=texts(20), label=[0, 1] * 10)
    assert card.labels == ["no", "yes", "perhaps"]
    assert set(data.train.targets.values) == {0, 1}


@pytest.mark.parametrize(
    ("columns", "error", "message"),
    [
        ({"text": ["a", "b"], "lable": [0, 1]}, ColumnError, "no column 'label'; did you mean 'lable'"),
        ({"sentence": ["a", "b"], "label": [0, 1]}, ColumnError, r"no column 'text'.*data\.columns\.text"),
        ({"text": [1, 2], "label": [0, 1]}, ColumnError, "not text"),
        ({"text": ["a", "b"], "label": [0.5, 1.0]}, ColumnError, "strings, integers or booleans"),
        ({"text": ["a", "b"], "label": [1, 1]}, ColumnError, "one label only"),
        ({"text": ["a", "b"], "label": pa.nulls(2)}, JobError, "null in all 2 rows"),
        ({"text": pa.array([], pa.string()), "label": pa.array([], pa.int64())}, JobError, "no rows"),
        ({"text": ["", None], "label": [0, 1]}, JobError, "none of its 2 rows"),
        ({"text": ["same", "same"], "label": [0, 1]}, JobError, "validation_fraction"),
        ({"text": texts(100), "label": [f"id {row}" for row in range(100)]}, ColumnError, "looks like no label"),
    ],
)
def test_bad_tables_are_errors_that_say_what_to_do(
    prepared: Callable[..., object], columns: dict[str, object], error: type[BertRayError], message: str
) -> None:
    with pytest.raises(error, match=message):
        prepared(**columns)


def test_a_label_that_the_job_does_not_list_is_named(prepared: Callable[..., object]) -> None:
    with pytest.raises(ColumnError, match=r"table\.parquet: unknown labels \['perhaps'\].*'no', 'yes'"):
        prepared({"labels": ["no", "yes"]}, text=texts(20), label=["no", "yes", "yes", "perhaps"] * 5)


def test_one_label_left_to_train_on_is_an_error(prepared: Callable[..., object]) -> None:
    rows = texts(40)
    out = held_out(rows, 0.5)
    assert out.any() and not out.all()
    with pytest.raises(JobError, match=r"in the training rows: it has one label only \('no'\)"):
        prepared(text=rows, label=["yes" if aside else "no" for aside in out])


def test_labels_that_no_training_row_has_are_told(prepared: Callable[..., object]) -> None:
    """One row a label: those of the held-out rows are never seen in training."""
    rows = texts(20)
    labels = [f"label {row:02}" for row in range(20)]
    unseen = [label for label, aside in zip(labels, held_out(rows, 0.5), strict=True) if aside]
    assert 5 < len(unseen) < 15
    card, data, notes = prepared(text=rows, label=labels)
    assert card.labels == labels
    assert len(data.train) + len(data.validation) == 20
    (note,) = notes
    assert f"no training row has {', '.join(map(repr, unseen[:5]))}, …" in note
    assert f"({len(unseen)} of 20 labels)" in note
    # A label that the job lists and no row has is told, too; positions say nothing about names.
    assert "no training row has 'perhaps'" in prepared({"labels": ["no", "perhaps", "yes"]}, **no_and_yes())[-1][0]
    assert prepared({"labels": ["no", "perhaps", "yes"]}, text=texts(20), label=[0, 2] * 10)[-1] == []
    assert prepared(**no_and_yes())[-1] == []


def no_and_yes() -> dict[str, object]:
    return {"text": texts(20), "label": ["no", "yes"] * 10}


def test_a_language_that_the_vocabulary_cannot_spell_is_told(prepared: Callable[..., object]) -> None:
    """More than a third of the tokens unknown: each of these characters is one, and unknown to the tiny vocabulary."""
    labels = ["no", "yes"] * 20
    (note,) = prepared(text=[f"味道很好，送餐快 {row}" for row in range(40)], label=labels)[-1]
    assert re.search(r"table\.parquet: text: (8|9)\d% of the tokens are unknown to the model's vocabulary", note)
    assert "pretrained on this language" in note
    # Six words known to one that is not: less than a third.
    assert prepared(text=[f"the film was very good {row} 好" for row in range(40)], label=labels)[-1] == []


def test_files_that_are_missing_or_no_parquet(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="does not exist"):
        read_labelled(str(tmp_path / "none.parquet"), CLASSIFICATION)
    (tmp_path / "empty").mkdir()
    with pytest.raises(JobError, match="no Parquet file"):
        read_labelled(str(tmp_path / "empty"), CLASSIFICATION)
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(JobError, match=r"torn\.parquet cannot be read as Parquet"):
        read_labelled(str(tmp_path / "torn.parquet"), CLASSIFICATION)


def test_a_partitioned_directory_gives_the_label_from_its_paths(tmp_path: Path) -> None:
    for label in ("no", "yes"):
        (tmp_path / f"label={label}").mkdir()
        pq.write_table(pa.table({"text": [f"a {label}", f"b {label}"]}), tmp_path / f"label={label}" / "part.parquet")
    table = read_labelled(str(tmp_path), CLASSIFICATION)
    assert sorted(table.truth[0].to_pylist()) == ["no", "no", "yes", "yes"]


def test_texts_in_both_training_and_validation_are_told(job_for: Jobs, tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", text=texts(6), label=[0, 1] * 3)
    write(tmp_path / "validation.parquet", text=[*texts(2), "new"], label=[0, 1, 0])
    data = DataOptions(train=str(tmp_path / "train.parquet"), validation=str(tmp_path / "validation.parquet"))
    job = job_for(data=data)
    _, prepared_data, notes = prepare(job, load_bundle(job.model))
    assert any("2 of the 3 rows" in note for note in notes)
    assert len(prepared_data.train) == 6
    assert prepared_data.baseline == pytest.approx(2 / 3)


def test_a_pair_counts_as_known_where_both_texts_stand_in_one_row(job_for: Jobs, tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", text=["a", "b", "c"], text_pair=["x", "y", "z"], label=[0.0, 1.0, 2.0])
    write(tmp_path / "validation.parquet", text=["a", "b", "c", "d"], text_pair=["y", "y", "x", "z"], label=[0.0] * 4)
    data = DataOptions(train=str(tmp_path / "train.parquet"), validation=str(tmp_path / "validation.parquet"))
    job = job_for(data=data, task="regression")
    notes = prepare(job, load_bundle(job.model))[2]
    assert [note.partition(" rows")[0] for note in notes if "also stand" in note] == ["1 of the 4"]


def test_a_validation_label_unknown_to_training_names_the_file(job_for: Jobs, tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", text=texts(6), label=["a", "b"] * 3)
    write(tmp_path / "validation.parquet", text=["x", "y"], label=["a", "c"])
    data = DataOptions(train=str(tmp_path / "train.parquet"), validation=str(tmp_path / "validation.parquet"))
    job = job_for(data=data)
    with pytest.raises(ColumnError, match=r"validation\.parquet.*'c'"):
        prepare(job, load_bundle(job.model))


def test_a_column_cannot_be_learned_from_itself(tmp_path: Path) -> None:
    path = tmp_path / "table.parquet"
    write(path, text=texts(6))
    with pytest.raises(JobError, match="from itself"):
        read_labelled(str(path), CLASSIFICATION, {"label": "text"})
    with pytest.raises(ColumnError, match="names 'txt'; task classification learns from text, label"):
        read_labelled(str(path), CLASSIFICATION, {"txt": "text"})


def test_max_length_beyond_the_models_positions_is_refused(job_for: Jobs) -> None:
    job = job_for(max_length=100_000)
    with pytest.raises(JobError, match="at most 512"):
        prepare(job, load_bundle(job.model))


def test_a_label_that_is_the_text_is_told(tmp_path: Path) -> None:
    path = tmp_path / "table.parquet"
    write(path, text=["good", "bad", "good", "so so"], label=["good", "bad", "good", "bad"])
    notes = read_labelled(str(path), CLASSIFICATION).notes
    assert len(notes) == 1
    assert "in 3 of 4 rows column 'label' is the text in 'text'" in notes[0]
    write(path, text=["good", "a", "b", "c"], label=["good", "bad", "good", "bad"])
    assert read_labelled(str(path), CLASSIFICATION).notes == []


def test_a_directory_has_the_columns_of_all_its_files(tmp_path: Path) -> None:
    """pandas writes a column without a value as null, and the first file may lack one."""
    place = tmp_path / "lake" / "part=x"
    place.mkdir(parents=True)
    pq.write_table(pa.table({"text": ["a", "b"], "label": pa.nulls(2)}), place / "a.parquet")
    pq.write_table(pa.table({"text": ["c"]}), place / "b.parquet")
    pq.write_table(pa.table({"label": ["no", "yes"], "text": ["d", "e"]}), place / "c.parquet")
    columns = {"text": "text", "label": "label", "part": "part"}
    found = read_columns(str(tmp_path / "lake"), columns, key="data.columns")
    assert found["text"].to_pylist() == ["a", "b", "c", "d", "e"]
    assert found["label"].to_pylist() == [None, None, None, "no", "yes"]
    assert found["part"].to_pylist() == ["x"] * 5
    pq.write_table(pa.table({"label": [[1]], "text": ["f"]}), place / "d.parquet")
    with pytest.raises(JobError, match=r"lake cannot be read as Parquet: .*label"):
        read_columns(str(tmp_path / "lake"), columns, key="data.columns")


def test_bytes_that_are_no_text_are_no_labels(tmp_path: Path) -> None:
    raw = pa.array([b"n\xe9gatif", b"positif"] * 5, pa.binary())
    wrong = pa.StringArray.from_buffers(10, *pa.array(raw).buffers()[1:])
    for labels in (raw, wrong):
        pq.write_table(pa.table({"text": [f"t {row}" for row in range(10)], "label": labels}), tmp_path / "t.parquet")
        with pytest.raises(ColumnError, match=r"the label column has bytes that are no UTF-8|label column is binary"):
            label_texts(pq.read_table(tmp_path / "t.parquet")["label"].combine_chunks())
