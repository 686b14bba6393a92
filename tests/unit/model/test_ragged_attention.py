"""Attention over pairs of rows, held to the formula written out."""

from __future__ import annotations

import pytest
import torch

from bert_ray.model.ragged_attention import RaggedAttention

HEADS, WIDTH = 2, 8
# Query and key lengths of each pair: short and long side by side, so that rectangles are filled up and are split.
QUERIES, KEYS = (3, 1, 7, 70, 2), (5, 9, 1, 40, 90)


def by_formula(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """softmax(Q Kᵀ / √d_k + M) V of one pair of rows, head by head."""
    out = []
    for head in range(HEADS):
        part = slice(head * WIDTH // HEADS, (head + 1) * WIDTH // HEADS)
        scores = q[:, part] @ k[:, part].T / (WIDTH // HEADS) ** 0.5
        if causal:
            scores = scores + torch.full_like(scores, -torch.inf).triu(1)
        out.append(scores.softmax(1) @ v[:, part])
    return torch.cat(out, dim=1)


@pytest.mark.parametrize("causal", [False, True])
def test_every_pair_and_its_gradient(causal: bool) -> None:
    lengths = QUERIES, (QUERIES if causal else KEYS)
    torch.manual_seed(0)
    q, k, v = (torch.randn(sum(lengths[place]), WIDTH, requires_grad=True, dtype=torch.float64) for place in (0, 1, 1))
    found = RaggedAttention(*lengths, causal=causal)(q, k, v, HEADS)
    rows = zip(q.split(lengths[0]), k.split(lengths[1]), v.split(lengths[1]), strict=True)
    wanted = torch.cat([by_formula(*row, causal) for row in rows])
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=1e-9)
    weights = torch.randn_like(found)
    gradients = torch.autograd.grad((found * weights).sum(), (q, k, v))
    for one, other in zip(gradients, torch.autograd.grad((wanted * weights).sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-9)


def test_filled_up_scores_are_bounded() -> None:
    lengths = (400, 300, 2, 2, 250, 1, 1, 1)
    rectangles = RaggedAttention(lengths, lengths)._lay_out()
    assert sum(item.pairs for item in rectangles) == len(lengths)
    computed = sum(len(item.queries) * len(item.keys) // item.pairs for item in rectangles)
    assert computed <= 2 * sum(length**2 for length in lengths) + 4096 * len(rectangles)


def test_dropout_leaves_out_weights() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(64, WIDTH) for _ in range(3))
    attention = RaggedAttention((64,), (64,))
    exact = attention(q, k, v, HEADS)
    assert not torch.allclose(exact, attention(q, k, v, HEADS, dropout=0.3))
    mean = sum(attention(q, k, v, HEADS, dropout=0.3) for _ in range(3000)) / 3000
    torch.testing.assert_close(mean, exact, atol=0.08, rtol=0)
