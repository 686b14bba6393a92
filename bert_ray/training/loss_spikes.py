"""Watches a run's loss and gradient norm, and says when one of them leaps."""

from __future__ import annotations

import statistics
from collections import deque

# What a step is compared with: the median of so many steps before it, once there are enough of them.
_STEPS, _ENOUGH = 50, 20
# A gradient's norm varies more than the loss: it leaps when it is so many times its median.
_NORM_RATIO = 10.0


class SpikeDetector:
    """Told each step's loss and gradient norm in order, gives a note where one is far above what it was."""

    def __init__(self, ratio: float) -> None:
        """Call a loss a spike when it is `ratio` times the median of the steps before it; 0: say nothing."""
        self._ratio = ratio
        self._losses: deque[float] = deque(maxlen=_STEPS)
        self._norms: deque[float] = deque(maxlen=_STEPS)

    def __call__(self, step: int, loss: float, norm: float | None) -> str | None:
        """What there is to say of a step; None: nothing."""
        if not self._ratio:
            return None
        found = _leap("loss", loss, self._losses, self._ratio)
        self._losses.append(loss)
        if norm is not None:
            found = found or _leap("gradient norm", norm, self._norms, _NORM_RATIO)
            self._norms.append(norm)
        return f"step {step}: {found}" if found else None


def _leap(name: str, value: float, before: deque[float], ratio: float) -> str | None:
    if len(before) < _ENOUGH:
        return None
    usual = statistics.median(before)
    if value <= ratio * usual:
        return None
    return f"{name} {value:.4g}, {value / max(1e-12, usual):.1f} times the median of the last {len(before)} steps"
