"""report.html: one file that opens offline, in light and dark, on a screen or on paper.

No script and nothing fetched: the style sheet and the drawings are inside. All text goes through jinja2's autoescape,
so a review that contains markup is shown, not run. What a report shows is its task's to say, in sections of a few
kinds (`model/tasks/sections.py`); here each kind is laid out once.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bert_ray.evaluation.charts import curves, scatter, shares
from bert_ray.evaluation.overfitting import CAVEAT, metrics_of
from bert_ray.model.architectures import encoder_config
from bert_ray.model.tasks.sections import MATRIX_LABELS, Case, Confusion, Curve, Mark, Scatter, Section, shown_number

if TYPE_CHECKING:
    from bert_ray.evaluation.evaluate import Evaluation
    from bert_ray.model.annotator import Annotator
    from bert_ray.model.bundle import Bundle
    from bert_ray.model.tasks.base import Task

# One of more than these takes the page's whole width.
_HALF_LABELS = 4
_CONFUSIONS = 20
# Figures that are shown large.
_LARGE = 2
# A metric as it is written.
_SPELLED = {"f1": "F1", "mrr": "MRR", "mse": "MSE", "bleu": "BLEU", "chrf": "chrF"}


def write_report(evaluation: Evaluation, annotator: Annotator, table: str) -> Path:
    """Write the report of an evaluation to `evaluation.report`.

    Args:
        evaluation: what came out.
        annotator: what was measured; its bundle's card may carry the training's history under
            `provenance["history"]`.
        table: where the rows came from, as the user named it.
    """
    page = render(evaluation, annotator.bundle, annotator.task, table)
    evaluation.report.write_text(page, "utf-8")
    return evaluation.report


def render(evaluation: Evaluation, bundle: Bundle, task: Task, table: str) -> str:
    """The report as HTML."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("bert_ray.evaluation", "templates"), autoescape=True, undefined=StrictUndefined
    )
    environment.filters.update(
        percent=_percent, count=lambda number: f"{number:,}", spelled=spelled, cell=_cell, pieces=_pieces
    )
    figures = [
        {
            "name": name,
            "value": value,
            "share": name not in task.plain_metrics and 0.0 <= value <= 1.0,
            "floor": evaluation.constant.figures.get(name) if evaluation.constant else None,
        }
        for name, value in evaluation.figures.items()
    ]
    figures.sort(key=lambda item: item["name"] != task.metric)
    floor = evaluation.constant.figures.get(task.metric) if evaluation.constant else None
    return environment.get_template("report.html").render(
        name=task.name,
        headline=_headline(task, evaluation.figures),
        reference=bundle.reference,
        table=table,
        evaluation=evaluation,
        large=figures[:_LARGE],
        small=figures[_LARGE:],
        sections=[(type(section).__name__.lower(), section, _prepared(section)) for section in evaluation.sections],
        matrix_labels=MATRIX_LABELS,
        half_labels=_HALF_LABELS,
        drawings=[(title, Markup(svg)) for title, svg in _history(bundle) if svg],
        fit=evaluation.fit,
        caveat=CAVEAT,
        card=_card(bundle),
        no_better=floor is not None and evaluation.figures[task.metric] <= floor,
    )


def spelled(name: str) -> str:
    """A metric's name in words: `macro_f1` is "Macro F1"."""
    words = [_SPELLED.get(word, word) for word in name.split("_")]
    return " ".join([words[0][:1].upper() + words[0][1:] if words[0] != "chrF" else words[0], *words[1:]])


def _headline(task: Task, figures: Mapping[str, float]) -> str:
    try:
        return task.headline.format(**figures).replace("%", " %") if task.headline else _reached(task, figures)
    except KeyError:  # A task built on another, with metrics of its own.
        return _reached(task, figures)


def _reached(task: Task, figures: Mapping[str, float]) -> str:
    value = figures[task.metric]
    plain = task.metric in task.plain_metrics or not 0.0 <= value <= 1.0
    return f"reaches {spelled(task.metric)} {value:.3f}" if plain else f"reaches {spelled(task.metric)} {value:.1%}"


def _prepared(section: Section) -> Any:
    """What the page needs of a section besides itself: a drawing, the rows of a matrix."""
    from markupsafe import Markup

    if isinstance(section, Curve):
        return Markup(shares(section))
    if isinstance(section, Scatter):
        return Markup(scatter(section))
    if isinstance(section, Confusion):
        return _matrix(section) if len(section.labels) <= MATRIX_LABELS else _confusions(section)
    return None


def _matrix(confusion: Confusion) -> list[dict[str, Any]]:
    """Rows of the confusion matrix; `share` is of the row, and says how strongly a cell is tinted."""
    totals = confusion.counts.sum(axis=1).clip(min=1)
    return [
        {
            "label": label,
            "cells": [
                {"count": int(count), "share": float(count / totals[row]), "right": row == column}
                for column, count in enumerate(confusion.counts[row])
            ],
        }
        for row, label in enumerate(confusion.labels)
    ]


def _confusions(confusion: Confusion) -> list[dict[str, Any]]:
    """The most frequent confusions: what is so, what was said, how often."""
    found: list[dict[str, Any]] = [
        {"label": label, "said": said, "count": count} for label, said, count in confusion.cells() if label != said
    ]
    return sorted(found, key=lambda entry: -entry["count"])[:_CONFUSIONS]


def _history(bundle: Bundle) -> list[tuple[str, str]]:
    """(title, drawing) of the training's losses and metrics by epoch."""
    history = bundle.card.provenance.get("history") or []
    task = bundle.task
    # Metrics in units of their own share no axis with others.
    names = metrics_of(history, task.metric)[:_LARGE]
    names = [name for name in names if (name in task.plain_metrics) == (names[0] in task.plain_metrics)]
    if names and names[0] in task.plain_metrics:
        names = names[:1]
    lines = {name: spelled(name) if name in _SPELLED else spelled(name).lower().replace("f1", "F1") for name in names}
    floor = bundle.card.provenance.get("majority_baseline")
    steps = [
        {"step": step, "loss": loss, "norm": norm} for step, loss, norm in bundle.card.provenance.get("curve") or []
    ]
    return [
        ("Loss of the steps", curves("steps", steps, {"loss": "training"}, over="step")),
        ("Norm of the gradient", curves("norms", steps, {"norm": "before it is clipped"}, over="step")),
        ("Loss", curves("loss", history, {"train_loss": "training", "validation_loss": "validation"})),
        ("On the validation rows", curves("metric", history, lines, floor=floor)),
    ]


def _pieces(case: Case) -> list[tuple[str, Mark | None]]:
    """A case's last text in pieces, marked and unmarked by turns."""
    text, place, found = case.texts[-1][1], 0, []
    for mark in case.marks:
        found += [(text[place : mark.start], None), (text[mark.start : mark.end], mark)]
        place = mark.end
    return [piece for piece in [*found, (text[place:], None)] if piece[0]]


def _cell(value: str | int | float, as_share: bool) -> str:
    """A cell of a table: text as it is, counts with commas, shares as per cent."""
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return f"{value:,}"
    return f"{100 * value:.1f}" if as_share else shown_number(value)


def _card(bundle: Bundle) -> list[tuple[str, str]]:
    """The model card as (name, value) pairs; nested provenance becomes dotted names."""
    card = bundle.card
    layers = getattr(encoder_config(bundle.config), "num_hidden_layers", None)
    pairs = [
        ("reference", bundle.reference),
        ("task", card.task),
        ("labels", ", ".join(card.labels)),
        ("inputs", ", ".join(card.inputs)),
        ("longest row", f"{card.max_length} tokens"),
        ("architecture", bundle.config.model_type + (f", {layers} layers" if layers else "")),
        ("fingerprint", card.fingerprint),
    ]
    pairs += [(f"validation {name}", f"{value:.4f}") for name, value in card.metrics.items()]
    pairs += _flat({key: value for key, value in card.provenance.items() if key not in ("history", "curve")})
    return [(name, value) for name, value in pairs if value]


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
