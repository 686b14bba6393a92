"""What stands between a layer's matrix products: dropout, the residual sum and its layer norm.

    LayerNorm(x + Dropout(y))

(Vaswani et al., arXiv 1706.03762, section 5.4). These are torch's own operations. In training in half precision the
residual stream stays in it (autocast would turn it to fp32 at each norm, and back), statistics being fp32 as ever; on a
GPU the three then move more bytes than the products around them take time for, and torch.compile makes one kernel of
them.

Shapes: T tokens of a packed batch, D hidden size.
"""

from __future__ import annotations

import os
import shutil
import warnings
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from bert_ray.model.dropout import dropout

if TYPE_CHECKING:
    from collections.abc import Callable

_HALVES = (torch.float16, torch.bfloat16)


def residual_norm(x: torch.Tensor, y: torch.Tensor, norm: nn.LayerNorm, rate: float = 0.0) -> torch.Tensor:
    """LayerNorm(x + Dropout(y)).

    Args:
        x: the residual stream, (T, D).
        y: what is added to it, (T, D): a linear layer's output, whose type tells the precision.
        norm: over D.
        rate: of dropout; 0: none.
    """
    if not (y.dtype in _HALVES and torch.is_grad_enabled()):
        return norm(x + dropout(y, rate))
    if not y.is_cuda:
        return F.layer_norm(x.to(y.dtype) + dropout(y, rate), norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    return _compiled()(x, y, norm.weight, norm.bias, norm.eps, rate)


def _in_one(
    x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, rate: float
) -> torch.Tensor:
    total = x.float() + (F.dropout(y.float(), rate) if rate else y.float())
    return F.layer_norm(total, weight.shape, weight.float(), bias.float(), eps).to(y.dtype)


@lru_cache
def _compiled() -> Callable[..., torch.Tensor]:
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        warnings.warn("no C compiler, so each layer takes three kernels for one: install gcc", stacklevel=1)
        return _in_one
    # T differs from batch to batch: one kernel for all.
    return torch.compile(_in_one, dynamic=True)  # type: ignore[no-any-return]
