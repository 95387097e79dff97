"""Second derivatives: refused where a fast backward pass has none, and taken by torch.func."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_compressm.nn import LRU, S4D, S5, linear_recurrence, selective_scan


def scanned(x: Tensor) -> Tensor:
    eigenvalues = torch.tensor([0.5, 0.9j], dtype=torch.complex128)
    return linear_recurrence(eigenvalues, torch.complex(x, x)).real


def selected(x: Tensor) -> Tensor:
    u = x.mT
    A = -torch.ones(2, 3, dtype=torch.float64)
    weights = torch.ones(len(x), 3, x.shape[1], dtype=torch.float64)
    outputs = selective_scan(u, u, A, weights, weights, delta_softplus=True)
    assert isinstance(outputs, Tensor)
    return outputs


ONCE: dict[str, Callable[[Tensor], Tensor]] = {
    "LRU over all steps": LRU(2, 2, dtype=torch.float64),
    "LRU in chunks": LRU(2, 64, dtype=torch.float64),
    "S5": S5(2, 3, dtype=torch.float64),
    "S4D in chunks": S4D(2, 3, dtype=torch.float64),
    "linear_recurrence": scanned,
    "selective_scan": selected,
}


def _inputs(batch: int, length: int) -> Tensor:
    return torch.rand(batch, length, 2, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("thing", ONCE.values(), ids=ONCE)
def test_they_are_refused_with_what_to_do_instead(thing: Callable[[Tensor], Tensor], power: int):
    """Also where the gradient of the output is a constant, which torch itself lets pass."""
    x = _inputs(32, 33)
    (gradient,) = torch.autograd.grad(thing(x).pow(power).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative.*torch\.func\.grad"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("thing", ONCE.values(), ids=ONCE)
def test_a_graph_of_gradients_that_nothing_asks_for_is_no_error(thing: Callable[[Tensor], Tensor]):
    x = _inputs(32, 33)
    (graph,) = torch.autograd.grad(thing(x).sum(), x, create_graph=True)
    (plain,) = torch.autograd.grad(thing(x).sum(), x)
    assert graph.requires_grad
    assert torch.equal(graph, plain)


@pytest.mark.parametrize("thing", ONCE.values(), ids=ONCE)
def test_function_transforms_give_them(thing: Callable[[Tensor], Tensor]):
    def penalty(x: Tensor) -> Tensor:
        gradient: Tensor = torch.func.grad(lambda x: thing(x).pow(3).sum())(x)
        return gradient.square().sum()

    assert torch.autograd.gradcheck(penalty, (_inputs(2, 7),))


def test_a_convolution_by_fft_has_them():
    layer = S4D(2, 3, dtype=torch.float64)
    parameters = list(layer.parameters())

    def loss(x: Tensor, *_: Tensor) -> Tensor:
        return layer(x).pow(3).sum()

    assert torch.autograd.gradgradcheck(loss, (_inputs(1, 5), *parameters))
