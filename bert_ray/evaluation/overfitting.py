"""Whether a model overfits, underfits or neither, told from its training's history, and which lever to pull next.

A pure function of numbers: `judge`. The levers are keys of the training job; docs/overfitting.md explains them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

# The validation loss has risen where it ends this much above its lowest: between epochs it wavers by some per cent.
_RISEN = 1.10
# The training loss has fallen on where it ends this much below what it was then.
_FALLEN = 0.90
# Without a rise, a validation loss of twice the training loss is a gap. The training loss is a mean over the epoch,
# dropout on, and so overstated: a ratio of two is more than that much.
_GAP = 2.0
# A metric this near to 1 leaves nothing that a lever could bring; losses near 0 have wild ratios.
_ROOM = 0.05
# A metric that is not further than this above the best constant answer has learned next to nothing.
_MARGIN = 0.02
# A validation loss that fell by more than this in the last epoch was not done falling.
_STILL_FALLING = 0.05
# Dropout below this rate is as good as none; BERT was pretrained with it (Devlin et al., arXiv 1810.04805, A.2).
_DROPOUT = 0.1

# What a history has besides losses and metrics.
_NO_METRIC = ("epoch", "step", "learning_rate", "tokens_per_second", "train_loss", "validation_loss")

CAVEAT = (
    "The training loss is the mean over an epoch, taken with the job's dropout on and while the weights still moved; "
    "the validation loss is taken at the epoch's end, without dropout. So a validation loss below it is no fault, and "
    "one well above it says more than its size."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """What a history says of a model.

    Attributes:
        verdict: in one word; `unknown` where the history cannot tell.
        words: why, and what to do next, in one or two sentences.
        figures: name -> value, in the order to show them; empty where there is nothing to show.
    """

    verdict: Literal["overfits", "underfits", "neither", "unknown"]
    words: str
    figures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Levers:
    """What a training job has set, and what it may set.

    Attributes:
        job: the job's keys and values; a key that is missing has its default.
        refused: keys that the model's task does not take.
        dropout: the rate the model was trained with: the job's, or its base's.
        layers: of the encoder.
    """

    job: Mapping[str, Any] = field(default_factory=dict)
    refused: Collection[str] = ()
    dropout: float = 0.0
    layers: int = 0

    def against_overfitting(self, confident: bool) -> str | None:
        """The next lever, as a line of the job file; None where all of them are on.

        Args:
            confident: whether the model is right as often but too sure: then smoothing comes first.
        """
        job, augmentation = self.job, self.job.get("augmentation") or {}
        distorts = any(augmentation.get(name) for name in ("deletion", "swap", "characters", "substitution"))
        frozen = self.layers // 3
        smoothing = ("label_smoothing", "label_smoothing: 0.1", not job.get("label_smoothing"))
        # What helped most where each was measured alone (benchmarks/results/overfitting.md) comes first; of what helped
        # alike, what leaves the model whole.
        ordered = [
            ("layer_decay", "layer_decay: 0.8", job.get("layer_decay", 1.0) >= 1.0),
            ("augmentation", "augmentation: {deletion: 0.1}", not distorts),
            smoothing,
            ("freeze_layers", f"freeze_layers: {frozen}", not job.get("freeze_layers") and frozen > 0),
            ("l1", "l1: 1e-7", not job.get("l1")),
            ("dropout", f"dropout: {_DROPOUT}", self.dropout < _DROPOUT),
            ("weight_decay", "weight_decay: 0.01", not job.get("weight_decay", 0.01)),
        ]
        if confident:
            ordered = [smoothing, *ordered]
        return next((line for key, line, free in ordered if free and key not in self.refused), None)

    def against_underfitting(self, epochs: int) -> str:
        """What to change next where a model has learned too little, as a line of the job file."""
        if self.job.get("freeze_layers"):
            return "freeze_layers: 0"
        if self.dropout > _DROPOUT:
            return f"dropout: {_DROPOUT}"
        if self.job.get("l1"):
            return "l1: 0"
        if steps := self.job.get("steps"):
            return f"steps: {2 * steps}"
        # A corpus is judged every so many steps: its history has more rounds than it was read times.
        return f"epochs: {2 * int(self.job.get('epochs') or epochs)}"


def judge(
    history: Sequence[Mapping[str, Any]],
    best_epoch: int | None,
    metric: str,
    levers: Levers,
    *,
    baseline: float | None = None,
    tested: float | None = None,
    alike: bool = True,
) -> Fit:
    """Tell whether a model overfits.

    Args:
        history: an entry per epoch: train_loss, validation_loss, metrics on the validation rows.
        best_epoch: the epoch whose model was kept, from 1; None: the last.
        metric: the task's; higher is better.
        levers: what may be pulled.
        baseline: the metric of the best constant answer on the validation rows.
        tested: the metric on another table.
        alike: whether training and validation loss mean the same; not where rows are compared with each other, for
            which a training batch and one of validation have other numbers of rows.
    """
    if not history:
        return Fit(
            verdict="unknown",
            words="The card has no history of epochs: the model was trained elsewhere, or built without epochs. So "
            "nothing can be said of overfitting.",
        )
    train, validation = (_column(history, name) for name in ("train_loss", "validation_loss"))
    best = min(max(1, best_epoch or len(history)), len(history))
    figures: dict[str, float] = {"epochs": len(history), "best_epoch": best}
    figures |= _at("train_loss", train, best) | _at("validation_loss", validation, best)
    values = _column(history, metric)
    figures |= _at(f"validation_{metric}", values, best)
    reached = values[best - 1]
    if reached is not None and values[-1] is not None:
        figures[f"{metric}_fall_since_best"] = reached - values[-1]
    if tested is not None and reached is not None:
        figures[f"{metric}_here_minus_validation"] = tested - reached
    if any(value is None for value in (*train, *validation)):
        return Fit(
            verdict="unknown",
            words="The history has no validation loss: the model was trained without validation rows, so that "
            "overfitting cannot be told. Set data.validation_fraction: 0.1, or data.validation.",
            figures=figures,
        )
    if not alike:
        return Fit(
            verdict="unknown",
            words="The loss compares the rows of a batch with each other, and training's batches have other numbers of "
            f"rows than validation's, so that their losses say nothing of overfitting. {_spoken(metric)} on the "
            f"validation rows was best after epoch {best} of {len(history)}, whose model was kept.",
            figures=figures,
        )
    verdict, words = _verdict(
        [value for value in train if value is not None],
        [value for value in validation if value is not None],
        best,
        (metric, reached, baseline),
        levers,
    )
    if tested is not None and reached is not None:
        words += f" {_spoken(metric)} is {tested:.4f} on this table and was {reached:.4f} on the validation rows."
    return Fit(verdict=verdict, words=words, figures=figures)


def _verdict(
    train: list[float],
    validation: list[float],
    best: int,
    metric: tuple[str, float | None, float | None],
    levers: Levers,
) -> tuple[Literal["overfits", "underfits", "neither"], str]:
    """The verdict and its reasons.

    Args:
        train: training losses by epoch.
        validation: validation losses by epoch.
        best: the epoch whose model was kept, from 1.
        metric: its name, its value at that epoch, and the baseline's.
        levers: what may be pulled.
    """
    name, reached, baseline = metric
    epochs = len(train)
    low = validation.index(min(validation)) + 1
    # Losses of density-like tasks could fall below 0; ratios are for positive ones.
    risen = validation[-1] > _RISEN * validation[low - 1] > 0 and train[-1] < _FALLEN * train[low - 1]
    if risen:
        said = (
            f"After epoch {low} the training loss fell on from {train[low - 1]:.4f} to {train[-1]:.4f}, while the "
            f"validation loss rose from {validation[low - 1]:.4f} to {validation[-1]:.4f}: the model overfits. "
        )
        return "overfits", said + _after_rise(low, best, epochs, levers)
    room = reached is None or not 1.0 - _ROOM < reached <= 1.0
    if validation[best - 1] > _GAP * train[best - 1] > 0 and room:
        return "overfits", (
            f"At epoch {best} the validation loss, {validation[best - 1]:.4f}, is more than {_GAP:g} times the "
            f"training loss, {train[best - 1]:.4f}: the model overfits. {_pull(levers, confident=False)}"
        )
    if reached is not None and baseline is not None and reached <= baseline + _MARGIN:
        return "underfits", (
            f"{_spoken(name)} on the validation rows, {reached:.4f}, is hardly above the {baseline:.4f} of the best "
            f"constant answer: the model underfits. Next lever: {levers.against_underfitting(epochs)}, or a higher "
            "learning_rate."
        )
    if epochs > 1 and low == epochs and 0 < validation[-1] < (1.0 - _STILL_FALLING) * validation[-2]:
        return "underfits", (
            f"In the last epoch the validation loss still fell from {validation[-2]:.4f} to {validation[-1]:.4f}: the "
            f"model underfits, it was not done learning. Next lever: {levers.against_underfitting(epochs)}."
        )
    if epochs == 1:
        # Of a corpus, which is judged every so many steps, once in a run of more than an epoch.
        once = not levers.job.get("steps") and int(levers.job.get("epochs") or 1) == 1
        lever = "epochs: 3" if once else "a smaller evaluate_every"
        return "neither", (
            f"After one {'epoch' if once else 'evaluation'} the training loss is {train[0]:.4f}, the validation loss "
            f"{validation[0]:.4f}: no sign of overfitting, but one shows no course. Next lever: {lever}."
        )
    return "neither", (
        f"At epoch {best} the training loss is {train[best - 1]:.4f} and the validation loss "
        f"{validation[best - 1]:.4f}, which ends at {validation[-1]:.4f}: the model neither overfits nor underfits. No "
        "lever needs pulling; more training rows are what helps next."
    )


def _after_rise(low: int, best: int, epochs: int, levers: Levers) -> str:
    """What became of the model that was kept, and what to do."""
    if best > low:
        kept = (
            f"The model that was kept, of epoch {best}, comes after that: its metric is the best, but it is surer than "
            "it should be. "
        )
        return kept + _pull(levers, confident=True)
    spared = ""
    if best < epochs:
        spared = f"The model that was kept, of epoch {best}, comes before that"
        patience = min(2, epochs - best - 1)
        if patience > 0 and not levers.job.get("early_stopping"):
            first = best + patience + 1
            which = f"epoch {first}" if first == epochs else f"epochs {first} to {epochs}"
            spared += f"; early_stopping: {patience} would have spared {which}"
        spared += ". "
    return spared + _pull(levers, confident=False)


def _pull(levers: Levers, confident: bool) -> str:
    line = levers.against_overfitting(confident)
    if line is None:
        return "All levers are on already: more training rows help next, or higher values of those."
    return f"Next lever: {line}."


def metrics_of(history: Sequence[Mapping[str, Any]], metric: str) -> list[str]:
    """The metrics in a history, the task's own first."""
    names = dict.fromkeys(name for entry in history for name in entry if name not in _NO_METRIC)
    return sorted(names, key=lambda name: name != metric)


def _column(history: Sequence[Mapping[str, Any]], name: str) -> list[float | None]:
    """A figure by epoch; None where an entry lacks it or it is no finite number."""
    values = (entry.get(name) for entry in history)
    return [float(value) if isinstance(value, int | float) and math.isfinite(value) else None for value in values]


def _at(name: str, values: Sequence[float | None], best: int) -> dict[str, float]:
    """A figure at the best epoch and at the end, where it is known."""
    found = {f"{name}_best_epoch": values[best - 1], f"{name}_last_epoch": values[-1]}
    return {key: value for key, value in found.items() if value is not None}


def _spoken(metric: str) -> str:
    words = metric.replace("_", " ").replace("f1", "F1")
    return words[:1].upper() + words[1:]
