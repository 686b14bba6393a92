"""Linear layers in training have the gradients of torch's own."""

import pytest
import torch
from torch import nn

from bert_ray.model.gradients import gathered
from bert_ray.model.projection import project


@pytest.mark.parametrize("wide", [(8, 24), (24, 8), (8, 8)])
@pytest.mark.parametrize("passes", [1, 3])
def test_gradients_are_those_of_the_layer(wide: tuple[int, int], passes: int) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(*wide).double()
    found: list[list[torch.Tensor]] = []
    for function in (lambda x: project(x, layer), layer):
        layer.zero_grad()
        kept = []
        for turn in range(passes):  # Each adds to the gradient of those before it.
            torch.manual_seed(turn)
            x = torch.randn(11, wide[0], dtype=torch.float64, requires_grad=True)
            y = function(x)
            (y**2).sum().backward()
            kept += [y.detach(), x.grad]
        found.append([*kept, layer.weight.grad.clone(), layer.bias.grad.clone()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_a_later_pass_adds_where_the_gradient_lies() -> None:
    layer = nn.Linear(4, 6)
    assert gathered(layer.weight) is None
    project(torch.randn(3, 4), layer).sum().backward()
    first = layer.weight.grad
    project(torch.randn(3, 4), layer).sum().backward()
    assert layer.weight.grad is first is gathered(layer.weight)


def test_what_is_frozen_gets_no_gradient() -> None:
    layer = nn.Linear(4, 6)
    layer.weight.requires_grad_(False)
    x = torch.randn(3, 4)
    project(x, layer).sum().backward()
    assert layer.weight.grad is None
    torch.testing.assert_close(layer.bias.grad, torch.full((6,), 3.0))


def test_without_gradients_and_under_autocast_it_is_torchs_own() -> None:
    layer, x = nn.Linear(4, 6), torch.randn(3, 4)
    with torch.no_grad():
        assert not project(x, layer).requires_grad
        torch.testing.assert_close(project(x, layer), layer(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert project(x, layer).dtype == torch.bfloat16
