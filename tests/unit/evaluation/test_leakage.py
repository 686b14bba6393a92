"""Rows of the test table that the model was trained on, and words that its vocabulary does not have."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bert_ray.evaluation.evaluate import Evaluation, evaluate
from bert_ray.evaluation.job import EvaluateJob
from bert_ray.evaluation.leakage import rows_also_trained_on
from bert_ray.model.bundle import load_bundle, save_bundle
from bert_ray.model.card import Card
from bert_ray.model.tasks import Answer, Classification

TEXTS = ["a great film", "the worst food ever", "so happy with it", "what a waste of money"]
LABELS = ["positive", "negative", "positive", "negative"]


def provenance(path: Path, columns: dict[str, str] | None = None) -> dict[str, Any]:
    return {"data": {"train": str(path)}, "job": {"data": {"train": str(path), "columns": columns}}}


def measure(tmp_path: Path, bundle: Path, texts: list[str], train: Path) -> Evaluation:
    """The bundle as if it had been trained on `train`, measured on `texts`."""
    found = load_bundle(str(bundle))
    card = replace(found.card, provenance=provenance(train, {"text": "review"}))
    save_bundle(tmp_path / "model", found.model(), found.tokenizer(), card)
    pq.write_table(pa.table({"text": texts, "label": (LABELS * 9)[: len(texts)]}), tmp_path / "test.parquet")
    return evaluate(
        EvaluateJob(model=str(tmp_path / "model"), table=str(tmp_path / "test.parquet"), output=str(tmp_path / "out"))
    )


def test_rows_that_were_trained_on_are_counted_and_told(tmp_path: Path, tiny_bundle: Path) -> None:
    (tmp_path / "train").mkdir()
    for name, part in (("a", [TEXTS[0], "other", None]), ("b", [TEXTS[2], TEXTS[2], "another"])):
        pq.write_table(pa.table({"review": part}), tmp_path / "train" / f"{name}.parquet")
    result = measure(tmp_path, tiny_bundle, [*TEXTS, TEXTS[0]], tmp_path / "train")
    assert len(result.warnings) == 1
    assert result.warnings[0].startswith("3 of the 5 rows also stand in the training data")
    assert f"warning: {result.warnings[0]}" in result.text()
    assert result.warnings[0] in result.report.read_text("utf-8").replace("&#39;", "'")


def test_what_is_gone_is_passed_over(tmp_path: Path, tiny_bundle: Path) -> None:
    result = measure(tmp_path, tiny_bundle, TEXTS, tmp_path / "gone.parquet")
    assert result.warnings == ()
    assert len(result.notes) == 1
    assert "whether the model was trained on these rows is not known" in result.text()
    pq.write_table(pa.table({"review": ["another text"]}), tmp_path / "train.parquet")
    assert measure(tmp_path, tiny_bundle, TEXTS, tmp_path / "train.parquet").notes == ()


@pytest.mark.parametrize(
    ("columns", "named", "expected"),
    [
        ({"text": TEXTS[:2]}, None, 2),
        ({"review": TEXTS[:2]}, {"text": "review"}, 2),
        ({"text": ["A great film", "a great film "]}, None, 0),  # To the letter.
        ({"words": TEXTS}, None, None),
        ({"text": [1, 2]}, None, None),
        ({"text": pa.array(TEXTS).dictionary_encode()}, None, 4),
    ],
)
def test_training_data_of_every_kind(
    tmp_path: Path, columns: dict[str, Any], named: dict[str, str] | None, expected: int | None
) -> None:
    pq.write_table(pa.table(columns), tmp_path / "train.parquet")
    task = Classification(Card(task="classification", labels=["a", "b"]))
    inputs = [pa.array(TEXTS, pa.large_string())]
    assert rows_also_trained_on(inputs, task, provenance(tmp_path / "train.parquet", named)) == expected


def test_files_of_which_the_first_has_no_text(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    pq.write_table(pa.table({"id": [1], "text": pa.nulls(1)}), tmp_path / "train" / "a.parquet")
    pq.write_table(pa.table({"id": [2, 3, 4, 5], "text": TEXTS}), tmp_path / "train" / "b.parquet")
    pq.write_table(pa.table({"id": [6]}), tmp_path / "train" / "0.parquet")
    task = Classification(Card(task="classification", labels=["a", "b"]))
    inputs = [pa.array(TEXTS, pa.large_string())]
    assert rows_also_trained_on(inputs, task, provenance(tmp_path / "train")) == 4


def test_of_two_inputs_both_must_stand_in_one_row(tmp_path: Path) -> None:
    pq.write_table(pa.table({"question": ["q", "p"], "context": ["x", "y"]}), tmp_path / "train.parquet")
    task = Answer(Card(task="answer"))
    inputs = [pa.array(["q", "q", "p"], pa.large_string()), pa.array(["x", "y", "x"], pa.large_string())]
    assert rows_also_trained_on(inputs, task, provenance(tmp_path / "train.parquet")) == 1


def test_large_training_data_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "train.parquet")
    task = Classification(Card(task="classification", labels=["a", "b"]))
    inputs, size = [pa.array(TEXTS, pa.large_string())], (tmp_path / "train.parquet").stat().st_size
    origin = provenance(tmp_path / "train.parquet")
    assert rows_also_trained_on(inputs, task, origin, most_bytes=size) == 4
    assert rows_also_trained_on(inputs, task, origin, most_bytes=size - 1) is None


@pytest.mark.parametrize("content", [b"no parquet", b""])
def test_damaged_training_data_are_passed_over(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "train.parquet").write_bytes(content)
    task = Classification(Card(task="classification", labels=["a", "b"]))
    inputs = [pa.array(TEXTS, pa.large_string())]
    assert rows_also_trained_on(inputs, task, provenance(tmp_path / "train.parquet")) is None
    assert rows_also_trained_on(inputs, task, {}) is None
    assert rows_also_trained_on(inputs, task, {"data": {"train": None}, "job": None}) is None


def test_a_language_that_the_vocabulary_cannot_spell_is_told(tmp_path: Path, tiny_bundle: Path) -> None:
    result = measure(
        tmp_path, tiny_bundle, ["这家店很好", "服务太差了", "味道不错", "再也不来"], tmp_path / "gone.parquet"
    )
    assert len(result.warnings) == 1
    assert "unknown to the model's vocabulary" in result.warnings[0]


def test_training_data_that_may_not_be_looked_for_are_passed_over() -> None:
    """By the system's word: here of a name that is too long, elsewhere of another's directory."""
    task = Classification(Card(task="classification", labels=["negative", "positive"]))
    assert rows_also_trained_on([pa.array(TEXTS)], task, provenance(Path("x" * 300))) is None
