"""The projection of one system on another one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_compressm.control import DiagonalLTI, Projection, balanced_truncation

from .systems import random_system, rank

FORMS = [("real", None), ("real", 40), ("folded", None), ("complex", None)]


def moved(system: DiagonalLTI, amount: float) -> DiagonalLTI:
    """The system with other values: somewhat smaller radii, other matrices."""
    generator = torch.Generator().manual_seed(1)

    def noise(tensor: torch.Tensor) -> torch.Tensor:
        return torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)

    eigenvalues = system.eigenvalues * torch.exp(-amount * noise(system.eigenvalues).abs())
    return DiagonalLTI(
        eigenvalues.to(system.eigenvalues.dtype),
        system.B + amount * noise(system.B),
        system.C + amount * noise(system.C),
        system.real_output,
    )


def responses(*systems: DiagonalLTI) -> list[torch.Tensor]:
    return [system.impulse_response(60) for system in systems]


@pytest.mark.parametrize(("balance", "horizon"), FORMS)
@pytest.mark.parametrize("seed", range(5))
def test_its_own_system_gives_the_reduction(balance: Any, horizon: int | None, seed: int) -> None:
    system = random_system(12, 3, 2, seed=seed)
    reduction = balanced_truncation(system, 5, balance=balance, horizon=horizon)
    if reduction.horizon != horizon:
        pytest.skip("the clamped poles of this system are not those of its projection")
    same = Projection.of(reduction).apply(system)
    for got, wanted in zip(responses(same), responses(reduction.system), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("balance", "horizon"), FORMS)
def test_difference_from_the_exact_projection_is_of_second_order(
    balance: Any, horizon: int | None
) -> None:
    """Ten times closer systems: the neglected part gets far more than ten times smaller."""
    system = random_system(12, 3, 2)
    reduction = balanced_truncation(system, 5, balance=balance, horizon=horizon)
    projection = Projection.of(reduction)
    start = projection.apply(system)
    errors = []
    for amount in (1e-3, 1e-4):
        after = projection.apply(moved(system, amount))
        # First-order prediction from a ten times smaller step.
        near = projection.apply(moved(system, amount / 10))
        change = (after.eigenvalues - start.eigenvalues) / amount
        slope = (near.eigenvalues - start.eigenvalues) / (amount / 10)
        errors.append(float((change - slope).abs().max()))
    assert errors[1] < errors[0] / 5


def test_full_order_keeps_other_values_exactly() -> None:
    system = random_system(8, 3, 2, seed=3)
    other = moved(system, 0.05)
    reduction = balanced_truncation(system, 8, balance="real")
    got = Projection.of(reduction).apply(other)
    torch.testing.assert_close(*responses(got, other), rtol=1e-9, atol=1e-12)


def test_spare_states_and_stability() -> None:
    """Padding keeps its poles and stays silent; no radius exceeds those of the other system."""
    few = DiagonalLTI(torch.full((6,), 0.9), torch.ones(6, 1), torch.ones(1, 6)).double()
    reduction = balanced_truncation(few, 3, balance="real")
    assert int(rank(reduction)) < 3
    got = Projection.of(reduction).apply(few)
    spare = slice(int(rank(reduction)), None)
    assert torch.equal(got.eigenvalues[spare], reduction.system.eigenvalues[spare])
    assert torch.equal(got.C[:, spare], torch.zeros_like(got.C[:, spare]))
    for seed in range(20):
        system = random_system(12, 3, 2, seed=seed)
        reduction = balanced_truncation(system, 4, horizon=30)
        other = moved(system, 0.3)
        radius = Projection.of(reduction).apply(other).eigenvalues.abs().max()
        known = torch.cat((other.eigenvalues, reduction.system.eigenvalues)).abs().max()
        assert radius <= known * (1 + 1e-12) < 1


def test_plain_data_and_back() -> None:
    reduction = balanced_truncation(random_system(6, 3, 2), 2)
    data = Projection.of(reduction).to_dict()
    assert all(isinstance(value, torch.Tensor) for value in data.values())
    assert torch.equal(Projection.from_dict(data).basis.left, reduction.basis.left)
