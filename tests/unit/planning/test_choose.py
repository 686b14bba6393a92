"""Choosing among models: real trainings of tiny models beside a real TF-IDF."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bert_ray.errors import BundleError, ColumnError, JobError
from bert_ray.planning.choose import BASELINE, Candidate, Choice, _candidates, choose, recommend
from bert_ray.planning.job import ChooseJob
from bert_ray.planning.tfidf import fit_tfidf, unspaced


def run(table: dict[str, object], tmp_path: Path, **settings: object) -> tuple[Choice, list[str]]:
    path = tmp_path / "table.parquet"
    pq.write_table(pa.table(table), path)
    told: list[str] = []
    job = ChooseJob(**({"table": str(path), "output": str(tmp_path / "choose"), "threads": 1} | settings))
    return choose(job, tell=told.append), told


def word_decides(rows: int) -> dict[str, object]:
    """Texts whose label hangs on one word: easy for a bag of words."""
    draw = np.random.default_rng(0)
    labels = [int(draw.integers(2)) for _ in range(rows)]
    texts = [
        f"the {draw.choice(['film', 'phone', 'food'])} was {('awful', 'great')[label]} {row}"
        for row, label in enumerate(labels)
    ]
    return {"text": texts, "label": labels}


def test_where_words_decide_the_baseline_is_recommended(tmp_path: Path, tiny_encoder: Path) -> None:
    choice, told = run(word_decides(400), tmp_path, models=[str(tiny_encoder)], epochs=1, first_rows=100)
    assert choice.recommended.name == BASELINE
    assert "as good as the best BERT here" in choice.reason
    assert choice.test_rows == 100
    assert {item.name.rpartition(", ")[2] for item in choice.candidates} == {
        BASELINE,
        "head on frozen embeddings",
        "fine-tuned",
    }
    # Three turns: 100, 200, 300 rows; one of the two ways to use the model was left behind after the first.
    assert max(item.rows for item in choice.candidates) == 300
    assert [item.note for item in choice.candidates if item.note] == ["left behind after 100 rows"]
    assert all(item.rows_per_second > 0 and item.memory_mb > 10 for item in choice.candidates)
    assert "accuracy" in told[0]
    printed = choice.text()
    assert BASELINE in printed
    assert "always the most frequent label" in printed
    written = json.loads((tmp_path / "choose" / "choose.json").read_text())
    assert written["recommended"] == BASELINE
    assert "<svg" in choice.drawing.read_text()


def test_without_time_only_the_first_turn_is_made(
    tmp_path: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Speed and memory, which the test above measures, take a process for each candidate.
    monkeypatch.setattr(sys.modules[choose.__module__], "_speed", lambda *_: (100.0, 100.0))
    choice, _ = run(
        word_decides(400), tmp_path, models=[str(tiny_encoder)], epochs=1, first_rows=100, budget_minutes=1e-6
    )
    berts = [item for item in choice.candidates if item.reference]
    assert all("raise budget_minutes" in item.note for item in berts)
    assert choice.recommended.name == BASELINE


def candidate(name: str, right: np.ndarray, speed: float) -> Candidate:
    reference = None if name == BASELINE else name
    return Candidate(name=name, reference=reference, rows=10, right=right, rows_per_second=speed, memory_mb=1.0)


def test_a_bert_that_is_better_beyond_chance_is_recommended() -> None:
    draw = np.random.default_rng(1)
    better, worse = draw.random(1000) < 0.92, draw.random(1000) < 0.80
    best, reason = recommend([candidate("bert", better, 50.0), candidate(BASELINE, worse, 50_000.0)])
    assert best.name == "bert"
    assert BASELINE in reason


def test_of_two_as_good_the_faster_is_recommended() -> None:
    right = np.arange(1000) % 10 > 0
    almost = right.copy()
    almost[1] = False
    best, reason = recommend([candidate("large", right, 10.0), candidate("small", almost, 100.0)])
    assert best.name == "small"
    assert "10 times as fast" in reason


@pytest.mark.parametrize(
    ("table", "error", "message"),
    [
        ({"text": ["a", "b"] * 10, "label": [0, 1] * 10}, JobError, "at least 80"),
        ({"txt": ["a", "b"] * 100, "label": [0, 1] * 100}, ColumnError, "did you mean 'txt'"),
        ({"text": ["a", "b"] * 100, "label": [1, 1] * 100}, ColumnError, "one label only"),
    ],
)
def test_bad_tables(tmp_path: Path, tiny_encoder: Path, table: dict[str, object], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        run(table, tmp_path, models=[str(tiny_encoder)])


def test_models_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="none of the models"):
        run(word_decides(200), tmp_path, models=[str(tmp_path / "nothing")])


def test_a_model_that_cannot_spell_the_language_is_told(tiny_encoder: Path) -> None:
    job, told = ChooseJob(table="t", models=[str(tiny_encoder)]), []
    assert len(_candidates(job, np.array(["味道很好", "太难吃了"], object), told.append)) == 3
    assert len(told) == 1
    assert told[0].startswith(f"note: {tiny_encoder}: 100% of the tokens are unknown")
    _candidates(job, np.array(["the food was good"], object), told.append)
    assert len(told) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"models": []}, "models is empty"),
        ({"budget_minutes": 0}, "budget_minutes is 0"),
        ({"test_rows": 1}, "test_rows is 1"),
    ],
)
def test_wrong_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(JobError, match=message):
        ChooseJob(table="t", **settings)


def test_the_baseline_reads_scripts_without_blanks() -> None:
    texts = ["味道很好，送餐快", "太难吃了，差评", "很好吃", "难吃"] * 5
    assert unspaced(texts)
    assert not unspaced(["a good film"])
    pipeline = fit_tfidf(texts, [1, 0, 1, 0] * 5)
    assert list(pipeline.predict(["好吃", "太难吃"])) == [1, 0]
