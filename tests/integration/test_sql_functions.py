"""The SQL functions, asked from Spark SQL."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from bert_ray.errors import BundleError, JobError
from bert_ray.inference import functions, local

ROWS = [(0, "a", "the film was good"), (1, "a", None), (2, "b", ""), (3, "b", "terrible service"), (4, "b", "🎬 great")]


@pytest.fixture(scope="module")
def registered(spark: Any, tiny_bundle: Path) -> dict[str, Any]:
    # From Arrow: rows of Python's would go through Python workers of their own.
    names = ("id", "source", "text")
    frame = spark.createDataFrame(pa.table(dict(zip(names, map(list, zip(*ROWS, strict=True)), strict=True))))
    frame.createOrReplaceTempView("reviews")
    return functions.register(spark, {"sentiment": str(tiny_bundle)})


@pytest.fixture(scope="module")
def expected(tiny_bundle: Path) -> list[dict | None]:
    table = pa.table({"text": pa.array([text for _, _, text in ROWS], pa.string())})
    return local.annotate(table, str(tiny_bundle), name="s", scores=True)["s"].to_pylist()


def test_bert_sentiment_is_the_annotation(spark: Any, registered: dict, expected: list) -> None:
    frame = spark.sql("SELECT id, bert_sentiment(text) AS s FROM reviews")
    assert frame.schema["s"].dataType.simpleString() == "struct<label:string,score:float,scores:map<string,float>>"
    found = [row.s for row in sorted(frame.collect())]
    assert [row and row.label for row in found] == [row and row["label"] for row in expected]
    for row, wanted in zip(found, expected, strict=True):
        if wanted:
            assert row.score == pytest.approx(wanted["score"], abs=1e-5)
            assert row.scores == pytest.approx(dict(wanted["scores"]), abs=1e-5)


def test_ai_analyze_sentiment_is_the_label(spark: Any, registered: dict, expected: list) -> None:
    frame = spark.sql("SELECT id, ai_analyze_sentiment(text) AS s FROM reviews")
    assert frame.schema["s"].dataType.simpleString() == "string"
    assert [row.s for row in sorted(frame.collect())] == [row and row["label"] for row in expected]


def test_group_by_the_label(spark: Any, registered: dict, expected: list) -> None:
    rows = spark.sql("SELECT source, bert_sentiment(text).label, count(*) AS n FROM reviews GROUP BY ALL").collect()
    labels = [(source, row and row["label"]) for (_, source, _), row in zip(ROWS, expected, strict=True)]
    assert {(row.source, row[1]): row.n for row in rows} == {key: labels.count(key) for key in labels}


def test_inside_an_aggregate_it_is_refused_and_a_subquery_serves(spark: Any, registered: dict, expected: list) -> None:
    from pyspark.errors import AnalysisException

    with pytest.raises(AnalysisException, match=r"(?i)nondeterministic"):
        spark.sql("SELECT source, avg(bert_sentiment(text).score) FROM reviews GROUP BY source").collect()
    rows = spark.sql(
        "SELECT source, avg(judged.score) AS mean FROM (SELECT source, bert_sentiment(text) AS judged FROM reviews) "
        "GROUP BY source"
    ).collect()
    scores: dict[str, list[float]] = {}
    for (_, source, _), row in zip(ROWS, expected, strict=True):
        scores.setdefault(source, []).extend([row["score"]] if row else [])
    assert {row.source: row.mean for row in rows} == pytest.approx(
        {source: sum(found) / len(found) if found else None for source, found in scores.items()}, abs=1e-5
    )


def test_nothing_is_computed_twice(spark: Any, registered: dict) -> None:
    """One evaluation in the plan, though the value is filtered on and selected through a subquery (see PROBES)."""
    frame = spark.sql(
        "SELECT id, s.label, s.score FROM (SELECT id, bert_sentiment(text) AS s FROM reviews) WHERE s.score > 0.5"
    )
    plan = frame._jdf.queryExecution().executedPlan().toString()
    assert plan.count("bert_sentiment(text") == 1, plan
    assert 0 < frame.count() <= len(ROWS)
    # Written twice it is called twice: the planner does not know that two calls say the same.
    frame = spark.sql("SELECT bert_sentiment(text).label FROM reviews WHERE bert_sentiment(text).score > 0.5")
    plan = frame._jdf.queryExecution().executedPlan().toString()
    assert plan.count("ArrowEvalPython") == 2, plan
    # And a condition outside is not moved inside.
    frame = spark.sql("SELECT s FROM (SELECT source, bert_sentiment(text) AS s FROM reviews) WHERE source = 'b'")
    plan = frame._jdf.queryExecution().executedPlan().toString()
    assert 0 <= plan.find("Filter") < plan.find("ArrowEvalPython"), plan


def test_other_types_are_text_as_sql_spells_them(spark: Any, registered: dict) -> None:
    # By their scores, which differ where texts do.
    row = spark.sql("SELECT bert_sentiment(5).score, bert_sentiment('5').score, bert_sentiment(NULL)").first()
    assert row[0] == row[1] is not None
    assert row[2] is None
    # Bytes that are no UTF-8 are U+FFFD, as in a STRING, and end no query.
    for values in ("(DATE'2024-01-31'), (DATE'1969-12-31'), (NULL)", "(X'676f6f64ff'), (X'776f727374'), (NULL)"):
        rows = spark.sql(
            f"SELECT bert_sentiment(cast(x AS STRING)).score, bert_sentiment(x).score FROM VALUES {values} AS t(x)"
        ).collect()
        assert len({seen for _, seen in rows}) == 3
        spelt, seen = ([row[place] or 0.0 for row in rows] for place in (0, 1))
        assert seen == pytest.approx(spelt, abs=1e-5)
    for other in ("array('a')", "5.0D", "TIMESTAMP'2024-01-31 00:00:00'"):
        with pytest.raises(Exception, match=r"reads text, not .*: pass CAST"):
            spark.sql(f"SELECT ai_analyze_sentiment({other})").collect()


def test_functions_on_columns(spark: Any, registered: dict, expected: list) -> None:
    from pyspark.sql.functions import col

    frame = spark.table("reviews").select("id", registered["ai_analyze_sentiment"](col("text")).alias("s"))
    assert [row.s for row in sorted(frame.collect())] == [row and row["label"] for row in expected]


def test_a_directory_of_bundles(spark: Any, tiny_bundle: Path, tmp_path: Path) -> None:
    assert set(functions.register(spark, tiny_bundle.parent)) == {"bert_sentiment", "ai_analyze_sentiment"}
    with pytest.raises(JobError, match="no model named 'sentiment'"):
        functions.register(spark, tmp_path)
    with pytest.raises(JobError, match="there is no directory"):
        functions.register(spark, tmp_path / "missing")
    for name in ("one", "other"):
        shutil.copytree(tiny_bundle, tmp_path / name)
    with pytest.raises(JobError, match=r"one and .*other are both named"):
        functions.register(spark, tmp_path)
    # What is no bundle of ours, and what a killed process left, are passed over.
    shutil.rmtree(tmp_path / "other")
    shutil.copytree(tiny_bundle, tmp_path / ".one.123.old")
    (tmp_path / "gpt").mkdir()
    (tmp_path / "gpt" / "config.json").write_text('{"model_type": "gpt2"}')
    assert "bert_sentiment" in functions.register(spark, tmp_path)
    shutil.rmtree(tmp_path / "one")
    with pytest.raises(BundleError, match="'gpt2' is not supported"):
        functions.register(spark, tmp_path)


def test_a_model_for_another_task(spark: Any, tiny_encoder: Path) -> None:
    with pytest.raises(JobError, match="is a model for embedding"):
        functions.register(spark, {"sentiment": str(tiny_encoder)})
