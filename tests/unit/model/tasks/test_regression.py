"""Regression: transformers' own numbers, measures that are never NaN, numbers of every type, training."""

from __future__ import annotations

import math
from decimal import Decimal
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
from bert_ray.model.tasks import get_task, numbers
from bert_ray.model.tasks.regression import Regression
from bert_ray.model.tasks.sections import shown_number
from bert_ray.training.data import read_labelled
from bert_ray.training.job import DataOptions, TrainJob
from bert_ray.training.launch import prepare, train
from tests.tiny_tasks import save
from tests.unit.model.tasks.sequences import ODD, batch_of, logits_of

PAIR = ["text", "text_pair"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    card = {"task": "regression", "inputs": PAIR}
    root = tmp_path_factory.mktemp("regression")
    return save(root, "BertForSequenceClassification", card, num_labels=1, problem_type="regression")


@pytest.fixture(scope="module")
def texts(uci_sample: pa.Table) -> list[str]:
    return uci_sample["text"].to_pylist()[:60] + ODD


def task(inputs: list[str] | None = None, **options: Any) -> Regression:
    found = get_task(Card(task="regression", inputs=PAIR if inputs is None else inputs, options=options))
    assert isinstance(found, Regression)
    return found


def annotate(model: str, columns: dict[str, list[Any]], **options: Any) -> list[Any]:
    annotator = AnnotatorSpec(model=model, options=options).build()
    found = annotator(pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()}))
    assert found["regression"].type == pa.float32()
    return found["regression"].to_pylist()


def test_numbers_are_transformers_own(bundle: str, texts: list[str]) -> None:
    two = logits_of(bundle, [texts, texts[::-1]])[:, 0].tolist()
    assert annotate(bundle, {"text": texts, "text_pair": texts[::-1]}) == pytest.approx(two, abs=1e-5)
    one = logits_of(bundle, [texts])[:, 0].tolist()
    assert annotate(bundle, {"text": texts}, pair=False) == pytest.approx(one, abs=1e-5)


def test_of_windows_the_mean_counts(bundle: str, texts: list[str]) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    text = " ".join(texts[:40])
    windows = AutoTokenizer.from_pretrained(bundle)(
        text, truncation=True, max_length=512, stride=64, return_overflowing_tokens=True
    )["input_ids"]
    assert len(windows) > 1
    plain = AutoModelForSequenceClassification.from_pretrained(bundle).eval()
    with torch.inference_mode():
        expected = float(torch.stack([plain(torch.tensor([ids])).logits[0, 0] for ids in windows]).mean())
    assert annotate(bundle, {"text": [text]}, pair=False, overflow="windows") == pytest.approx([expected], abs=1e-5)


def test_null_and_blank_give_null(bundle: str) -> None:
    found = annotate(bundle, {"text": ["a", None, "a", " "], "text_pair": ["b", "b", "", "b"]})
    assert [item is None for item in found] == [False, True, True, True]


def test_two_texts_unless_told_otherwise() -> None:
    assert task().inputs == tuple(PAIR)
    assert task([]).inputs == tuple(PAIR)
    assert task(["text"]).inputs == ("text",)
    assert task(pair=False).inputs == ("text",)
    assert Regression.inputs == tuple(PAIR)


# Truth.


@pytest.mark.parametrize(
    "column",
    [
        pa.array([1, 2, None], pa.int8()),
        pa.array([1, 2, None], pa.uint64()),
        pa.array([1, 2, None], pa.float16()),
        pa.array([1, 2, None], pa.float32()),
        pa.array([Decimal("1.0"), Decimal("2.0"), None]),
        pa.chunked_array([pa.array([1.0]), pa.array([2.0, None])]),
    ],
)
def test_numbers_of_every_type(column: pa.Array) -> None:
    truth, _ = task().read_truth([column], [pa.array(["x"] * 3)] * 2)
    assert truth[0].type == pa.float64()
    assert truth[0].to_pylist() == [1.0, 2.0, None]


@pytest.mark.parametrize("column", [pa.array(["1", "2"]), pa.array([True, False]), pa.array([[1.0], [2.0]])])
def test_columns_that_are_no_numbers(column: pa.Array) -> None:
    with pytest.raises(ColumnError, match="task regression goes by numbers"):
        task().read_truth([column], [pa.array(["x"] * 2)] * 2)


def test_rows_without_a_finite_number_are_left_out_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "table.parquet"
    labels = [1.0, math.nan, math.inf, 1e300, None, 2.0]
    pq.write_table(pa.table({"text": list("abcdef"), "text_pair": list("abcdef"), "label": labels}), path)
    table = read_labelled(str(path), task())
    assert table.truth[0].to_pylist() == [1.0, 2.0]
    (note,) = table.notes
    assert "4 of 6 rows left out" in note
    assert "1 with no label (null)" in note
    assert "3 with a label that is NaN or infinite (first: row 1)" in note


def test_nothing_to_learn() -> None:
    with pytest.raises(ColumnError, match="it is 3 in all 4 rows"):
        task().labels_in([pa.array([3.0] * 4)])
    assert task().labels_in([pa.array([3.0, 4.0])]) == []
    with pytest.raises(JobError, match="has no labels"):
        get_task(Card(task="regression", labels=["low", "high"])).labels_in([pa.array([3.0, 4.0])])
    with pytest.raises(JobError, match="label_smoothing"):
        task().learning_for(0.1, "none", [pa.array([3.0])])
    with pytest.raises(JobError, match="class_weights"):
        task().learning_for(0.0, "balanced", [pa.array([3.0])])


# Loss and metrics.


def test_the_loss_is_transformers_own(bundle: str, texts: list[str]) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    plain = AutoModelForSequenceClassification.from_pretrained(bundle).eval()
    tokens = AutoTokenizer.from_pretrained(bundle)(texts[:4], texts[4:8], padding=True, return_tensors="pt")
    targets = torch.tensor([0.0, 1.5, -2.0, 5.0])
    with torch.inference_mode():
        expected = plain(**tokens, labels=targets)
    found = task().loss(expected.logits, targets, batch_of(None))
    torch.testing.assert_close(found.mean(), expected.loss)
    windows = task().loss(torch.tensor([[1.0], [3.0], [5.0]]), torch.tensor([1.0, 3.0]), batch_of([0, 1, 0]))
    assert windows.tolist() == [4.0, 0.0]


def test_metrics_are_scipy_s() -> None:
    from scipy.stats import pearsonr, spearmanr

    so, said = np.array([1.0, 2.0, 2.0, 5.0, 0.0]), np.array([0.5, 2.5, 2.0, 3.0, 1.0], np.float32)
    found = task().metrics(pa.array(said), [], [pa.array(so)])
    assert list(found) == ["spearman", "pearson", "mse"]
    assert found["spearman"] == pytest.approx(spearmanr(said, so).statistic)
    assert found["pearson"] == pytest.approx(pearsonr(said, so).statistic)
    assert found["mse"] == pytest.approx(np.square(said - so).mean())


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("said", "so", "mse"),
    [([2.0, 2.0, 2.0], [1.0, 2.0, 3.0], 2 / 3), ([1.0, 3.0], [2.0, 2.0], 1.0), ([1.0], [2.0], 1.0), ([], [], 0.0)],
)
def test_a_correlation_that_is_not_defined_is_0(said: list[float], so: list[float], mse: float) -> None:
    found = task().metrics(pa.array(said, pa.float32()), [], [pa.array(so, pa.float64())])
    assert found == pytest.approx({"spearman": 0.0, "pearson": 0.0, "mse": mse})


# Training.


def make_job(tiny_encoder: Path, tmp_path: Path, **settings: Any) -> TrainJob:
    """The word in the second text decides the number."""
    draw = np.random.default_rng(0)
    words = ["terrible", "bad", "nice", "great", "excellent"]
    scores = draw.integers(0, 5, 200)
    table = {
        "text": [f"the film number {row}" for row in range(200)],
        "text_pair": [f"it was {words[score]}" for score in scores],
        "score": scores.astype(np.float64),
    }
    pq.write_table(pa.table(table), tmp_path / "table.parquet")
    columns = settings.pop("columns", {"label": "score"})
    defaults = {"engine": "local", "batch_size": 16, "learning_rate": 3e-3, "threads": 1, "epochs": 12}
    return TrainJob(
        model=str(tiny_encoder),
        output=str(tmp_path / "model"),
        task="regression",
        data=DataOptions(train=str(tmp_path / "table.parquet"), validation_fraction=0.2, columns=columns),
        **(defaults | settings),
    )


def test_it_learns_from_both_texts(tiny_encoder: Path, tmp_path: Path) -> None:
    result = train(make_job(tiny_encoder, tmp_path), tell=lambda _: None)
    assert result.metrics["spearman"] > 0.8
    assert result.baseline is None
    trained = load_bundle(result.bundle)
    assert trained.card.inputs == PAIR
    assert (trained.config.problem_type, trained.config.num_labels) == ("regression", 1)
    columns = {"text": ["the film"] * 2, "text_pair": ["it was terrible", "it was excellent"]}
    low, high = annotate(str(result.bundle), columns)
    assert low < 2 < high


@pytest.mark.parametrize(
    ("settings", "inputs"),
    [
        ({"options": {"pair": False}}, ["text"]),
        ({"columns": {"label": "score", "text": "text"}}, PAIR),
        ({"columns": {"label": "score", "text_pair": "text_pair"}}, PAIR),
    ],
)
def test_what_a_job_reads(tiny_encoder: Path, tmp_path: Path, settings: dict[str, Any], inputs: list[str]) -> None:
    it = make_job(tiny_encoder, tmp_path, **settings)
    card, data, _ = prepare(it, load_bundle(it.model))
    assert card.inputs == inputs
    assert (data.train.pieces.tokens.types is not None) == (inputs == PAIR)


def test_a_table_without_numbers_is_refused(tiny_encoder: Path, tmp_path: Path) -> None:
    it = make_job(tiny_encoder, tmp_path, columns={"label": "text_pair", "text_pair": "text"})
    with pytest.raises(BertRayError, match=r"table\.parquet: the label column is"):
        train(it, tell=lambda _: None)


def test_the_scale_has_names_that_tell_its_parts_apart() -> None:
    def names(so: list[float]) -> list[str]:
        table = numbers._along(np.zeros(len(so)), np.array(so), True)
        return [str(row[0]) for row in table.rows]

    assert names(list(range(1990, 2021))) == [f"{year} to {year + 6}" for year in range(1990, 2020, 6)]
    assert names([1_234_567.0, 1_234_568.0]) == ["1234567", "1234568"]
    assert names([0.5, 1.0]) == ["0.5", "1"]
    assert names([1990.0, 2000.0, 2010.0]) == ["1990", "2000", "2010"]
    assert [shown_number(value) for value in (0.12345, 12_346.0, -12_349.25)] == ["0.1235", "12,346.0", "-12,349.2"]


def test_half_precision_does_not_round_the_number(tmp_path: Path, texts: list[str]) -> None:
    """Years would be multiples of 8, and every score of a hundred half a point off."""
    from safetensors.torch import load_file, save_file

    card = {"task": "regression", "inputs": ["text"]}
    place = Path(save(tmp_path, "BertForSequenceClassification", card, num_labels=1, problem_type="regression"))
    (place / "bert_ray.json").unlink()
    weights = load_file(place / "model.safetensors")
    weights["classifier.bias"] += 1987.0
    weights["classifier.weight"] *= 10.0
    save_file(weights, place / "model.safetensors", metadata={"format": "pt"})
    columns = {"text": texts[:40]}
    full, half = (
        AnnotatorSpec(model=str(place), task="regression", options={"pair": False}, dtype=dtype, device="cpu").build()
        for dtype in ("fp32", "bf16")
    )
    said, so = (each(pa.table(columns))["regression"].to_numpy() for each in (half, full))
    assert not np.array_equal(said, np.round(said / 8) * 8), "they are rounded to what bf16 holds"
    assert len(set(said)) > 20
    np.testing.assert_allclose(said, so, atol=1.0)
