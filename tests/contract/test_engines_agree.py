"""Promise 3: the same table through local, Ray and Spark gives the same columns, in bulk and in a pipeline."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from bert_ray.errors import ColumnError
from bert_ray.inference import bulk, local
from bert_ray.inference.job import AnnotateJob
from tests.lakes import assert_same_table, make_lake, read_output

TEXTS = ["the film was good", None, "", "  \t ", "terrible service", "nul \x00 inside", "émoji 🎬🍿 𝔘", "word " * 700]


@pytest.fixture(scope="module")
def table() -> pa.Table:
    return pa.table({"id": list(range(len(TEXTS))), "text": pa.array(TEXTS, pa.string())})


@pytest.fixture(scope="module")
def ray_dataset(ray_session: None) -> Any:
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    return ray.data.from_arrow


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_lake(tmp_path_factory.mktemp("lake") / "lake")


def bulk_job(lake: Path, model: Path, output: Path, **more: Any) -> AnnotateJob:
    return AnnotateJob(input=str(lake), model=str(model), output=str(output), unit_rows=8, name="annotation", **more)


# Without scores: the fault tests, whose tables both engines write.
@pytest.mark.parametrize("engine", ["ray", "spark"])
def test_bulk_classification(
    engine: str, lake: Path, tiny_bundle: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue({"ray": "ray_session", "spark": "spark"}[engine])
    here = bulk_job(lake, tiny_bundle, tmp_path / "local", scores=True)
    there = dataclasses.replace(here, engine=engine, output=str(tmp_path / engine))
    summaries = [bulk.run(job) for job in (here, there)]
    assert [(summary.exit_status, summary.rows, summary.done) for summary in summaries] == [(0, 48, 8)] * 2
    one, other = read_output(tmp_path / "local"), read_output(tmp_path / engine)
    assert_same_table(one, other, "annotation")
    scores = pa.map_(pa.string(), pa.float32())
    assert one.schema.field("annotation").type == pa.struct(
        [("label", pa.string()), ("score", pa.float32()), ("scores", scores)]
    )
    # The very same files, too: a run may change engines in the middle.
    names = [sorted(path.name for path in (tmp_path / run).rglob("part-*")) for run in ("local", engine)]
    assert names[0] == names[1]


# On Spark every task is written in bulk: test_every_task.py.
def test_bulk_embedding_on_ray(lake: Path, tiny_encoder: Path, tmp_path: Path, ray_session: None) -> None:
    # One worker: that several agree, the test above shows.
    here = bulk_job(lake, tiny_encoder, tmp_path / "local", workers=1)
    bulk.run(here)
    bulk.run(dataclasses.replace(here, engine="ray", output=str(tmp_path / "ray")))
    one, other = (read_output(tmp_path / run)["annotation"].combine_chunks() for run in ("local", "ray"))
    assert one.type == other.type == pa.list_(pa.float32(), 32)
    np.testing.assert_allclose(one.flatten(), other.flatten(), atol=1e-5)


def test_bulk_of_another_task_with_options_and_columns_on_ray(
    tmp_path: Path, tiny_encoder: Path, ray_session: None
) -> None:
    lake = make_lake(tmp_path / "lake", files=1)
    labels = {"film": "a film that was seen", "food": "food that was eaten"}
    more = {"task": "zero-shot", "options": {"labels": labels, "scores": True}, "columns": {"text": "text"}}
    here = bulk_job(lake, tiny_encoder, tmp_path / "local", workers=1, **more)
    there = dataclasses.replace(here, engine="ray", output=str(tmp_path / "ray"))
    assert [bulk.run(job).exit_status for job in (here, there)] == [0, 0]
    one, other = read_output(tmp_path / "local"), read_output(tmp_path / "ray")
    assert_same_table(one, other, "annotation")
    assert {row["label"] for row in one["annotation"].to_pylist() if row} <= set(labels)


def test_pipeline_on_ray(table: pa.Table, ray_dataset: Any, tiny_bundle: Path) -> None:
    from bert_ray.inference import ray_data

    expected = local.annotate(table, str(tiny_bundle), name="annotation")
    settings = {"name": "annotation", "batch_rows": 3, "workers": 1}
    dataset = ray_data.annotate(ray_dataset(table), str(tiny_bundle), **settings)
    dataset = dataset.materialize()  # Or schema and rows would each be computed, with actors of their own.
    assert dataset.schema().base_schema == expected.schema
    assert_same_table(expected, collected(dataset).sort_by("id"), "annotation")


def test_pipeline_on_ray_of_no_rows(table: pa.Table, ray_dataset: Any, tiny_bundle: Path) -> None:
    from bert_ray.inference import ray_data

    settings = {"name": "annotation", "workers": 1}
    dataset = ray_data.annotate(ray_dataset(table.slice(0, 0)), str(tiny_bundle), **settings).materialize()
    assert dataset.schema().names == ["id", "text", "annotation"]
    assert dataset.count() == 0
    filtered = ray_dataset(table).filter(fn=lambda row: False)
    assert collected(ray_data.annotate(filtered, str(tiny_bundle), **settings)).num_rows == 0


def test_pipeline_on_ray_names_a_missing_column(table: pa.Table, ray_dataset: Any, tiny_bundle: Path) -> None:
    from bert_ray.inference import ray_data

    with pytest.raises(ColumnError, match="'text'"):
        ray_data.annotate(ray_dataset(table), str(tiny_bundle), column="texts")


def test_pipeline_on_ray_over_blocks_of_pandas(table: pa.Table, ray_session: None, tiny_bundle: Path) -> None:
    import ray

    from bert_ray.inference import ray_data

    dataset = ray.data.from_pandas(table.to_pandas())
    with pytest.raises(ColumnError, match="'text'"):
        ray_data.annotate(dataset, str(tiny_bundle), column="texts")
    with pytest.raises(ColumnError, match=r"'id'.*int64"):
        ray_data.annotate(dataset, str(tiny_bundle), column="id")
    annotated = ray_data.annotate(dataset, str(tiny_bundle), name="annotation", workers=1)
    expected = local.annotate(table, str(tiny_bundle), name="annotation")
    # pandas has texts, and types, of its own.
    columns = ["id", "annotation"]
    assert_same_table(expected.select(columns), collected(annotated).select(columns).sort_by("id"), "annotation")


def collected(dataset: Any) -> pa.Table:
    import ray

    tables = [ray.get(reference) for reference in dataset.to_arrow_refs()]
    return pa.concat_tables([table for table in tables if table.num_rows] or tables[:1])


def test_pipeline_on_spark(table: pa.Table, spark: Any, tiny_bundle: Path) -> None:
    from bert_ray.inference import spark as on_spark

    expected = local.annotate(table, str(tiny_bundle), name="annotation", scores=True)
    frame = on_spark.annotate(spark.createDataFrame(table), str(tiny_bundle), name="annotation", scores=True)
    assert (
        frame.schema["annotation"].dataType.simpleString()
        == "struct<label:string,score:float,scores:map<string,float>>"
    )
    assert_same_table(expected, frame.toArrow().sort_by("id"), "annotation")


def test_pipeline_on_spark_of_no_rows(table: pa.Table, spark: Any, tiny_bundle: Path) -> None:
    from bert_ray.inference import spark as on_spark

    frame = on_spark.annotate(spark.createDataFrame(table).where("id < 0"), str(tiny_bundle), name="annotation")
    assert frame.columns == ["id", "text", "annotation"]
    assert frame.count() == 0


def test_pipeline_on_spark_gives_vectors(table: pa.Table, spark: Any, tiny_encoder: Path) -> None:
    from bert_ray.inference import spark as on_spark

    frame = on_spark.annotate(spark.createDataFrame(table), str(tiny_encoder))
    assert frame.schema["embedding"].dataType.simpleString() == "array<float>"
    found = frame.toArrow().sort_by("id")["embedding"].to_pylist()
    expected = local.annotate(table, str(tiny_encoder))["embedding"].to_pylist()
    assert found[1] is None
    np.testing.assert_allclose([row for row in found if row], [row for row in expected if row], atol=1e-5)


def test_pipeline_on_spark_names_a_missing_column(table: pa.Table, spark: Any, tiny_bundle: Path) -> None:
    from bert_ray.inference import spark as on_spark

    with pytest.raises(ColumnError, match="'text'"):
        on_spark.annotate(spark.createDataFrame(table), str(tiny_bundle), column="texts")


def test_one_model_per_spark_worker_process(spark: Any, tiny_bundle: Path) -> None:
    """Eight tasks, two at a time, twice: in each Python worker the model is one and the same object."""
    from bert_ray.model.annotator import AnnotatorSpec

    spec = AnnotatorSpec(model=str(tiny_bundle), name="of this test alone")

    def tell(batches: Any) -> Any:
        import os

        for _ in batches:
            yield pa.RecordBatch.from_pydict({"pid": [os.getpid()], "model": [id(spec.build())]})

    rows = [
        row
        for _ in range(2)  # Two jobs: a worker outlives the one it was started for.
        for row in spark.range(0, 8, 1, 8).mapInArrow(tell, "pid long, model long").collect()
    ]
    assert len(rows) == 16
    assert len({(row.pid, row.model) for row in rows}) == len({row.pid for row in rows}) <= 4
