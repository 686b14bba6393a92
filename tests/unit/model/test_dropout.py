from __future__ import annotations

import pytest
import torch

from bert_ray.model.dropout import dropout, keep_mask


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_mask_drops_its_share_and_the_rest_is_scaled(rate: float, dtype: torch.dtype) -> None:
    ones = torch.ones(1000, 301, dtype=dtype)  # Not a multiple of the four elements of one random number.
    torch.manual_seed(0)
    mask = keep_mask(ones, rate)
    assert mask.dtype == dtype
    assert mask.unique().tolist() == [0.0, 1.0]
    assert (mask == 0).double().mean().item() == pytest.approx(rate, abs=0.005)
    torch.manual_seed(0)
    assert torch.equal(dropout(ones, rate), mask * (1 / (1 - rate)))


def test_torchs_seed_decides_the_mask() -> None:
    like = torch.empty(64, 64)
    masks = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        masks.append(keep_mask(like, 0.3))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    assert not torch.equal(masks[2], keep_mask(like, 0.3))


def test_elements_are_dropped_independently() -> None:
    """The four elements that share a random number, too."""
    torch.manual_seed(3)
    kept = (keep_mask(torch.empty(400_000), 0.5) > 0).float().view(-1, 4)
    correlation = torch.corrcoef(kept.T) - torch.eye(4)
    assert correlation.abs().max().item() < 0.02


def test_rate_zero_is_the_input_itself() -> None:
    x = torch.randn(3)
    assert dropout(x, 0.0) is x


def test_the_gradient_passes_where_the_value_did() -> None:
    torch.manual_seed(4)
    x = torch.ones(1000, requires_grad=True)
    y = dropout(x, 0.4)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
