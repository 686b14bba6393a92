"""The report's text: complete, escaped, and with nothing to fetch."""

from __future__ import annotations

import re
from dataclasses import replace
from html import unescape
from pathlib import Path

import numpy as np
import pytest

from bert_ray.evaluation.charts import curves
from bert_ray.evaluation.evaluate import Evaluation, Mistake
from bert_ray.evaluation.metrics import score
from bert_ray.evaluation.report import render
from bert_ray.model.bundle import Bundle, load_bundle

HISTORY = [
    {"epoch": 1, "step": 10, "train_loss": 0.7, "validation_loss": 0.6, "accuracy": 0.7, "macro_f1": 0.69},
    {"epoch": 2, "step": 20, "train_loss": 0.4, "validation_loss": 0.5, "accuracy": 0.8, "macro_f1": 0.79},
]


@pytest.fixture
def bundle(tiny_bundle: Path) -> Bundle:
    found = load_bundle(str(tiny_bundle))
    card = replace(found.card, metrics={"accuracy": 0.8}, provenance={"history": HISTORY, "job": {"seed": 7}})
    return replace(found, card=card)


def evaluation(tmp_path: Path, labels: list[str], mistakes: tuple[Mistake, ...] = ()) -> Evaluation:
    truth = np.arange(40) % len(labels)
    predicted = truth.copy()
    predicted[:5] = (predicted[:5] + 1) % len(labels)
    return Evaluation(
        scores=score(labels, truth, predicted),
        mistakes=mistakes,
        without_label=3,
        without_text=2,
        seconds=1.5,
        report=tmp_path / "report.html",
        metrics=tmp_path / "metrics.json",
    )


def words(page: str) -> str:
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", re.sub(r"<style>.*?</style>", "", page, flags=re.S))).split())


def test_the_report_says_everything(tmp_path: Path, bundle: Bundle) -> None:
    mistake = Mistake(row=12, text="not bad", label="positive", said="negative", score=0.987)
    text = words(render(evaluation(tmp_path, ["negative", "positive"], (mistake,)), bundle, "test.parquet"))
    for part in ("87.5 %", "Majority baseline: 50.0 %", "test.parquet", "Confusion matrix", "Loss", "training"):
        assert part in text
    for part in ("said negative, 98.7 %", "is positive , row 12", "not bad", bundle.fingerprint, "job.seed 7"):
        assert part in text
    assert "left out, no label 3" in text


def test_markup_in_texts_labels_and_names_is_shown_not_run(tmp_path: Path, bundle: Bundle) -> None:
    evil = "<script>alert(1)</script>"
    mistake = Mistake(row=1, text=f'{evil}<img src="http://x/y.png">', label=evil, said="b", score=0.9)
    page = render(evaluation(tmp_path, [evil, "b"], (mistake,)), bundle, f"{evil}.parquet")
    assert "<script" not in page
    assert "<img" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 4


def test_nothing_is_fetched(tmp_path: Path, bundle: Bundle) -> None:
    page = render(evaluation(tmp_path, ["negative", "positive"]), bundle, "test.parquet")
    assert not re.findall(r"""(?:src|href|action|data|poster)\s*=\s*["'](?!#)[^"']*""", page)
    assert "@import" not in page
    assert not re.findall(r"url\((?!#)", page)
    # XML name spaces are names, not addresses.
    assert not re.findall(r"https?://", re.sub(r'xmlns(:\w+)?="[^"]*"', "", page))


def test_without_history_it_says_so(tmp_path: Path, bundle: Bundle) -> None:
    bare = replace(bundle, card=replace(bundle.card, provenance={}))
    page = render(evaluation(tmp_path, ["negative", "positive"]), bare, "test.parquet")
    assert 'id="no-history"' in page
    assert "<svg" not in page


def test_many_labels_are_listed_as_confusions(tmp_path: Path, bundle: Bundle) -> None:
    labels = [f"label {number}" for number in range(20)]
    wide = replace(bundle, card=replace(bundle.card, labels=labels))
    page = render(evaluation(tmp_path, labels), wide, "test.parquet")
    assert 'id="confusions"' in page
    assert 'id="confusion"' not in page


def test_no_better_than_the_baseline_is_said(tmp_path: Path, bundle: Bundle) -> None:
    truth, predicted = np.array([0, 0, 0, 1]), np.array([1, 0, 0, 0])
    poor = replace(
        evaluation(tmp_path, ["negative", "positive"]), scores=score(["negative", "positive"], truth, predicted)
    )
    assert "No better than the baseline" in words(render(poor, bundle, "test.parquet"))


def test_curves_are_coloured_by_the_page_and_repeat_byte_for_byte() -> None:
    lines = {"train_loss": "training", "validation_loss": "validation", "absent": "absent"}
    svg = curves("loss", HISTORY, lines, floor=0.65)
    assert svg == curves("loss", HISTORY, lines, floor=0.65)
    assert svg.startswith("<svg")
    assert "var(--line-1)" in svg
    assert "#0a0001" not in svg
    assert ">training</text>" in svg
    assert ">majority baseline</text>" in svg
    assert ">absent</text>" not in svg
    assert set(re.findall(r'\bid="(\w+)-', svg)) == {"loss"}


def test_no_history_gives_no_drawing() -> None:
    assert curves("loss", [], {"train_loss": "training"}) == ""
    assert curves("loss", [{"epoch": 1, "train_loss": None}], {"train_loss": "training"}) == ""
    assert "<svg" in curves("loss", [{"train_loss": 0.5}], {"train_loss": "training"})
