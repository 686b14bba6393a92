"""The lookup's gradient is torch's own, step after step."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from bert_ray.model.lookup import lookup


def gradients(find: object, steps: list[list[torch.Tensor]], spoil: int | None = None) -> list[torch.Tensor]:
    """The table's gradient of each step; a step is one batch of ids or several, their gradients added up."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(50, 8, generator=draw).requires_grad_()
    found = []
    for number, pieces in enumerate(steps):
        for ids in pieces:
            rows = find(weight, ids)  # type: ignore[operator]
            (rows * torch.randn(rows.shape, generator=draw)).sum().backward()
        found.append(weight.grad.clone())
        weight.grad.mul_(float("nan") if number == spoil else 0.5)  # As clipping does.
        weight.grad = None
    return found


def batches() -> list[list[torch.Tensor]]:
    draw = torch.Generator().manual_seed(1)
    return [
        [torch.randint(0, 50, (size,), generator=draw) for size in sizes] for sizes in ([20], [7], [5, 9], [30], [3])
    ]


def test_the_gradient_is_torchs_own_also_of_a_step_in_pieces() -> None:
    ours = gradients(lookup, batches())
    torchs = gradients(lambda weight, ids: F.embedding(ids, weight), batches())
    for one, other in zip(ours, torchs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_a_spoilt_gradient_does_not_reach_the_next_step() -> None:
    found = gradients(lookup, batches(), spoil=1)
    assert all(gradient.isfinite().all() for gradient in found)
    torch.testing.assert_close(found[2:], gradients(lookup, batches())[2:])


def test_without_gradients_it_is_a_plain_lookup() -> None:
    weight = torch.randn(5, 3, requires_grad=True)
    with torch.no_grad():
        assert not lookup(weight, torch.tensor([1])).requires_grad
    assert torch.equal(lookup(weight, torch.tensor([4, 0])), weight[[4, 0]])
