"""Attention over packed batches.

    Attention(Q, K, V) = softmax(Q Kᵀ / √d_k) V

(Vaswani et al., Attention Is All You Need, arXiv 1706.03762, equation 1), computed for each head and each row by
itself: a token sees the tokens of its own row and no others, which is the formula with a mask that is 0 inside a row
and -∞ between rows.

On a GPU in half precision that is one variable-length kernel. Elsewhere rows are taken a group at a time: short rows of
similar lengths together (filled up to the longest of them, for the scores alone), long ones by equal length. Without
dropout of attention weights a group goes through torch's flash kernel on a CPU, which keeps no scores; in half
precision its backward pass is slower than the formula written out, which serves there and wherever weights are dropped.

Shapes: T tokens of a packed batch, B rows, L length of a row, H heads, d_k width of a head, D = H * d_k;
N rows of a group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from bert_ray.model.dropout import keep_mask

if TYPE_CHECKING:
    from collections.abc import Sequence

# Rows up to this long may share a group with shorter ones: a group's calls cost more than the scores it fills up with.
_SHORT_ROW = 64
# On a GPU it is the other way round: a hundred launches cost more than the largest rectangle.
_SHORT_ROW_GPU = 2**30
# What FlashAttention has kernels for.
_WIDEST_HEAD = 256
# What torch's flash kernel is the fastest in on a CPU.
_FULL = (torch.float32, torch.float64)
# Scores of a head that a group on a CPU has at most, unless one row alone has more: what twelve heads make of them
# passes through the second-level cache, not through memory (benchmarks/LOG.md).
GROUP_SCORES = 2**18
# The shortest row of such a group, as a share of its longest; below _TINY_ROW tokens anything goes.
_SIMILAR, _TINY_ROW = 0.7, 16


@dataclass(kw_only=True, slots=True)
class Group:
    """Rows that attention takes together, standing side by side in the packed batch.

    Attributes:
        start: the first token of the first row; with `stop` the group's tokens.
        stop: one behind the last token.
        rows: N.
        length: L, of the longest row.
        gather: int64 (N * L,), for each place of the filled-up rows its token, counted from `start`; None where all
            rows are of length L.
        real: int64 (stop - start,), which places of the filled-up rows are tokens; None likewise.
        bias: (N, 1, 1, L), 0 for a token and -∞ for a filled-up place; None likewise.
    """

    start: int
    stop: int
    rows: int
    length: int
    gather: torch.Tensor | None = None
    real: torch.Tensor | None = None
    bias: torch.Tensor | None = None


def group_rows(lengths: Sequence[int], device: torch.device | str = "cpu") -> list[Group]:
    """Split a packed batch's rows, in their order, into groups; longest rows first gives the fewest groups."""
    groups, first, start = [], 0, 0
    on_cpu = torch.device(device).type == "cpu"
    short, most = (_SHORT_ROW, GROUP_SCORES) if on_cpu else (_SHORT_ROW_GPU, math.inf)
    while first < len(lengths):
        longest = shortest = lengths[first]
        last, stop = first + 1, start + longest
        while last < len(lengths):
            high, low = max(longest, lengths[last]), min(shortest, lengths[last])
            similar = high <= short and low >= (0 if high <= _TINY_ROW else high * _SIMILAR)
            if not (high == low or similar) or (last + 1 - first) * high**2 > most:
                break
            longest, shortest, stop, last = high, low, stop + lengths[last], last + 1
        group = Group(start=start, stop=stop, rows=last - first, length=longest)
        if longest != shortest:
            _fill_up(group, torch.tensor(lengths[first:last]), device)
        groups.append(group)
        first, start = last, stop
    return groups


def _fill_up(group: Group, lengths: torch.Tensor, device: torch.device | str) -> None:
    gather, real, bias = filled_up(lengths, group.length)
    group.gather, group.bias = gather.to(device), bias.to(device)
    group.real = real.view(-1).nonzero()[:, 0].to(device)


def filled_up(lengths: torch.Tensor, longest: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows that lie end to end, as a rectangle of places.

    Args:
        lengths: int64 (N,), tokens of each row.
        longest: L, places of each row.

    Returns:
        the token of each place, int64 (N * L,), counted from the first row's first; whether a place is one, bool
        (N, L); and the bias of keys, (N, 1, 1, L), 0 for a token and -∞ for a filled-up place.
    """
    places = torch.arange(longest, device=lengths.device)
    real = places < lengths[:, None]
    starts = lengths.cumsum(0) - lengths
    # A filled-up place repeats its row's last token: any finite values do, since nothing reads them.
    tokens = (starts[:, None] + torch.minimum(places, lengths[:, None] - 1)).view(-1)
    return tokens, real, torch.where(real, 0.0, -torch.inf)[:, None, None, :]


def packed_attention(
    qkv: torch.Tensor, lengths: Sequence[int], cu_seqlens: torch.Tensor, heads: int, dropout: float = 0.0
) -> torch.Tensor:
    """Attention of every row over itself.

    Args:
        qkv: (T, 3 * D), queries, keys and values side by side. On a CPU there may be more below the last row's: of
            those the result is 0.
        lengths: tokens of each row.
        cu_seqlens: int32 (B + 1,), where each row starts.
        heads: H.
        dropout: probability with which an attention weight is dropped (training only).

    Returns:
        (T, D), the heads side by side.
    """
    if dropout == 0.0 and flash_serves(qkv, qkv.shape[1] // 3 // heads):
        return _variable_length(qkv, max(lengths), cu_seqlens, heads)
    groups = group_rows(lengths, qkv.device)
    if dropout == 0.0 and qkv.device.type == "cpu" and qkv.dtype in _FULL:
        return _FlashAttention.apply(qkv, groups, heads)
    return _GroupedAttention.apply(qkv, groups, heads, dropout)


def attend(qkv: torch.Tensor, lengths: Sequence[int], heads: int, scale: float | None = None) -> torch.Tensor:
    """The same on a CPU for a forward pass alone: torch's flash kernel on queries, keys and values as they lie there.

    Args:
        qkv: (T, 3 * D); there may be more below the last row's: of those the result is 0.
        lengths: tokens of each row; rows of one length that stand side by side are taken together.
        heads: H.
        scale: of the scores; None: 1 / √d_k.

    Returns:
        (T, D), the heads side by side.
    """
    width = qkv.shape[1] // 3
    parts, start = [], 0
    for length, run in groupby(lengths):
        stop = start + length * sum(1 for _ in run)
        # (N, L, 3, H, d_k) -> (3, N, H, L, d_k), uncopied.
        q, k, v = qkv[start:stop].view(-1, length, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, scale=scale)
        parts.append(mixed.transpose(1, 2).reshape(stop - start, width))
        start = stop
    return torch.cat((*parts, qkv.new_zeros(len(qkv) - start, width)))


def flash_serves(tensor: torch.Tensor, width: int) -> bool:
    """Whether FlashAttention's kernel takes heads of this width: on an Ampere GPU or a newer one, in half precision.

    `mha_varlen_fwd` in torch's flash_api.cpp refuses anything else; what stands in for it here computes the same.
    """
    return (
        tensor.is_cuda
        and tensor.dtype in (torch.float16, torch.bfloat16)
        and width % 8 == 0
        and width <= _WIDEST_HEAD
        and torch.cuda.get_device_capability(tensor.device) >= (8, 0)
    )


def _variable_length(qkv: torch.Tensor, longest: int, cu_seqlens: torch.Tensor, heads: int) -> torch.Tensor:
    """FlashAttention over all rows in one kernel, forward and backward (half precision on a GPU)."""
    from torch.nn.attention.varlen import varlen_attn

    # Uncopied: the kernel asks that a head's numbers stand side by side, and no more.
    q, k, v = qkv.view(qkv.shape[0], 3, heads, -1).unbind(1)
    mixed = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest)
    return mixed.reshape(qkv.shape[0], -1)


class _FlashAttention(torch.autograd.Function):
    """torch's flash kernel for a CPU, a group at a time in one node of the graph; queries, keys and values uncopied."""

    @staticmethod
    def forward(ctx: Any, qkv: torch.Tensor, groups: list[Group], heads: int) -> torch.Tensor:
        out = _below(qkv.new_empty(qkv.shape[0], qkv.shape[1] // 3), groups)
        kept: list[torch.Tensor] = []
        for group in groups:
            mixed, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                *_rectangle(qkv, group, 3, heads), attn_mask=_mask(group, qkv.dtype)
            )
            _join(mixed, out, group, heads)
            kept.append(logsumexp)
        ctx.save_for_backward(qkv, out, *kept)
        ctx.groups, ctx.heads = groups, heads
        return out

    @staticmethod
    def backward(ctx: Any, d_out: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        qkv, out, *kept = ctx.saved_tensors
        d_qkv = _below(torch.empty_like(qkv), ctx.groups)
        for group, logsumexp in zip(ctx.groups, kept, strict=True):
            (d_o,) = _rectangle(d_out, group, 1, ctx.heads)
            if group.real is not None:
                d_o = d_o * (group.bias == 0).view(group.rows, 1, -1, 1)
            three = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                d_o,
                *_rectangle(qkv, group, 3, ctx.heads),
                *_rectangle(out, group, 1, ctx.heads),
                logsumexp,
                0.0,
                False,
                attn_mask=_mask(group, qkv.dtype),
            )
            for part, d_part in zip(three, d_qkv.chunk(3, dim=1), strict=True):
                _join(part, d_part, group, ctx.heads)
        return d_qkv, None, None


class _GroupedAttention(torch.autograd.Function):
    """The formula and its derivative, a group at a time, with as few passes over the scores as torch allows.

    With S = Q Kᵀ / √d_k, P = softmax(S), M the mask (0 where a weight is dropped, with probability p, else 1) and
    O = (P ∘ M) V / (1 - p): dV = (P ∘ M)ᵀ dO / (1 - p), dP = (dO Vᵀ) ∘ M / (1 - p), dS = P ∘ (dP - rowsum(dP ∘ P)),
    dQ = dS K / √d_k, dK = dSᵀ Q / √d_k. Factors are left to the products' ends: there they cost no pass of their own.
    """

    @staticmethod
    def forward(ctx: Any, qkv: torch.Tensor, groups: list[Group], heads: int, dropout: float) -> torch.Tensor:
        out = _below(qkv.new_empty(qkv.shape[0], qkv.shape[1] // 3), groups)
        kept: list[torch.Tensor | None] = []
        for group in groups:
            q, k, v = _split(qkv, group, 3, heads)
            scores = _product(q, k.transpose(1, 2), q.shape[2] ** -0.5)
            if group.bias is not None:
                scores.view(group.rows, heads, group.length, group.length).add_(group.bias)
            weights = torch._softmax(scores, -1, False, out=scores)
            mask = keep_mask(weights, dropout) if dropout else None
            _join(_product(weights if mask is None else weights * mask, v, 1 / (1 - dropout)), out, group, heads)
            kept += [weights, mask]
        ctx.save_for_backward(qkv, *kept)
        ctx.groups, ctx.heads, ctx.dropout = groups, heads, dropout
        return out

    @staticmethod
    def backward(ctx: Any, d_out: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:  # type: ignore[override]
        qkv, *kept = ctx.saved_tensors
        d_qkv = _below(torch.empty_like(qkv), ctx.groups)
        for index, group in enumerate(ctx.groups):
            weights, mask = kept[2 * index], kept[2 * index + 1]
            q, k, v = _split(qkv, group, 3, ctx.heads)
            (d_o,) = _split(d_out, group, 1, ctx.heads)
            if group.real is not None:
                d_o.view(group.rows, ctx.heads, group.length, -1).mul_((group.bias == 0).view(group.rows, 1, -1, 1))
            scale = 1 / (1 - ctx.dropout)
            d_v = _product((weights if mask is None else weights * mask).transpose(1, 2), d_o, scale)
            d_weights = torch.bmm(d_o, v.transpose(1, 2))
            if mask is not None:
                d_weights *= mask
            d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
            scale *= q.shape[2] ** -0.5
            three = _product(d_scores, k, scale), _product(d_scores.transpose(1, 2), q, scale), d_v
            for part, d_part in zip(three, d_qkv.chunk(3, dim=1), strict=True):
                _join(part, d_part, group, ctx.heads)
        return d_qkv, None, None, None


def _mask(group: Group, dtype: torch.dtype) -> torch.Tensor | None:
    """The bias as the flash kernel needs it, which reads it in the queries' own type, whatever its type is."""
    return None if group.bias is None else group.bias.to(dtype)


def _product(left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
    """`scale` times the products of two batches of matrices."""
    return torch.baddbmm(left.new_empty(()), left, right, beta=0, alpha=scale)


def _below(packed: torch.Tensor, groups: list[Group]) -> torch.Tensor:
    """`packed`, 0 from behind the last group on: rows that are no token's, where a batch was filled up."""
    packed[groups[-1].stop :] = 0
    return packed


def _rectangle(packed: torch.Tensor, group: Group, parts: int, heads: int) -> torch.Tensor:
    """A group's tokens of (T, parts * D) as (parts, N, H, L, d_k), uncopied but for short rows, which are filled up."""
    tokens = packed[group.start : group.stop]
    if group.gather is not None:
        tokens = tokens.index_select(0, group.gather)
    return tokens.view(group.rows, group.length, parts, heads, -1).permute(2, 0, 3, 1, 4)


def _split(packed: torch.Tensor, group: Group, parts: int, heads: int) -> torch.Tensor:
    """The same as (parts, N * H, L, d_k), a copy."""
    return _rectangle(packed, group, parts, heads).contiguous().view(parts, group.rows * heads, group.length, -1)


def _join(values: torch.Tensor, packed: torch.Tensor, group: Group, heads: int) -> None:
    """The way back: (N, H, L, d_k) or (N * H, L, d_k) into the group's tokens of (T, D), a copy."""
    joined = values.view(group.rows, heads, group.length, -1).transpose(1, 2)
    target = packed[group.start : group.stop]
    if group.real is None:
        target.unflatten(0, (group.rows, group.length)).unflatten(2, (heads, -1)).copy_(joined)
    else:
        target.copy_(joined.reshape(group.rows * group.length, -1).index_select(0, group.real))
