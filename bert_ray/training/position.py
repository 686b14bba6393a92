"""Where a run is: all that a checkpoint holds besides tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

# Points of a run's loss curve, at most; an even number.
_CURVE_POINTS = 400


@dataclass(kw_only=True, slots=True)
class Position:
    """Of a run, after a step.

    Attributes:
        epoch: rounds done: epochs of a table, or what lies between two evaluations on a corpus.
        index: steps done in the current round.
        loss: sum over the samples of the current epoch so far.
        weight: what these samples count for together.
        seconds: spent training (evaluation and checkpoints left out), over all sessions of the run.
        epoch_seconds: of these, in the current epoch.
        tokens: real tokens trained on.
        epoch_tokens: of these, in the current epoch.
        best: metric of the best epoch so far; None before the first.
        best_epoch: that epoch, from 1; 0 before the first.
        history: one entry per epoch done.
        scaling: fp16's loss scaling.
        diverged: the step whose loss or gradient was not finite, or the last of many that overflowed; None so far.
        overflowed: whether it was by that.
        stopped: whether the run left early because it was asked to.
        curve: (step, mean loss, gradient norm) of a few hundred stretches of the run, for a plot; the norm is None
            where all overflowed.
    """

    epoch: int = 0
    index: int = 0
    loss: float = 0.0
    weight: float = 0.0
    seconds: float = 0.0
    epoch_seconds: float = 0.0
    tokens: int = 0
    epoch_tokens: int = 0
    best: float | None = None
    best_epoch: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    scaling: dict[str, float] = field(default_factory=dict)
    diverged: int | None = None
    overflowed: bool = False
    stopped: bool = False
    curve: list[list[float | None]] = field(default_factory=list)

    def draw(self, step: int, losses: Sequence[float], norms: Sequence[float | None]) -> None:
        """Add a stretch of steps, which ended with `step`, to the loss curve; a long run's curve is thinned out."""
        self.curve.append([step, _mean(losses), _mean(norms)])
        if len(self.curve) == _CURVE_POINTS:
            pairs = zip(self.curve[::2], self.curve[1::2], strict=True)
            # Two stretches are one that ends where the second did.
            self.curve = [
                [second[0], *(_mean(values) for values in zip(first[1:], second[1:], strict=True))]
                for first, second in pairs
            ]


def _mean(values: Sequence[float | None]) -> float | None:
    """Of those that are known."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
