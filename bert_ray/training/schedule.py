"""The learning rate as a function of the step."""

from __future__ import annotations

import math


def learning_rate(step: int, steps: int, peak: float, warmup: float, schedule: str, cooldown: float = 0.2) -> float:
    """Learning rate of a step.

    Args:
        step: from 0.
        steps: of the whole run.
        peak: the highest rate.
        warmup: share of the steps in which the rate rises linearly to the peak, which the last of them has.
        schedule: `constant` stays there; `linear` falls on a line and `cosine` on half a cosine (Loshchilov and
            Hutter, arXiv 1608.03983, eq. 5 without restarts), to reach 0 just after the last step; `trapezoidal` stays
            there and falls on a line at the end (warm-up, stable, decay: Hägele et al., arXiv 2405.18392, section 3).
        cooldown: share of the steps in which a trapezoidal schedule falls.
    """
    rising = share_of(warmup, steps)
    if step < rising:
        return peak * (step + 1) / rising
    if schedule == "constant":
        return peak
    if schedule == "trapezoidal":
        falling = max(1, share_of(cooldown, steps))
        return peak * min(1.0, (steps - step) / falling)
    done = (step - rising) / max(1, steps - rising)
    return peak * (1.0 - done if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done)))


def share_of(share: float, steps: int) -> int:
    """So many steps a share of them is, rounded up; 0.07 of 100 is 7, though their product as floats is above."""
    return math.ceil(round(share * steps, 6))
