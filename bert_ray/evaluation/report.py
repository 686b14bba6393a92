"""report.html: one file that opens offline, in light and dark, on a screen or on paper.

No script and nothing fetched: the style sheet and the drawings are inside. All text goes through jinja2's autoescape,
so a review that contains markup is shown, not run.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bert_ray.evaluation.charts import curves

if TYPE_CHECKING:
    from bert_ray.evaluation.evaluate import Evaluation
    from bert_ray.evaluation.metrics import Scores
    from bert_ray.model.bundle import Bundle

# A matrix of more labels is too wide to read; then the most frequent confusions are listed instead.
_MATRIX_LABELS = 16
_CONFUSIONS = 20


def write_report(evaluation: Evaluation, bundle: Bundle, table: str) -> Path:
    """Write the report of an evaluation to `evaluation.report`.

    Args:
        evaluation: what came out.
        bundle: the model; its card may carry the training's history under `provenance["history"]`.
        table: where the rows came from, as the user named it.
    """
    page = render(evaluation, bundle, table)
    evaluation.report.write_text(page, "utf-8")
    return evaluation.report


def render(evaluation: Evaluation, bundle: Bundle, table: str) -> str:
    """The report as HTML."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    card, scores = bundle.card, evaluation.scores
    history = card.provenance.get("history") or []
    losses = {"train_loss": "training", "validation_loss": "validation"}
    metrics = {"accuracy": "accuracy", "macro_f1": "macro F1"}
    drawings = [
        ("Loss", curves("loss", history, losses)),
        ("On the validation rows", curves("metric", history, metrics, floor=card.provenance.get("majority_baseline"))),
    ]
    environment = Environment(
        loader=PackageLoader("bert_ray.evaluation", "templates"), autoescape=True, undefined=StrictUndefined
    )
    environment.filters.update(percent=_percent, count=lambda number: f"{number:,}")
    return environment.get_template("report.html").render(
        name=card.name or card.task,
        reference=bundle.reference,
        table=table,
        evaluation=evaluation,
        scores=scores,
        matrix=_matrix(scores) if len(card.labels) <= _MATRIX_LABELS else None,
        confusions=_confusions(scores),
        drawings=[(title, Markup(svg)) for title, svg in drawings if svg],
        card=_card(bundle),
        gain=scores.accuracy - scores.majority_accuracy,
    )


def _matrix(scores: Scores) -> list[dict[str, Any]]:
    """Rows of the confusion matrix; `share` is of the row, and says how strongly a cell is tinted."""
    totals = scores.confusion.sum(axis=1).clip(min=1)
    return [
        {
            "label": item.label,
            "cells": [
                {
                    "count": int(count),
                    "share": float(count / totals[row]) if totals[row] else 0.0,
                    "right": row == column,
                }
                for column, count in enumerate(scores.confusion[row])
            ],
        }
        for row, item in enumerate(scores.labels)
    ]


def _confusions(scores: Scores) -> list[dict[str, Any]]:
    """The most frequent confusions: what is so, what was said, how often."""
    found: list[dict[str, Any]] = [
        {"label": item.label, "said": scores.labels[column].label, "count": int(count)}
        for row, item in enumerate(scores.labels)
        for column, count in enumerate(scores.confusion[row])
        if row != column and count
    ]
    return sorted(found, key=lambda entry: -entry["count"])[:_CONFUSIONS]


def _card(bundle: Bundle) -> list[tuple[str, str]]:
    """The model card as (name, value) pairs; nested provenance becomes dotted names."""
    card = bundle.card
    pairs = [
        ("reference", bundle.reference),
        ("task", card.task),
        ("labels", ", ".join(card.labels)),
        ("inputs", ", ".join(card.inputs)),
        ("longest row", f"{card.max_length} tokens"),
        ("architecture", f"{bundle.config.model_type}, {bundle.config.num_hidden_layers} layers"),
        ("fingerprint", card.fingerprint),
    ]
    pairs += [(f"validation {name}", f"{value:.4f}") for name, value in card.metrics.items()]
    pairs += _flat({key: value for key, value in card.provenance.items() if key != "history"})
    return pairs


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            pairs += _flat(value, f"{prefix}{name}.")
        elif value is not None:
            pairs.append((f"{prefix}{name}", f"{value:.6g}" if isinstance(value, float) else str(value)))
    return pairs


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"
