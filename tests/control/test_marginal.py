"""Poles on the unit circle: refused for infinite Gramians, exact sums for a horizon."""

import pytest
import torch

from lightning_compressm import compress
from lightning_compressm.control import (
    DiagonalLTI,
    balanced_truncation,
    hankel_singular_values,
)
from lightning_compressm.control.gramians import gramians, impulse_energy, real_gramians
from lightning_compressm.errors import UnstableSystemError
from lightning_compressm.nn import LRU
from tests.control.systems import BALANCES, random_system
from tests.control.test_gramians import finite_sums

ANGLES = (0.0, 3.141592653589793, 0.3, -0.3, 0.3, 2.0)


def marginal_system(excess: float = 0.0) -> DiagonalLTI:
    """Single, repeated and conjugate poles on the circle, and four inside it."""
    system = random_system(10, 2, 2, seed=4)
    angles = torch.tensor(ANGLES, dtype=torch.float64)
    system.eigenvalues[: len(ANGLES)] = torch.polar(torch.full_like(angles, 1 + excess), angles)
    return system


@pytest.mark.parametrize("horizon", [1, 2, 37, 1000])
@pytest.mark.parametrize("excess", [0.0, 2e-16, -2e-16, 1e-12, -1e-12, 1e-8, 4e-7])
def test_gramians_are_the_sums(horizon, excess):
    system = marginal_system(excess)
    complex_form = torch.diag(system.eigenvalues), system.B, system.C
    for form, pair in (
        (complex_form, gramians(system, horizon=horizon)),
        (system.to_real(), real_gramians(system, horizon=horizon)),
    ):
        for got, expected in zip(pair, finite_sums(*form, horizon), strict=True):
            scale = float(expected.abs().max())
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12 * scale)
    energy = system.impulse_response(horizon).square().sum()
    torch.testing.assert_close(impulse_energy(system, horizon=horizon), energy)


def test_the_sum_of_ones_is_the_horizon():
    one = torch.ones(1, 1)
    for eigenvalue in (1.0, -1.0, 1j):
        system = DiagonalLTI(torch.tensor([eigenvalue]), one, one)
        assert gramians(system, horizon=100)[0].item() == 100


def test_gradients_are_finite_differences():
    system = marginal_system()

    def total(scale):
        scaled = DiagonalLTI(system.eigenvalues * scale, system.B, system.C)
        return impulse_energy(scaled, horizon=20)

    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    (got,) = torch.autograd.grad(total(scale), scale)
    step = 4e-7
    differences = (total(scale + step) - total(scale - step)).item() / (2 * step)
    assert got.item() == pytest.approx(differences, rel=1e-6)


@pytest.mark.parametrize("balance", BALANCES)
@pytest.mark.parametrize("order", [1, 3, 8, 10])
def test_reductions_stay_on_or_inside_the_circle(balance, order):
    system = marginal_system()
    reduction = balanced_truncation(system, order, balance=balance, horizon=50)
    assert reduction.system.order == order
    assert float(reduction.system.eigenvalues.abs().max()) <= 1 + 1e-15
    if order == 8:
        expected = system.impulse_response(50)
        error = (reduction.system.impulse_response(50) - expected).norm() / expected.norm()
        assert error < 0.2
    assert torch.isfinite(torch.view_as_real(reduction.system.B)).all()


def test_missing_states_are_padded_with_inputs():
    system = marginal_system()
    system.C[:, 1:] = 0
    reduction = balanced_truncation(system, 6, horizon=50)
    assert bool((reduction.system.B.norm(dim=-1) > 0).all())


@pytest.mark.parametrize("balance", BALANCES)
def test_infinite_gramians_are_refused_with_what_would_do(balance):
    with pytest.raises(UnstableSystemError, match="those of a finite `horizon` do"):
        hankel_singular_values(marginal_system(1e-15), balance=balance)


@pytest.mark.parametrize("horizon", [None, 100])
def test_unstable_poles_are_refused(horizon):
    with pytest.raises(UnstableSystemError, match=r"modulus .* \(largest 1\.01\)") as caught:
        hankel_singular_values(marginal_system(0.01), horizon=horizon)
    assert "finite `horizon`" not in str(caught.value)


def test_a_layer_on_the_circle_is_reduced_with_a_horizon():
    torch.manual_seed(0)
    layer = LRU(2, 12, r_min=0.5, r_max=0.6)
    with torch.no_grad():
        layer.nu_log[0] = -80.0
        layer.theta_log[0] = -0.5
        layer.gamma_log[0] = -1.0
    x = torch.randn(1, 50, 2)
    before = layer(x).detach()
    with pytest.raises(UnstableSystemError, match="finite `horizon`"):
        compress(layer, state_dim=10)
    compress(layer, state_dim=10, horizon=50)
    assert layer.d_state == 10
    assert float((layer(x).detach() - before).norm() / before.norm()) < 0.05
