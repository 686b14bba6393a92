"""Multi-label: transformers' own probabilities, the threshold and how it is chosen, truth of every form, training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from bert_ray.errors import BertRayError, ColumnError, JobError
from bert_ray.model.annotator import AnnotatorSpec
from bert_ray.model.bundle import load_bundle
from bert_ray.model.card import Card
from bert_ray.model.tasks import get_task
from bert_ray.model.tasks.base import Learning
from bert_ray.model.tasks.multilabel import MultiLabel, best_threshold
from bert_ray.training.data import read_labelled
from bert_ray.training.job import DataOptions, TrainJob
from bert_ray.training.launch import train
from bert_ray.training.order import held_out
from tests.tiny_tasks import LABEL, names, save
from tests.unit.model.tasks.sequences import ODD, batch_of, logits_of

LABELS = ["a", "b", "c"]
TYPE = pa.list_(LABEL)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    card = {"task": "multi-label", "labels": LABELS}
    settings = {**names(*LABELS), "problem_type": "multi_label_classification"}
    return save(tmp_path_factory.mktemp("multi"), "BertForSequenceClassification", card, **settings)


@pytest.fixture(scope="module")
def texts(uci_sample: pa.Table) -> list[str]:
    return uci_sample["text"].to_pylist()[:60] + ODD


def task(labels: list[str] | None = None, **options: Any) -> MultiLabel:
    found = get_task(Card(task="multi-label", labels=LABELS if labels is None else labels, options=options))
    assert isinstance(found, MultiLabel)
    return found


def annotate(model: str, texts: list[Any], **options: Any) -> list[Any]:
    annotator = AnnotatorSpec(model=model, options=options).build()
    found = annotator(pa.table({"text": pa.array(texts, pa.string())}))["multi-label"]
    assert found.type == TYPE
    return found.to_pylist()


def lists(*rows: list[str] | None) -> pa.Array:
    return pa.array(rows, pa.list_(pa.string()))


def said(*rows: dict[str, float]) -> pa.Array:
    return pa.array([[{"label": label, "score": score} for label, score in row.items()] for row in rows], TYPE)


# What comes out.


def test_probabilities_are_transformers_own(bundle: str, texts: list[str]) -> None:
    expected = logits_of(bundle, [texts]).sigmoid().numpy()
    found = annotate(bundle, texts, scores=True)
    for item, row in zip(found, expected, strict=True):
        assert {entry["label"]: entry["score"] for entry in item} == pytest.approx(
            dict(zip(LABELS, row.tolist(), strict=True)), abs=1e-5
        )


def test_those_that_reach_the_threshold_the_likeliest_first(bundle: str, texts: list[str]) -> None:
    every = annotate(bundle, texts, scores=True)
    sizes = set()
    for threshold in (0.0, 0.3, 0.5, 0.9, 1.0):
        found = annotate(bundle, texts, threshold=threshold)
        assert found == [[entry for entry in item if entry["score"] >= np.float32(threshold)] for item in every]
        sizes |= {len(item) for item in found}
    assert sizes == {0, 1, 2, 3}
    for item in every:
        scores = [entry["score"] for entry in item]
        assert scores == sorted(scores, reverse=True)
    assert annotate(bundle, texts) == annotate(bundle, texts, threshold=0.5)


def test_null_blank_and_none_of_the_labels(bundle: str) -> None:
    assert annotate(bundle, [None, "", " \t", "a film"], threshold=1.0) == [None, None, None, []]


def test_of_windows_the_mean_of_their_logits_counts(bundle: str, texts: list[str]) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    text = " ".join(texts[:40])
    windows = AutoTokenizer.from_pretrained(bundle)(
        text, truncation=True, max_length=512, stride=64, return_overflowing_tokens=True
    )["input_ids"]
    assert len(windows) > 1
    plain = AutoModelForSequenceClassification.from_pretrained(bundle).eval()
    with torch.inference_mode():
        logits = torch.stack([plain(torch.tensor([ids])).logits[0] for ids in windows]).mean(dim=0)
    (found,) = annotate(bundle, [text], overflow="windows", scores=True)
    expected = dict(zip(LABELS, logits.sigmoid().tolist(), strict=True))
    assert {entry["label"]: entry["score"] for entry in found} == pytest.approx(expected, abs=1e-5)


def test_two_texts(bundle: str) -> None:
    annotator = AnnotatorSpec(model=bundle, options={"pair": True, "scores": True}).build()
    found = annotator(pa.table({"text": ["a film"], "text_pair": ["the food"]}))["multi-label"].to_pylist()[0]
    expected = logits_of(bundle, [["a film"], ["the food"]]).sigmoid()[0].tolist()
    assert {entry["label"]: entry["score"] for entry in found} == pytest.approx(
        dict(zip(LABELS, expected, strict=True)), abs=1e-5
    )


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan"), "half", True, None])
def test_a_threshold_is_a_probability(threshold: object) -> None:
    with pytest.raises(JobError, match=r"options\.threshold is .*; give a (probability|number)"):
        task(threshold=threshold)


# Truth.


@pytest.mark.parametrize(
    "column",
    [
        lists(["b", "a"], [], ["c", "c"]),
        pa.array([["b", "a"], [], ["c"]], pa.large_list(pa.large_string())),
        pa.array([["b", "a"], [], ["c"]], pa.list_(pa.dictionary(pa.int32(), pa.string()))),
        pa.array([[1, 0], [], [2]], pa.list_(pa.int8())),
        pa.chunked_array([lists(["b", "a"], []), lists(["c"])]),
        lists(["x"], ["b", "a"], [], ["c"]).slice(1),
    ],
)
def test_lists_of_names_and_of_positions(column: pa.Array) -> None:
    it = task()
    truth, _ = it.read_truth([column], [pa.array(["x"] * 3)])
    assert it.held(truth[0]).tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1]]


def test_lists_of_fixed_size() -> None:
    it = task()
    truth, _ = it.read_truth([pa.array([["a", "b"], ["b", "c"]], pa.list_(pa.string(), 2))], [pa.array(["x"] * 2)])
    assert it.held(truth[0]).tolist() == [[1, 1, 0], [0, 1, 1]]


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array(["a", "b"]), "is string; task multi-label learns from lists"),
        (pa.array([[True, False]]), "as strings, or as their positions"),
        (pa.array([[0.5]]), "as strings, or as their positions"),
        (pa.array([[["a"]]]), "as strings, or as their positions"),
    ],
)
def test_columns_that_are_no_lists_of_labels(column: pa.Array, message: str) -> None:
    with pytest.raises(ColumnError, match=message):
        task().read_truth([column], [pa.array(["x"] * len(column))])


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (lists([], []), "all 2 lists are empty"),
        (lists(["a"], ["a"]), "all 2 rows have the same labels"),
        (lists(["a", "b"], ["b", "a"]), "all 2 rows have the same labels"),
        (lists(*[[f"id {row}"] for row in range(100)]), "look like no labels"),
    ],
)
def test_nothing_to_tell_apart(column: pa.Array, message: str) -> None:
    with pytest.raises(ColumnError, match=message):
        task([]).labels_in([column])


def test_labels_are_found() -> None:
    assert task([]).labels_in([lists(["b"], [], ["a", "b"])]) == ["a", "b"]
    assert task([]).labels_in([pa.array([[10], [], [2]])]) == ["2", "10"]
    assert task([]).labels_in([lists(["spam"], [])]) == ["spam"]
    with pytest.raises(ColumnError, match=r"unknown labels \['d'\]"):
        task().held(lists(["a"], ["d"]))


def test_rows_with_a_null_are_left_out_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "table.parquet"
    labels = lists(["a"], None, [], ["b", None], ["b"])
    pq.write_table(pa.table({"text": ["1", "2", "3", "4", " "], "label": labels}), path)
    table = read_labelled(str(path), task())
    assert table.truth[0].to_pylist() == [["a"], []]
    (note,) = table.notes
    assert "3 of 5 rows left out" in note
    assert "1 with no label (null)" in note
    assert "1 with a null among its labels (first: row 3)" in note


# Loss, metrics, threshold.


def test_the_loss_is_transformers_own(bundle: str, texts: list[str]) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    plain = AutoModelForSequenceClassification.from_pretrained(bundle).eval()
    tokens = AutoTokenizer.from_pretrained(bundle)(texts[:4], padding=True, return_tensors="pt")
    targets = torch.tensor([[1, 0, 0], [0, 0, 0], [1, 1, 1], [0, 1, 0]], dtype=torch.uint8)
    with torch.inference_mode():
        expected = plain(**tokens, labels=targets.float())
    found = task().loss(expected.logits, targets, batch_of(None))
    torch.testing.assert_close(found.mean(), expected.loss)


def test_smoothing_and_weights() -> None:
    from torch.nn import BCEWithLogitsLoss

    it = task()
    counts = lists(["a", "b"], ["b"], ["b"], [], ["b"])
    it.learning = it.learning_for(0.2, "balanced", [counts])
    assert it.learning.label_weights == pytest.approx([4.0, 0.25, 1.0])  # Without / with; no row has "c".
    outputs = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[1, 0, 1], [0, 1, 0]], dtype=torch.uint8)
    smoothed = torch.tensor([[0.9, 0.1, 0.9], [0.1, 0.9, 0.1]])
    plain = BCEWithLogitsLoss(reduction="none")(outputs, smoothed)
    weights = torch.tensor([[4.0, 1.0, 1.0], [1.0, 0.25, 1.0]])  # Of what a row has.
    torch.testing.assert_close(it.loss(outputs, targets, batch_of(None)), (plain * weights).mean(1))
    it.learning = it.learning_for(0.0, "balanced", [counts])
    expected = BCEWithLogitsLoss(pos_weight=torch.tensor([4.0, 0.25, 1.0]))(outputs, targets.float())
    torch.testing.assert_close(it.loss(outputs, targets, batch_of(None)).mean(), expected)
    it.learning = Learning()
    windows = it.loss(torch.cat([outputs, outputs]), targets, batch_of([0, 1, 0, 1]))
    torch.testing.assert_close(windows, it.loss(outputs, targets, batch_of(None)))
    with pytest.raises(JobError, match="class_weights names 'd'"):
        it.learning_for(0.0, {"d": 2.0}, [counts])


def test_metrics_are_scikit_learn_s() -> None:
    from sklearn.metrics import accuracy_score, f1_score

    truth = lists(["a", "b"], [], ["c"], ["a"])
    annotations = said({"a": 0.9}, {}, {"c": 0.8, "b": 0.7}, {"a": 0.6, "c": 0.4})
    so = np.array([[1, 1, 0], [0, 0, 0], [0, 0, 1], [1, 0, 0]])
    they = np.array([[1, 0, 0], [0, 0, 0], [0, 1, 1], [1, 0, 0]])  # "c" at 0.4 is below the threshold.
    found = task().metrics(annotations, [], [truth])
    assert found == pytest.approx(
        {
            "micro_f1": f1_score(so, they, average="micro"),
            "macro_f1": f1_score(so, they, average="macro"),
            "exact_match": accuracy_score(so, they),
        }
    )
    one = task(["spam"]).metrics(said({"spam": 0.9}, {}, {"spam": 0.9}), [], [lists(["spam"], [], [])])
    assert one == pytest.approx({"micro_f1": 2 / 3, "macro_f1": 2 / 3, "exact_match": 2 / 3})
    nothing = task().metrics(said({}, {}), [], [lists([], [])])
    assert nothing == {"micro_f1": 0.0, "macro_f1": 0.0, "exact_match": 1.0}


def test_the_best_threshold_is_that_of_trying_all() -> None:
    from sklearn.metrics import f1_score

    draw = np.random.default_rng(0)
    for _ in range(20):
        so = (draw.random((15, 4)) < 0.3).astype(np.uint8)
        so[0, 0] = 1
        # Rounded, so that many are equal.
        scores = np.round(np.clip(so * 0.3 + draw.random((15, 4)) * 0.7, 0, 1), 1).astype(np.float32)

        def measure(threshold: float, scores: np.ndarray = scores, so: np.ndarray = so) -> float:
            return f1_score(so.reshape(-1), (scores >= np.float32(threshold)).reshape(-1))

        assert measure(best_threshold(scores, so)) == pytest.approx(max(map(measure, np.unique(scores))))
    close = np.array([[0.5, np.nextafter(np.float32(0.5), np.float32(0))]], np.float32)
    assert best_threshold(close, np.array([[1, 0]])) == 0.5


def test_the_baseline_is_the_best_constant_list() -> None:
    train_truth = [lists(["a", "b"], ["a", "b"], ["a"], ["c"], ["a"])]
    validation = [lists(["a"], ["b"], ["a", "b"], [])]
    so, constant = task().held(validation[0]), np.array([1, 0, 0])
    from sklearn.metrics import f1_score

    candidates = {
        f1_score(task().held(train_truth[0]).reshape(-1), np.tile(row, (5, 1)).reshape(-1)): row
        for row in ([1, 0, 0], [1, 1, 0], [1, 1, 1], [0, 1, 0], [0, 0, 1])
    }
    constant = np.array(candidates[max(candidates)])
    expected = f1_score(so.reshape(-1), np.tile(constant, (4, 1)).reshape(-1))
    assert task().baseline(train_truth, validation) == pytest.approx(expected)


# Training.


def make_job(tiny_encoder: Path, tmp_path: Path, **settings: Any) -> TrainJob:
    """Each of three words brings its label; some rows have none."""
    draw = np.random.default_rng(0)
    words = {"great": "praise", "staff": "people", "food": "meal"}
    texts, labels = [], []
    for row in range(200):
        held = [word for word in words if draw.random() < 0.4]
        texts.append(" ".join([f"the place {row}", *draw.permutation([*held, "and", "then"]).tolist()]))
        labels.append([words[word] for word in held])
    path = tmp_path / "table.parquet"
    pq.write_table(pa.table({"text": texts, "label": pa.array(labels, pa.list_(pa.string()))}), path)
    defaults = {"engine": "local", "batch_size": 16, "learning_rate": 3e-3, "threads": 1, "epochs": 12}
    return TrainJob(
        model=str(tiny_encoder),
        output=str(tmp_path / "model"),
        task="multi-label",
        data=DataOptions(train=str(path), validation_fraction=0.2),
        **(defaults | settings),
    )


def test_it_learns_and_keeps_the_threshold_chosen_on_validation_rows(tiny_encoder: Path, tmp_path: Path) -> None:
    it = make_job(tiny_encoder, tmp_path)
    result = train(it, tell=lambda _: None)
    assert result.metrics["micro_f1"] > 0.9 > result.baseline
    card = load_bundle(result.bundle).card
    assert card.labels == ["meal", "people", "praise"]
    assert 0.0 < card.options["threshold"] < 1.0
    assert load_bundle(result.bundle).config.problem_type == "multi_label_classification"
    # The bundle says of the validation rows what was measured on them.
    annotator = AnnotatorSpec(model=str(result.bundle)).build()
    table = read_labelled(it.data.train, annotator.task)
    table = table.filter(held_out(table.inputs[0].to_pylist(), it.data.validation_fraction))
    found = annotator.annotate(table.inputs)
    assert annotator.task.metrics(found, table.inputs, table.truth) == pytest.approx(result.metrics)


def test_a_threshold_of_the_job_stays(tiny_encoder: Path, tmp_path: Path) -> None:
    result = train(make_job(tiny_encoder, tmp_path, epochs=1, options={"threshold": 0.25}), tell=lambda _: None)
    assert load_bundle(result.bundle).card.options == {"threshold": 0.25}


def test_a_table_of_single_labels_is_refused(tiny_encoder: Path, tmp_path: Path) -> None:
    it = make_job(tiny_encoder, tmp_path)
    pq.write_table(pa.table({"text": ["a", "b"], "label": ["x", "y"]}), it.data.train)
    with pytest.raises(BertRayError, match=r"table\.parquet: the label column is string"):
        train(it, tell=lambda _: None)
