"""Attention over packed batches.

    Attention(Q, K, V) = softmax(Q Kᵀ / √d_k) V

(Vaswani et al., Attention Is All You Need, arXiv 1706.03762, equation 1), computed for each head and each row by
itself: a token sees the tokens of its own row and no others, which is the formula with a mask that is 0 inside a row
and -∞ between rows.

Shapes: T tokens of a packed batch, B rows, L length of a row, H heads, d_k width of a head, D = H * d_k.
"""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import scaled_dot_product_attention

if TYPE_CHECKING:
    from collections.abc import Sequence


def packed_attention(
    qkv: torch.Tensor,
    lengths: Sequence[int],
    cu_seqlens: torch.Tensor,
    heads: int,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Attention of every row over itself.

    Args:
        qkv: (T, 3 * D), queries, keys and values side by side.
        lengths: tokens of each row; rows of equal length that stand side by side are computed together.
        cu_seqlens: int32 (B + 1,), where each row starts.
        heads: H.
        dropout: probability with which an attention weight is dropped (training only).

    Returns:
        (T, D), the heads side by side.
    """
    if qkv.is_cuda and qkv.dtype in (torch.float16, torch.bfloat16) and dropout == 0.0:
        return _variable_length(qkv, max(lengths), cu_seqlens, heads)
    return _by_length(qkv, lengths, heads, dropout)


def _by_length(qkv: torch.Tensor, lengths: Sequence[int], heads: int, dropout: float) -> torch.Tensor:
    """One scaled_dot_product_attention per run of rows of equal length."""
    width = qkv.shape[1] // 3
    outputs, start = [], 0
    for length, run in groupby(lengths):
        rows = sum(1 for _ in run)
        stop = start + rows * length
        # (rows, L, 3, H, d_k) -> three of (rows, H, L, d_k)
        q, k, v = qkv[start:stop].view(rows, length, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        outputs.append(mixed.transpose(1, 2).reshape(rows * length, width))
        start = stop
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _variable_length(qkv: torch.Tensor, longest: int, cu_seqlens: torch.Tensor, heads: int) -> torch.Tensor:
    """FlashAttention over all rows in one kernel, forward and backward (half precision on a GPU)."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = qkv.view(qkv.shape[0], 3, heads, -1).unbind(1)
    mixed = varlen_attn(q.contiguous(), k.contiguous(), v.contiguous(), cu_seqlens, cu_seqlens, longest, longest)
    return mixed.reshape(qkv.shape[0], -1)
