"""Histories and what is said of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from bert_ray.evaluation.evaluate import levers_of
from bert_ray.evaluation.overfitting import CAVEAT, Levers, judge, metrics_of
from bert_ray.model.bundle import load_bundle

# A job with the defaults, on a base without dropout.
PLAIN = Levers(job={"epochs": 5, "weight_decay": 0.01, "layer_decay": 1.0, "early_stopping": 0}, layers=6)
ALL_ON = {
    "layer_decay": 0.8,
    "dropout": 0.2,
    "label_smoothing": 0.1,
    "weight_decay": 0.01,
    "freeze_layers": 2,
    "l1": 1e-7,
    "early_stopping": 2,
    "augmentation": {"deletion": 0.1, "swap": 0.0, "characters": 0.0, "substitution": 0.0},
}


def history(train: list[float], validation: list[float], accuracy: list[float]) -> list[dict[str, float]]:
    rows = zip(train, validation, accuracy, strict=True)
    return [
        {"epoch": epoch, "step": 9 * epoch, "train_loss": one, "validation_loss": other, "accuracy": metric}
        for epoch, (one, other, metric) in enumerate(rows, start=1)
    ]


RISES = history([0.6, 0.4, 0.2, 0.1, 0.05], [0.55, 0.45, 0.5, 0.6, 0.8], [0.7, 0.8, 0.78, 0.77, 0.76])


@pytest.mark.parametrize(
    ("found", "best", "verdict", "parts"),
    [
        (
            RISES,
            2,
            "overfits",
            [
                "After epoch 2 the training loss fell on from 0.4000 to 0.0500",
                "the validation loss rose from 0.4500 to 0.8000",
                "of epoch 2, comes before that; early_stopping: 2 would have spared epoch 5.",
                "Next lever: layer_decay: 0.8.",
            ],
        ),
        # The best metric comes after the lowest loss: right as often, but too sure.
        (RISES, 4, "overfits", ["of epoch 4, comes after that", "Next lever: label_smoothing: 0.1."]),
        # A gap without a rise.
        (history([0.5, 0.2], [0.55, 0.54], [0.7, 0.72]), 2, "overfits", ["more than 2 times the training loss"]),
        # The same ratio on a task that is solved.
        (history([0.05, 0.01], [0.04, 0.039], [0.98, 0.99]), 2, "neither", ["neither overfits nor underfits"]),
        # The validation loss rose while the training loss did too: a bad rate, no overfitting.
        (history([0.5, 0.6], [0.5, 0.6], [0.8, 0.7]), 1, "neither", []),
        (history([0.69, 0.69], [0.69, 0.69], [0.5, 0.51]), 2, "underfits", ["hardly above the 0.5000", "epochs: 10"]),
        (
            history([0.7, 0.6, 0.5], [0.7, 0.6, 0.5], [0.6, 0.7, 0.8]),
            3,
            "underfits",
            ["not done learning", "epochs: 10"],
        ),
        (history([0.5, 0.4, 0.35], [0.45, 0.4, 0.39], [0.8, 0.84, 0.85]), 3, "neither", ["more training rows"]),
        (history([0.6], [0.5], [0.8]), 1, "neither", ["After one evaluation", "a smaller evaluate_every"]),
        ([], None, "unknown", ["no history"]),
        ([{"epoch": 1, "train_loss": 0.5}], 1, "unknown", ["without validation rows", "data.validation_fraction: 0.1"]),
        (history([float("nan"), 0.4], [0.5, 0.4], [0.5, 0.8]), 2, "unknown", []),
    ],
)
def test_verdicts(found: list[dict[str, float]], best: int | None, verdict: str, parts: list[str]) -> None:
    fit = judge(found, best, "accuracy", PLAIN, baseline=0.5)
    assert fit.verdict == verdict, fit.words
    for part in parts:
        assert part in fit.words


def test_one_epoch_is_made_three() -> None:
    once = history([0.6], [0.5], [0.8])
    assert "Next lever: epochs: 3." in judge(once, 1, "accuracy", Levers(job={"epochs": 1})).words
    assert "Next lever: epochs: 3." in judge(once, 1, "accuracy", Levers()).words
    words = judge(once, 1, "accuracy", Levers(job={"epochs": 1, "steps": 30})).words
    assert "After one evaluation" in words and "Next lever: a smaller evaluate_every." in words


def test_the_figures_are_those_of_the_best_epoch_and_the_last() -> None:
    fit = judge(RISES, 2, "accuracy", PLAIN, tested=0.75)
    assert fit.figures == pytest.approx(
        {
            "epochs": 5,
            "best_epoch": 2,
            "train_loss_best_epoch": 0.4,
            "train_loss_last_epoch": 0.05,
            "validation_loss_best_epoch": 0.45,
            "validation_loss_last_epoch": 0.8,
            "validation_accuracy_best_epoch": 0.8,
            "validation_accuracy_last_epoch": 0.76,
            "accuracy_fall_since_best": 0.04,
            "accuracy_here_minus_validation": -0.05,
        }
    )
    assert "Accuracy is 0.7500 on this table and was 0.8000 on the validation rows." in fit.words


@pytest.mark.parametrize(
    ("key", "suggested"),
    [
        ("layer_decay", "augmentation: {deletion: 0.1}"),
        ("augmentation", "label_smoothing: 0.1"),
        ("label_smoothing", "freeze_layers: 2"),
        ("freeze_layers", "l1: 1e-7"),
        ("l1", "dropout: 0.1"),
    ],
)
def test_a_lever_that_is_on_is_not_proposed(key: str, suggested: str) -> None:
    """The levers one after the other: all up to `key` are on."""
    job: dict[str, Any] = {"weight_decay": 0.01}
    for name in ("layer_decay", "augmentation", "label_smoothing", "freeze_layers", "l1"):
        job[name] = ALL_ON[name]
        if name == key:
            break
    levers = Levers(job=job, layers=6)
    assert f"Next lever: {suggested}." in judge(RISES, 2, "accuracy", levers).words


def test_with_all_levers_on_more_rows_are_asked_for() -> None:
    words = judge(RISES, 2, "accuracy", Levers(job=ALL_ON, dropout=0.2, layers=6)).words
    assert "All levers are on already" in words
    assert "early_stopping:" not in words


def test_what_a_task_refuses_is_not_proposed() -> None:
    levers = Levers(job={"layer_decay": 0.8}, dropout=0.1, layers=6, refused={"augmentation", "label_smoothing"})
    assert "Next lever: freeze_layers: 2." in judge(RISES, 2, "accuracy", levers).words
    assert "Next lever: freeze_layers: 2." in judge(RISES, 4, "accuracy", levers).words


@pytest.mark.parametrize(
    ("job", "dropout", "suggested"),
    [
        ({"epochs": 3}, 0.1, "epochs: 6"),
        ({"epochs": 3, "freeze_layers": 4}, 0.1, "freeze_layers: 0"),
        ({"epochs": 3, "dropout": 0.5}, 0.5, "dropout: 0.1"),
        ({"epochs": 3, "l1": 1e-3}, 0.1, "l1: 0"),
        # A corpus, read twice and judged three times; and one that is read for so many steps, whatever its epochs.
        ({"epochs": 2}, 0.1, "epochs: 4"),
        ({"epochs": 3, "steps": 500}, 0.1, "steps: 1000"),
    ],
)
def test_against_underfitting_what_holds_back_is_eased_first(
    job: dict[str, Any], dropout: float, suggested: str
) -> None:
    flat = history([0.69] * 3, [0.69] * 3, [0.5] * 3)
    fit = judge(flat, 3, "accuracy", Levers(job=job, dropout=dropout), baseline=0.5)
    assert suggested in fit.words


def test_every_lever_is_a_key_of_the_training_job() -> None:
    from dataclasses import fields

    from bert_ray.training.job import AugmentationOptions, TrainJob

    keys = {item.name for item in fields(TrainJob)}
    assert set(ALL_ON) | {"epochs"} <= keys
    assert {"deletion", "swap", "characters", "substitution"} <= {item.name for item in fields(AugmentationOptions)}


def test_losses_of_nought_are_no_division() -> None:
    assert judge(history([0.0, 0.0], [0.0, 0.0], [1.0, 1.0]), 1, "accuracy", PLAIN).verdict == "neither"


def test_the_caveat_says_how_the_training_loss_is_taken() -> None:
    assert "the job's dropout on and while the weights still moved" in CAVEAT


def test_the_task_s_own_metric_comes_first() -> None:
    found = metrics_of([{"epoch": 1, "train_loss": 1.0, "macro_f1": 0.5, "accuracy": 0.6}], "accuracy")
    assert found == ["accuracy", "macro_f1"]


def test_a_pretrained_model_is_not_told_to_smooth_labels(tiny_encoder: Path, tmp_path: Path) -> None:
    bundle = load_bundle(tiny_encoder)
    card = replace(bundle.card, task="fill-mask", provenance={"job": {"task": "pretraining", "layer_decay": 0.8}})
    levers = levers_of(replace(bundle, card=card), [])
    assert {"augmentation", "label_smoothing"} <= set(levers.refused)
    assert "Next lever: freeze_layers" in judge(RISES * 2, 2, "accuracy", replace(levers, layers=6)).words


def test_what_the_bundle_was_trained_with_is_known(tiny_bundle: Path, tiny_encoder: Path) -> None:
    levers = levers_of(load_bundle(tiny_bundle), [pa.array(["negative", "positive"])])
    assert (set(levers.refused), levers.layers, levers.dropout) == (set(), 2, 0.1)
    assert "label_smoothing" in levers_of(load_bundle(tiny_encoder), []).refused
