"""Classification of texts and of pairs: transformers' probabilities, windows, class weights, bad input, training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.nn import functional as F

from bert_ray.errors import BundleError, ColumnError, JobError
from bert_ray.model.annotator import Annotator, AnnotatorSpec
from bert_ray.model.bundle import load_bundle
from bert_ray.model.card import Card
from bert_ray.model.tasks import get_task
from bert_ray.model.tasks.base import Learning
from bert_ray.model.tasks.classification import Classification
from bert_ray.training.job import DataOptions, TrainJob
from bert_ray.training.launch import TrainResult, prepare, train
from tests.tiny_tasks import names, save
from tests.unit.model.tasks.sequences import ODD, batch_of, logits_of

LABELS = ["a", "b", "c"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three labels, random head."""
    card = {"task": "classification", "labels": LABELS}
    return save(tmp_path_factory.mktemp("one"), "BertForSequenceClassification", card, **names(*LABELS))


@pytest.fixture(scope="module")
def pair_bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same for two texts."""
    card = {"task": "classification", "labels": LABELS, "inputs": ["text", "text_pair"]}
    return save(tmp_path_factory.mktemp("two"), "BertForSequenceClassification", card, **names(*LABELS))


@pytest.fixture(scope="module")
def texts(uci_sample: pa.Table) -> list[str]:
    return uci_sample["text"].to_pylist()[:60] + ODD


def task(labels: list[str] | None = None, **card: Any) -> Classification:
    found = get_task(Card(task="classification", labels=LABELS if labels is None else labels, **card))
    assert isinstance(found, Classification)
    return found


def annotate(model: str, columns: dict[str, Any], **options: Any) -> list[Any]:
    annotator = AnnotatorSpec(model=model, name="said", options=options).build()
    return annotator(pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()}))[
        "said"
    ].to_pylist()


# The same as transformers.


@pytest.mark.parametrize("pair", [False, True])
def test_probabilities_are_transformers_own(bundle: str, pair_bundle: str, texts: list[str], pair: bool) -> None:
    columns = {"text": texts} | ({"text_pair": texts[::-1]} if pair else {})
    model = pair_bundle if pair else bundle
    expected = logits_of(model, list(columns.values())).softmax(dim=1).numpy()
    found = annotate(model, columns, scores=True)
    scores = np.array([[score for _, score in item["scores"]] for item in found])
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert [item["label"] for item in found] == [LABELS[best] for best in expected.argmax(axis=1)]
    assert len({item["label"] for item in found}) > 1


def test_a_model_of_one_token_type_reads_pairs(tmp_path: Path) -> None:
    """A RoBERTa with BERT's tokenizer: that numbers the second text 1, for which the model has no row."""
    import torch
    from transformers import RobertaConfig, RobertaForSequenceClassification

    from tests.conftest import tiny_tokenizer

    tokenizer, sizes = tiny_tokenizer(), {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = RobertaConfig(vocab_size=len(tokenizer), type_vocab_size=1, pad_token_id=0, num_labels=3, **sizes)
    model = RobertaForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    columns = {"text": ["a film", "the food"], "text_pair": ["good", "so very bad"]}
    found = annotate(str(tmp_path), columns, pair=True, scores=True)
    rows = tokenizer(*columns.values(), return_tensors="pt", padding=True)
    with torch.no_grad():
        expected = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits.softmax(1)
    for one, other in zip(found, expected, strict=True):
        assert [score for _, score in one["scores"]] == pytest.approx(other.tolist(), abs=1e-5)


def test_the_order_of_a_pair_matters(pair_bundle: str) -> None:
    one, other = annotate(pair_bundle, {"text": ["a film", "the food"], "text_pair": ["the food", "a film"]})
    assert one != other


def test_of_windows_the_mean_of_their_logits_counts(bundle: str, texts: list[str]) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    long = [" ".join(texts[start : start + 40]) for start in (0, 10, 20)]
    tokenizer = AutoTokenizer.from_pretrained(bundle)
    plain = AutoModelForSequenceClassification.from_pretrained(bundle).eval()
    found = annotate(bundle, {"text": [*long, "a short one"]}, overflow="windows", overlap=32, scores=True)
    for text, item in zip([*long, "a short one"], found, strict=True):
        windows = tokenizer(text, truncation=True, max_length=512, stride=32, return_overflowing_tokens=True)
        with torch.inference_mode():
            logits = [plain(torch.tensor([ids])).logits[0] for ids in windows["input_ids"]]
        expected = torch.stack(logits).mean(dim=0).softmax(dim=0).tolist()
        assert [score for _, score in item["scores"]] == pytest.approx(expected, abs=1e-5)
        assert len(logits) == 1 if text == "a short one" else len(logits) > 1


def test_head_and_tail(bundle: str, texts: list[str]) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    text = " ".join(texts[:40])
    ids = AutoTokenizer.from_pretrained(bundle)(text)["input_ids"]
    assert len(ids) > 512
    plain = AutoModelForSequenceClassification.from_pretrained(bundle).eval()
    with torch.inference_mode():
        expected = plain(torch.tensor([ids[:128] + ids[-384:]])).logits[0].softmax(dim=0).tolist()
    (found,) = annotate(bundle, {"text": [text]}, overflow="head_tail", scores=True)
    assert [score for _, score in found["scores"]] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({}, "classification"),
        ({"problem_type": "single_label_classification"}, "classification"),
        ({"problem_type": "multi_label_classification"}, "multi-label"),
        ({"problem_type": "regression"}, "regression"),
        ({"num_labels": 1}, "regression"),
        ({"num_labels": 1, "problem_type": "multi_label_classification"}, "multi-label"),
    ],
)
def test_a_plain_directory_says_what_its_head_is_for(tmp_path: Path, settings: dict[str, Any], kind: str) -> None:
    from transformers import BertForSequenceClassification

    from tests.conftest import tiny_config, tiny_tokenizer

    tokenizer = tiny_tokenizer()
    settings = settings if "num_labels" in settings else {**names(*LABELS), **settings}
    BertForSequenceClassification(tiny_config(len(tokenizer), **settings)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    card = load_bundle(tmp_path).card
    assert card.task == kind
    assert card.inputs == (["text", "text_pair"] if kind == "regression" else ["text"])
    assert len(card.labels) == (0 if kind == "regression" else settings.get("num_labels", 3))
    if kind == "regression" and "num_labels" not in settings:
        with pytest.raises(
            BundleError, match="gives 3 numbers for a text, of which task regression makes no annotation"
        ):
            Annotator(load_bundle(tmp_path))
        return
    annotator = Annotator(load_bundle(tmp_path))
    columns = {name: ["a nice film"] for name in card.inputs}
    assert annotator(pa.table(columns)).column(len(columns)).null_count == 0


# What is read.


def test_inputs_come_from_the_card_or_the_option() -> None:
    assert task().inputs == ("text",)
    assert task(inputs=["text", "text_pair"]).inputs == ("text", "text_pair")
    assert task(options={"pair": True}).inputs == ("text", "text_pair")
    assert task(inputs=["text", "text_pair"], options={"pair": False}).inputs == ("text",)
    assert Classification.inputs == ("text",)


@pytest.mark.parametrize("overflow", ["windows", "head_tail"])
def test_pairs_are_cut_and_nothing_else(pair_bundle: str, overflow: str) -> None:
    with pytest.raises(JobError, match=rf"options\.overflow is '{overflow}'.*give truncate"):
        annotate(pair_bundle, {"text": ["a"], "text_pair": ["b"]}, overflow=overflow)
    with pytest.raises(JobError, match=r"options\.pair is 'both'"):
        task(options={"pair": "both"})


def test_null_and_blank_in_either_text_give_null(pair_bundle: str) -> None:
    found = annotate(pair_bundle, {"text": ["a", None, "a", " ", "a"], "text_pair": ["b", "b", None, "b", ""]})
    assert [item is None for item in found] == [False, True, True, True, True]


def test_a_plain_classifier_reads_pairs_when_told(bundle: str, pair_bundle: str) -> None:
    columns = {"text": ["a film", "good"], "text_pair": ["the food", "bad"]}
    assert annotate(bundle, columns, pair=True) == annotate(pair_bundle, columns)
    with pytest.raises(ColumnError, match="no column 'text_pair'"):
        annotate(bundle, {"text": ["a film"]}, pair=True)


def test_windows_that_cannot_move_on(bundle: str) -> None:
    with pytest.raises(BundleError, match="smaller overlap"):
        annotate(bundle, {"text": ["a"]}, overflow="windows", overlap=510)


# The loss.


def test_the_loss_is_torch_s_with_smoothing_and_weights() -> None:
    it = task()
    it.learning = Learning(label_smoothing=0.1, label_weights=[1.0, 2.0, 0.5])
    outputs, targets = torch.randn(8, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0] * 2)
    found = it.loss(outputs, targets, batch_of(None))
    weights = torch.tensor([1.0, 2.0, 0.5])
    plain = F.cross_entropy(outputs, targets, label_smoothing=0.1, reduction="none")
    torch.testing.assert_close(found, plain * weights[targets])
    it.learning = Learning(label_weights=[1.0, 2.0, 0.5])
    expected = F.cross_entropy(outputs, targets, weight=weights)  # Over the sum of the weights.
    torch.testing.assert_close(it.loss(outputs, targets, batch_of(None)).sum() / weights[targets].sum(), expected)
    it.learning = Learning()
    torch.testing.assert_close(it.loss(outputs, targets, batch_of(None)).mean(), F.cross_entropy(outputs, targets))


def test_all_windows_of_a_row_are_one_sample() -> None:
    outputs = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    found = task().loss(outputs, torch.tensor([2, 0]), batch_of([1, 0, 1, 1, 0]))
    means = torch.stack([outputs[[1, 4]].mean(dim=0), outputs[[0, 2, 3]].mean(dim=0)])
    expected = F.cross_entropy(means, torch.tensor([2, 0]), reduction="none")
    torch.testing.assert_close(found, expected)
    one, other = (torch.autograd.grad(loss.sum(), outputs, retain_graph=True)[0] for loss in (found, expected))
    torch.testing.assert_close(one, other)


def test_balanced_weights_are_scikit_learn_s() -> None:
    from sklearn.utils.class_weight import compute_class_weight

    labels = ["a"] * 13 + ["b"] * 5 + ["c"] * 2
    found = task().learning_for(0.1, "balanced", [pa.array(labels)])
    expected = compute_class_weight("balanced", classes=np.array(LABELS), y=np.array(labels))
    assert found.label_smoothing == 0.1
    assert found.label_weights == pytest.approx(expected)
    assert task().learning_for(0.0, "none", [pa.array(labels)]).label_weights is None
    missing = task().learning_for(0.0, "balanced", [pa.array(["a", "b"])]).label_weights  # No row has "c".
    assert missing == pytest.approx([2 / 3, 2 / 3, 1.0])


def test_weights_by_label() -> None:
    truth = [pa.array(["a", "b", "c"])]
    assert task().learning_for(0.0, {"b": 5}, truth).label_weights == [1.0, 5.0, 1.0]
    with pytest.raises(JobError, match=r"class_weights names 'd'.*the labels are 'a', 'b', 'c'"):
        task().learning_for(0.0, {"d": 5}, truth)


# Measures and labels.


def test_metrics_are_scikit_learn_s() -> None:
    from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score

    so, said = ["no", "no", "yes", "yes", "yes", "no"], ["no", "yes", "yes", "no", "yes", "no"]
    annotations = pa.array([{"label": label, "score": 0.5} for label in said])
    found = task(["no", "yes"]).metrics(annotations, [], [pa.array(so)])
    assert list(found) == ["accuracy", "macro_f1", "f1", "precision", "recall"]
    assert found["accuracy"] == accuracy_score(so, said)
    assert found["macro_f1"] == f1_score(so, said, average="macro")
    for name, measure in (("f1", f1_score), ("precision", precision_score), ("recall", recall_score)):
        assert found[name] == measure(so, said, pos_label="yes")
    # The first label alone is said: no figure is NaN.
    nothing = pa.array([{"label": "no", "score": 0.5}] * 6)
    assert task(["no", "yes"]).metrics(nothing, [], [pa.array(so)])["f1"] == 0.0
    three = task(["no", "yes", "perhaps"]).metrics(annotations, [], [pa.array(so)])
    assert list(three) == ["accuracy", "macro_f1"]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (pa.array([["a"], ["b"]]), "lists are for task multi-label"),
        (pa.array([0.5, 1.5]), "numbers are for task regression"),
        (pa.array([0, 0]), "one label only"),
    ],
)
def test_columns_that_are_no_labels(labels: pa.Array, message: str) -> None:
    with pytest.raises(ColumnError, match=message):
        task([]).labels_in([labels])


def test_one_row_a_label_and_ten_thousand_labels() -> None:
    few = pa.array([f"label {row}" for row in range(50)])
    assert len(task([]).labels_in([few])) == 50
    with pytest.raises(ColumnError, match="51 different values in 51 rows, which looks like no label"):
        task([]).labels_in([pa.array([f"label {row}" for row in range(51)])])
    many = [f"label {row:05}" for row in range(10_000)]
    assert task([]).labels_in([pa.array(many * 2)]) == many
    numbered = ["1", "2", "3"]
    assert task(numbered).indices(pa.array([3, 1])).tolist() == [2, 0]
    with pytest.raises(ColumnError, match="unknown labels"):  # Not the first one's position: its name is a number.
        task(numbered).indices(pa.array([0, 0]))
    assert task(many).labels_in([pa.array(many)]) == many  # The job says that they are labels.
    assert task(many).indices(pa.array(many[::-1])).tolist() == list(range(10_000))[::-1]


# Training.


def job(tiny_encoder: Path, tmp_path: Path, table: dict[str, Any], **settings: Any) -> TrainJob:
    path = tmp_path / "table.parquet"
    pq.write_table(pa.table(table), path)
    columns = settings.pop("columns", None)
    defaults = {"engine": "local", "batch_size": 16, "learning_rate": 3e-3, "threads": 1, "epochs": 12}
    return TrainJob(
        model=str(tiny_encoder),
        output=str(tmp_path / "model"),
        data=DataOptions(train=str(path), validation_fraction=0.2, columns=columns),
        **(defaults | settings),
    )


def run(it: TrainJob) -> TrainResult:
    return train(it, tell=lambda _: None)


def rows(count: int) -> tuple[list[str], list[str]]:
    """Texts that say nothing, and texts whose one word decides."""
    draw = np.random.default_rng(0)
    words = [("terrible", "great")[int(draw.integers(2))] for _ in range(count)]
    return [f"the film number {row}" for row in range(count)], words


def test_a_job_that_names_text_pair_learns_from_both(tiny_encoder: Path, tmp_path: Path) -> None:
    first, words = rows(150)
    table = {"text": first, "second": [f"it was {word}" for word in words], "label": words}
    result = run(job(tiny_encoder, tmp_path, table, columns={"text_pair": "second"}))
    assert result.metrics["accuracy"] > 0.9 > result.baseline
    trained = load_bundle(result.bundle)
    assert trained.card.inputs == ["text", "text_pair"]
    found = annotate(str(result.bundle), {"text": ["the film"] * 2, "text_pair": ["it was great", "it was terrible"]})
    assert [item["label"] for item in found] == ["great", "terrible"]


def test_the_option_says_the_same_on_the_card(tiny_encoder: Path, tmp_path: Path) -> None:
    first, words = rows(40)
    table = {"text": first, "text_pair": words, "label": words}
    it = job(tiny_encoder, tmp_path, table, options={"pair": True})
    assert prepare(it, load_bundle(it.model))[0].inputs == ["text", "text_pair"]
    alone = job(tiny_encoder, tmp_path, table)
    assert prepare(alone, load_bundle(alone.model))[0].inputs == ["text"]
    windows = job(tiny_encoder, tmp_path, table, options={"overflow": "windows"}, columns={"text_pair": "text_pair"})
    with pytest.raises(JobError, match=r"options\.overflow"):
        prepare(windows, load_bundle(windows.model))


def test_windows_see_what_cutting_loses(tiny_encoder: Path, tmp_path: Path) -> None:
    first, words = rows(150)
    long = [f"{text} {'and then ' * 10} {word}" for text, word in zip(first, words, strict=True)]
    table = {"text": long, "label": words}
    settings = {"max_length": 16, "epochs": 10}
    cut = run(job(tiny_encoder, tmp_path, table, **settings))
    (tmp_path / "whole").mkdir()
    options = {"overflow": "windows", "overlap": 4}
    whole = run(job(tiny_encoder, tmp_path / "whole", table, options=options, **settings))
    assert whole.metrics["accuracy"] > 0.9 > cut.metrics["accuracy"]
    assert load_bundle(whole.bundle).card.options == options
    # What was measured while training is what the bundle says.
    again = AnnotatorSpec(model=str(whole.bundle)).build()
    said = [item["label"] for item in again(pa.table({"text": table["text"]}))["classification"].to_pylist()]
    assert np.mean([one == other for one, other in zip(said, words, strict=True)]) > 0.9


def test_balanced_weights_find_the_rare_label(tiny_encoder: Path, tmp_path: Path) -> None:
    first, _ = rows(200)
    draw = np.random.default_rng(1)
    rare = draw.random(200) < 0.08
    table = {"text": [f"{text} {'great' if is_rare else 'bad'}" for text, is_rare in zip(first, rare, strict=True)]}
    table["label"] = ["spam" if is_rare else "ham" for is_rare in rare]
    it = job(tiny_encoder, tmp_path, table, class_weights="balanced", label_smoothing=0.05)
    card, data, _ = prepare(it, load_bundle(it.model))
    counts = np.bincount(data.train.targets.values)
    assert card.labels == ["ham", "spam"]
    assert data.learning.label_smoothing == 0.05
    assert data.learning.label_weights == pytest.approx(counts.sum() / (2 * counts))
    assert run(it).metrics["recall"] > 0.9
