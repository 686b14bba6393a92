"""Figures by label, against counts made by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from scipy.sparse import issparse

from bert_ray.model.card import Card
from bert_ray.model.tasks import Classification
from bert_ray.model.tasks.label_report import label_sets_report, majority, one_label_report
from bert_ray.model.tasks.sections import Confusion, as_data, text_cases


def annotations(said: list[str | None], scores: list[float] | None = None) -> pa.Array:
    kind = pa.struct([("label", pa.string()), ("score", pa.float32())])
    values = scores or [0.5] * len(said)
    rows = [
        None if label is None else {"label": label, "score": value} for label, value in zip(said, values, strict=True)
    ]
    return pa.array(rows, kind)


def report(
    names: list[str], so: list[int], said: list[str | None], scores: list[float] | None = None
) -> dict[str, Any]:
    texts = pa.array([f"text {row}" for row in range(len(so))])
    found = one_label_report(names, annotations(said, scores), np.array(so), ["text"], [texts], 20)
    return {section.key: section for section in found}


def test_figures_of_a_table_counted_by_hand() -> None:
    found = report(["a", "b", "c"], [0, 0, 0, 0, 1, 1, 2], ["a", "a", "a", "b", "b", "c", "c"])
    assert found["confusion"].counts.tolist() == [[3, 1, 0], [0, 1, 1], [0, 0, 1]]
    # label, rows, said, precision, recall, F1: 2·1·¾/(1+¾) = 6/7; ½; 2·½·1/(½+1) = 2/3.
    assert found["labels"].rows == (
        ("a", 4, 3, 1.0, 0.75, pytest.approx(6 / 7)),
        ("b", 2, 2, 0.5, 0.5, 0.5),
        ("c", 1, 2, 0.5, 1.0, pytest.approx(2 / 3)),
    )
    assert [case.row for case in found["mistakes"].cases] == [3, 5]
    # Scores of what was not said are not there, so that there is no curve.
    assert "precision-recall" not in found


def test_of_many_labels_what_occurs_is_kept() -> None:
    names = [f"label {number}" for number in range(17)]
    counts = np.zeros((17, 17), np.int64)
    counts[0, 0], counts[3, 16] = 5, 2
    section = Confusion(key="confusion", title="", labels=tuple(names), counts=counts)
    assert as_data(section) == [
        {"label": "label 0", "said": "label 0", "count": 5},
        {"label": "label 3", "said": "label 16", "count": 2},
    ]
    few = Confusion(key="confusion", title="", labels=tuple(names[:2]), counts=counts[:2, :2])
    assert as_data(few) == [[5, 0], [0, 0]]


def test_the_majority_says_one_label_always() -> None:
    found = majority(["a", "b"], np.array([1, 1, 1, 0]))
    # b: precision ¾, recall 1, F1 6/7; a: 0.
    assert (found.says, found.figures) == ("b", {"accuracy": 0.75, "macro_f1": pytest.approx(3 / 7)})


def test_the_majority_s_macro_f1_is_scikit_learn_s() -> None:
    from sklearn.metrics import f1_score

    so = np.random.default_rng(0).integers(0, 4, 200)
    expected = f1_score(so, np.full(200, np.bincount(so).argmax()), average="macro", zero_division=0.0, labels=range(5))
    assert majority(list("abcde"), so).figures["macro_f1"] == pytest.approx(expected)


def test_a_label_without_rows_is_listed() -> None:
    found = report(["a", "b", "never"], [0, 1], ["a", "b"])
    assert found["labels"].rows[2][:3] == ("never", 0, 0)
    assert found["confusion"].counts.shape == (3, 3)
    assert found["mistakes"].cases == ()


def test_a_row_without_a_label_is_a_mistake_in_no_column() -> None:
    found = report(["a", "b"], [0, 1], [None, "b"])
    assert found["confusion"].counts.tolist() == [[0, 0], [0, 1]]
    assert found["confusion"].note.startswith("1 rows got no label")
    assert [(case.said, case.so) for case in found["mistakes"].cases] == [("no label", "a")]


@pytest.mark.parametrize(("so", "named"), [([0, 0, 0, 1], "b"), ([0, 1, 1, 1], "a"), ([0, 0, 1, 1], "b")])
def test_of_two_labels_the_second_or_a_rare_first_has_the_curve(so: list[int], named: str) -> None:
    curve = report(["a", "b"], so, ["a"] * 4, [0.9, 0.8, 0.7, 0.6])["precision-recall"]
    assert [line.name.split()[0] for line in curve.lines] == [named]


def test_the_curve_is_scikit_learn_s() -> None:
    from sklearn.metrics import average_precision_score, precision_recall_curve

    generator = np.random.default_rng(0)
    so, scores = generator.integers(0, 2, 100), generator.uniform(0.5, 1.0, 100)
    so[:60] = 0
    said = generator.integers(0, 2, 100)
    found = report(["a", "b"], so.tolist(), ["ab"[label] for label in said], scores.tolist())
    rare = np.where(said == 1, scores.astype(np.float32), 1 - scores.astype(np.float32)).astype(np.float64)
    precision, recall, _ = precision_recall_curve(so, rare)
    (line,) = found["precision-recall"].lines
    np.testing.assert_allclose(line.x, recall[::-1])
    np.testing.assert_allclose(line.y, precision[::-1])
    assert found["labels"].rows[1][-1] == pytest.approx(average_precision_score(so, rare), abs=1e-6)


def test_every_label_s_score_is_read_from_the_annotations() -> None:
    import torch

    from bert_ray.model.tasks.base import Outputs
    from bert_ray.model.tokenization import Pieces, Ragged

    names = list("abcde")
    task = Classification(Card(task="classification", labels=names), None, {"scores": True})
    logits = torch.randn(50, 5, generator=torch.Generator().manual_seed(0)).numpy()
    tokens = Ragged(ids=np.zeros(0, np.int32), types=None, offsets=np.zeros(51, np.int64))
    said = task.decode(Outputs(values=logits), Pieces(tokens=tokens, rows=np.arange(50)), [])
    # As an annotator gives them: taken, with nulls between.
    taken = said.take(pa.array([None if row % 7 == 3 else 49 - row for row in range(50)]))
    texts = pa.array(["t"] * 50)
    found = one_label_report(names, taken, np.arange(50) % 5, ["text"], [texts], 3)
    (curve,) = [section for section in found if section.key == "precision-recall"]
    # More than three: all together, the best, the worst.
    assert len(curve.lines) == 3
    assert curve.lines[0].name.startswith("all labels")
    from sklearn.metrics import average_precision_score

    powers = np.exp(logits[::-1])
    expected = powers / powers.sum(axis=1, keepdims=True)
    expected[np.arange(50) % 7 == 3] = 0.0
    (table,) = [section for section in found if section.key == "labels"]
    for label, row in enumerate(table.rows):
        assert row[-1] == pytest.approx(
            average_precision_score(np.arange(50) % 5 == label, expected[:, label]), abs=1e-6
        )


def test_sets_of_labels() -> None:
    so, said = np.array([[1, 0], [1, 1], [0, 0]]), np.array([[1, 0], [0, 1], [0, 1]])
    scores = np.array([[0.9, 0.1], [0.4, 0.8], [0.1, 0.95]])
    texts = pa.array(["x", "y", "z"])
    labels, _, mistakes = label_sets_report(["a", "b"], so, said, scores, ["text"], [texts], 20)
    assert labels.rows[0][:5] == ("a", 2, 1, 1.0, 0.5)
    assert labels.rows[1][:5] == ("b", 1, 2, 0.5, 1.0)
    # The surest error first: 0.95 for a label that is not so, then 0.6 missing for one that is.
    assert [(case.row, case.said, case.so) for case in mistakes.cases] == [(2, "b", "none"), (1, "b", "a, b")]


def test_one_label_alone() -> None:
    so, said = np.array([[1], [0], [1]]), np.array([[1], [1], [0]])
    labels, mistakes = label_sets_report(["a"], so, said, None, ["text"], [pa.array(["x", "y", "z"])], 20)
    assert labels.rows[0][:5] == ("a", 2, 2, 0.5, 0.5)
    assert [case.row for case in mistakes.cases] == [1, 2]


def test_of_texts_the_worst_are_shown_and_a_quarter_as_many_of_the_best() -> None:
    texts = [pa.array(list("abcdefghij"))]
    found = text_cases(
        ["text"], texts, list("abcdefghij"), list("abcdefghij"), [0.1, 0.2, 0.3, 0.4] + [1.0] * 6, 4, "F"
    )
    assert [(section.key, len(section.cases)) for section in found] == [("mistakes", 4), ("right", 1)]


def test_ten_thousand_labels_take_no_square_of_memory() -> None:
    names = [f"label {place:05}" for place in range(30_000)]
    so, said = np.array([0, 5, 5, 29_999]), ["label 00000", "label 00005", "label 00007", None]
    found = one_label_report(names, annotations(said, None), so, ["text"], [pa.array(["a", "b", "c", "d"])], 3)
    confusion = next(section for section in found if section.key == "confusion")
    assert confusion.cells() == [
        ("label 00000", "label 00000", 1),
        ("label 00005", "label 00005", 1),
        ("label 00005", "label 00007", 1),
    ]
    assert "1 rows got no label" in confusion.note
    assert issparse(confusion.counts)
