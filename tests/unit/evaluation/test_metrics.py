"""The figures, against counts made by hand."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from bert_ray.evaluation.metrics import score


def test_figures_of_a_table_counted_by_hand() -> None:
    # truth:     a a a a b b c        said: a a a b b c c
    scores = score(["a", "b", "c"], np.array([0, 0, 0, 0, 1, 1, 2]), np.array([0, 0, 0, 1, 1, 2, 2]))
    assert scores.confusion.tolist() == [[3, 1, 0], [0, 1, 1], [0, 0, 1]]
    assert scores.accuracy == pytest.approx(5 / 7)
    a, b, c = scores.labels
    assert (a.rows, a.predicted, a.precision, a.recall) == (4, 3, 1.0, 0.75)
    assert (b.precision, b.recall) == (0.5, 0.5)
    assert (c.precision, c.recall) == (0.5, 1.0)
    # F1: 2·1·¾/(1+¾) = 6/7;  ½;  2·½·1/(½+1) = 2/3.
    assert scores.macro_f1 == pytest.approx((6 / 7 + 1 / 2 + 2 / 3) / 3)


def test_the_majority_baseline_says_one_label_always() -> None:
    scores = score(["a", "b"], np.array([1, 1, 1, 0]), np.array([0, 0, 0, 0]))
    assert (scores.majority_label, scores.majority_accuracy) == ("b", 0.75)
    # b: precision ¾, recall 1, F1 6/7; a: 0.
    assert scores.majority_macro_f1 == pytest.approx(3 / 7)
    assert scores.accuracy == 0.25


def test_a_label_without_rows_counts_as_zero_and_is_listed() -> None:
    scores = score(["a", "b", "never"], np.array([0, 1]), np.array([0, 1]))
    assert scores.accuracy == 1.0
    assert scores.macro_f1 == pytest.approx(2 / 3)
    assert (scores.labels[2].rows, scores.labels[2].f1) == (0, 0.0)
    assert scores.confusion.shape == (3, 3)


def test_the_figures_are_those_of_the_training_loop(tiny_bundle: object) -> None:
    from bert_ray.model.bundle import load_bundle

    generator = np.random.default_rng(0)
    said, truth = generator.integers(0, 2, 200), generator.integers(0, 2, 200)
    names = ["negative", "positive"]
    annotations = pa.StructArray.from_arrays(
        [pa.array([names[label] for label in said]), pa.array(np.ones(200, np.float32))], ["label", "score"]
    )
    during = load_bundle(tiny_bundle).task.metrics(annotations, [], [pa.array(truth)])  # type: ignore[arg-type]
    after = score(names, truth, said).figures()
    assert {name: during[name] for name in ("accuracy", "macro_f1")} == pytest.approx(
        {name: after[name] for name in ("accuracy", "macro_f1")}
    )


def test_nothing_to_compare_is_refused() -> None:
    with pytest.raises(ValueError, match="0 labels"):
        score(["a"], np.array([], np.int64), np.array([], np.int64))
    with pytest.raises(ValueError, match="in pairs"):
        score(["a"], np.array([0, 0]), np.array([0]))
