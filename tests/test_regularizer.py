"""The penalty on Hankel energy: its value, its gradients, what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_compressm import HankelRegularizer, compress, hankel_spectra
from lightning_compressm.errors import UnstableSystemError, UnsupportedLayerError
from lightning_compressm.families import Family, registered_families
from lightning_compressm.nn import LRU
from lightning_compressm.nn._mamba import MambaBlock

LINEAR = sorted(n for n, f in registered_families().items() if isinstance(f, Family))


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 4), LRU(4, 6), nn.GELU(), LRU(4, 5)).double()


@pytest.mark.parametrize("name", LINEAR)
def test_it_is_the_sum_of_the_spectra(name: str) -> None:
    torch.manual_seed(1)
    family = registered_families()[name]
    layer = family.example(5)[0].double()
    expected = sum(sigma.sum() for sigma in hankel_spectra(layer).values())
    torch.testing.assert_close(HankelRegularizer(0.5)(layer), 0.5 * expected)


@pytest.mark.parametrize("name", LINEAR)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    torch.manual_seed(2)
    layer = registered_families()[name].example(3)[0].double()
    penalty = HankelRegularizer(1.0, horizon=20)
    names = list(registered_families()[name].state_axes(layer))  # type: ignore[union-attr]
    for parameter in map(layer.get_parameter, names):
        (grad,) = torch.autograd.grad(penalty(layer), parameter)
        direction = torch.randn_like(parameter)
        with torch.no_grad():
            values = []
            for side in (1, -1):
                parameter.add_(side * 1e-6 * direction)
                values.append(penalty(layer))
                parameter.sub_(side * 1e-6 * direction)
        slope = (values[0] - values[1]) / 2e-6
        inner = (grad.conj() * direction).real.sum()
        torch.testing.assert_close(inner, slope, rtol=1e-3, atol=1e-5)


def test_descent_makes_layers_easier_to_reduce(model: nn.Sequential) -> None:
    def rank() -> int:
        return sum(hankel_sum_rank(sigma) for sigma in hankel_spectra(model).values())

    def hankel_sum_rank(sigma: torch.Tensor) -> int:
        return int((sigma.cumsum(0) < 0.95 * sigma.sum()).sum()) + 1

    before = rank()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    penalty = HankelRegularizer(1.0)
    for _ in range(200):
        optimizer.zero_grad()
        penalty(model).backward()
        optimizer.step()
    assert rank() < before
    compress(model, tolerance=0.05)


def test_it_goes_on_after_a_reduction(model: nn.Sequential) -> None:
    compress(model, state_dim=3)
    HankelRegularizer(1.0)(model).backward()
    assert model[1].nu_log.grad is not None
    assert model[1].nu_log.grad.shape == (3,)


def test_layers_can_be_chosen(model: nn.Sequential) -> None:
    both, first, second = (
        HankelRegularizer(1.0, layers=layers)(model) for layers in (None, ["1"], ["3"])
    )
    torch.testing.assert_close(both, first + second)
    torch.testing.assert_close(HankelRegularizer(1.0, ignore=["3"])(model), first)


def test_the_penalty_has_the_precision_of_the_loss(model: nn.Sequential) -> None:
    assert HankelRegularizer(1.0)(model).dtype == torch.float64
    assert HankelRegularizer(1.0)(model.float()).dtype == torch.float32


def test_selective_layers_are_refused() -> None:
    with pytest.raises(UnsupportedLayerError, match="selective"):
        HankelRegularizer(1.0)(MambaBlock(4, 3))


def test_a_family_without_gradients_is_refused(
    model: nn.Sequential, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = type(registered_families()["LRU"])
    original = family.system

    def detached(self: Family, module: nn.Module) -> object:
        with torch.no_grad():
            return original(self, module)  # type: ignore[arg-type]

    monkeypatch.setattr(family, "system", detached)
    with pytest.raises(UnsupportedLayerError, match="without gradient"):
        HankelRegularizer(1.0)(model)


def test_unstable_layers_are_named(model: nn.Sequential) -> None:
    with torch.no_grad():
        model[1].nu_log[0] = -100
    with pytest.raises(UnstableSystemError, match="layer '1'"):
        HankelRegularizer(1.0)(model)


@pytest.mark.parametrize("weight", [-1.0, float("nan")])
def test_weights_that_can_not_be_meant(weight: float) -> None:
    with pytest.raises(ValueError, match="weight"):
        HankelRegularizer(weight)


def test_frozen_states_beside_a_trained_feedthrough_are_no_error(model: nn.Sequential) -> None:
    for layer in (model[1], model[3]):
        layer.requires_grad_(False)
        layer.D.requires_grad_(True)
    assert not HankelRegularizer(1.0)(model).requires_grad
