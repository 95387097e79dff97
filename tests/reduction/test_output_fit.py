"""The fit of a few tensors to the output of the layer that they came from."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from lightning_compressm.reduction.output_fit import fit_output, output_error
from lightning_compressm.reduction.processes import Processes


@pytest.mark.parametrize("steps", [0, 1, 5, 120])
@pytest.mark.parametrize("lr", [1e-3, 0.06, 10.0])
def test_a_local_refit_never_increases_the_error(steps: int, lr: float):
    weight, wanted = torch.randn(3, 4), torch.randn(3, 4)
    x = torch.randn(20, 4)

    def runs() -> list[tuple[Tensor, Tensor]]:
        return [(torch.tanh(x @ weight.mT), torch.tanh(x @ wanted.mT))]

    before = output_error(runs(), Processes())
    after = fit_output([weight], runs, Processes(), steps=steps, lr=lr)
    assert after <= before * (1 + 1e-6)
    assert after == pytest.approx(output_error(runs(), Processes()), rel=1e-5)
    if steps == 0:
        assert after == pytest.approx(before)
    if (steps, lr) == (120, 0.06):
        assert after < 0.1 * before


def test_a_local_refit_leaves_tensors_as_it_found_them():
    frozen, trained = torch.randn(3), nn.Parameter(torch.randn(3))
    x, target = torch.randn(5, 3), torch.randn(5, 3)
    fit_output([frozen, trained], lambda: [(x * frozen + trained, target)], Processes(), steps=3)
    assert (frozen.requires_grad, trained.requires_grad) == (False, True)
    assert frozen.grad is None
    assert trained.grad is None


def test_a_local_refit_that_meets_nan_keeps_the_values():
    weight = torch.tensor([2.0])
    before = weight.clone()
    error = fit_output(
        [weight], lambda: [(weight * torch.nan, torch.ones(1))], Processes(), steps=3
    )
    assert error == float("inf")
    assert torch.equal(weight, before)


def test_the_error_of_an_output_that_should_be_zero():
    zero, one = torch.zeros(2), torch.ones(2)
    assert output_error([(zero, zero)], Processes()) == 0
    assert output_error([(one, zero)], Processes()) == 1
    assert output_error([(one * torch.nan, one)], Processes()) == float("inf")


class Twins(Processes):
    """Two processes that hold the same data; counts how often they exchange something."""

    def __init__(self) -> None:
        self.exchanges = 0

    def add_up(self, total: Tensor) -> Tensor:
        self.exchanges += 1
        return 2 * total


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_processes_exchange_once_a_step_whatever_is_fitted(dtype: torch.dtype):
    torch.manual_seed(1)
    start = [torch.randn(4, 3), torch.randn(4, 1, 2), torch.randn(4).to(dtype)]
    x, target = torch.randn(9, 3), torch.randn(9, 4)

    def fit(processes: Processes) -> list[Tensor]:
        weight, gains, bias = tensors = [t.clone() for t in start]

        def runs() -> Iterator[tuple[Tensor, Tensor]]:
            for batch, wanted in zip(x.split(5), target.split(5), strict=True):
                yield torch.tanh(batch @ weight.mT) * gains.sum((1, 2)) + bias, wanted

        fit_output(tensors, runs, processes, steps=7)
        return tensors

    twins = Twins()
    for one, two, before in zip(fit(Processes()), fit(twins), start, strict=True):
        assert one.dtype == before.dtype
        assert not torch.equal(one, before)
        assert torch.equal(one, two), "twice the same data must not change the fit"
    assert twins.exchanges == 8, "seven steps and the error of the last values"
