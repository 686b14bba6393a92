"""Dropout whose random numbers cost little on a CPU.

torch draws one 64-bit number for every element of a mask, in one thread; for attention weights that is a sixth of a
training step. Sixteen bits are enough for a rate (its error is below 1/65,536), so here one number serves four,
drawn by a generator (SFC64) that torch's own seeds: `torch.manual_seed` decides the masks as ever.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F


def keep_mask(like: torch.Tensor, rate: float) -> torch.Tensor:
    """A mask of `like`'s shape, type and device: 0 with probability `rate`, else 1."""
    mask = torch.empty_like(like)
    if like.device.type != "cpu":
        return mask.bernoulli_(1 - rate)
    seed = int(torch.randint(2**63 - 1, ()))
    count = like.numel()
    bits = np.random.SFC64(seed).random_raw(-(-count // 4)).view(np.int16)[:count]
    # Written as `like`'s type at once: a mask of bool takes twice as long to turn into numbers as it takes to make.
    return torch.ge(torch.from_numpy(bits).view(like.shape), round(rate * 2**16) - 2**15, out=mask)


def dropout(x: torch.Tensor, rate: float) -> torch.Tensor:
    """Scale each element of `x` by 0 (with probability `rate`) or 1 / (1 - rate); `x` itself at rate 0."""
    if not rate:
        return x
    return x * keep_mask(x, rate).mul_(1 / (1 - rate)) if x.device.type == "cpu" else F.dropout(x, rate)
