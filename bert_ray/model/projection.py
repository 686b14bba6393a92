"""Linear layers in training.

    y = x Wᵀ + b,    dx = dy W,    dW = dyᵀ x,    db = the sum of dy's rows

On a CPU in full precision the gradients are made as suits its caches and its matrix library; torch's own layer makes
them alike for all shapes. Measured in benchmarks/LOG.md.

Shapes: T rows, K the input's width, N the output's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from bert_ray.model.gradients import matrix_gradient, row_sum
from bert_ray.model.linear import fill_rows


def project(x: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
    """A linear layer's output, (T, K) -> (T, N)."""
    return multiply(x, layer.weight, layer.bias)


def multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The same from the weight W (N, K) and the bias b (N,)."""
    if x.device.type == "cpu" and torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu"):
        return _Projection.apply(x, weight, bias)
    return F.linear(x, weight, bias)


def filled(x: torch.Tensor) -> torch.Tensor:
    """Under autocast on a CPU `x` (T, K) with rows of zeros below, as its library wants them (`linear.fill_rows`)."""
    return fill_rows(x) if x.device.type == "cpu" and torch.is_autocast_enabled("cpu") else x


class _Projection(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        # torch's own lays out the bias before the product, and reads it again in the product.
        return (x @ weight.t()).add_(bias)

    @staticmethod
    def backward(ctx: Any, d_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        asked_x, asked_weight, asked_bias = ctx.needs_input_grad
        return (
            d_y @ weight if asked_x else None,
            matrix_gradient(weight, d_y, x, wide=weight.shape[0] > weight.shape[1]) if asked_weight else None,
            row_sum(d_y) if asked_bias else None,
        )
