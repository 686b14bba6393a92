"""What of a table can be compared, and what becomes of the rest."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bert_ray.errors import LakeError
from bert_ray.evaluation.rows import Rows, open_table, read_rows
from bert_ray.model.card import Card
from bert_ray.model.tasks import Answer, Regression, Similarity
from bert_ray.model.tasks.base import Task

QUESTIONS = {
    "question": ["q", None, "q", "q", "q", " "],
    "context": ["a b", "a b", "a b", "a b", "a b", "a b"],
    "answer_text": ["b", "b", None, "b", "b", "b"],
    "answer_start": [2, 2, None, 0, None, 2],
}


def read(tmp_path: Path, task: Task, columns: dict[str, object]) -> Rows:
    path = tmp_path / "table.parquet"
    pq.write_table(pa.table(columns), path)
    return read_rows(open_table(str(path)), str(path), task, {name: name for name in (*task.inputs, *task.truths)})


def test_a_missing_truth_may_be_one(tmp_path: Path) -> None:
    rows = read(tmp_path, Answer(Card(task="answer")), QUESTIONS)
    assert rows.numbers.tolist() == [0, 2]
    assert (rows.without_label, rows.without_text) == (0, 2)
    assert rows.faulty == {
        "an answer but no answer_start (null)": 1,
        "an answer that does not stand at answer_start": 1,
    }
    assert rows.inputs[1].to_pylist() == ["a b", "a b"]
    assert rows.truth[0].to_pylist() == ["b", None]


def test_faults_are_told_where_nothing_is_left(tmp_path: Path) -> None:
    columns = {name: values[3:5] for name, values in QUESTIONS.items()}
    with pytest.raises(LakeError, match=r"none of its 2 rows .* 1 with an answer but no answer_start"):
        read(tmp_path, Answer(Card(task="answer")), columns)


def test_numbers_that_are_none_are_left_out(tmp_path: Path) -> None:
    columns = {"text": ["a", "b", "c"], "text_pair": ["a", "b", "c"], "label": [1.0, float("nan"), None]}
    for task in (Regression(Card(task="regression", inputs=["text"])), Similarity(Card(task="similarity"))):
        rows = read(tmp_path, task, columns)
        assert (rows.numbers.tolist(), rows.without_label) == ([0], 1)
        assert rows.faulty == {"a label that is NaN or infinite": 1}


def test_files_that_disagree_are_told(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"], "label": [1.0]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": [["a"]], "label": [1.0]}), tmp_path / "b.parquet")
    task = Regression(Card(task="regression", inputs=["text"]))
    with pytest.raises(LakeError, match="cannot be read"):
        read_rows(open_table(str(tmp_path)), str(tmp_path), task, {"text": "text", "label": "label"})


def test_a_name_that_the_system_does_not_take_is_of_no_table() -> None:
    with pytest.raises(LakeError, match="no table at x"):
        open_table("x" * 300)
