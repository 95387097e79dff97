from fractions import Fraction

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_compressm.control import DiagonalLTI, gramians, real_gramians
from lightning_compressm.control.gramians import impulse_energy
from lightning_compressm.errors import NonFiniteError, UnstableSystemError
from tests.control.systems import quick, random_system, systems


def finite_sums(a, b, c, horizon):
    p, q = torch.zeros_like(a), torch.zeros_like(a)
    reach, see = b, c
    for _ in range(horizon):
        p, q = p + reach @ reach.mH, q + see.mH @ see
        reach, see = a @ reach, see @ a
    return p, q


@quick
@given(systems())
def test_real_gramians_solve_the_lyapunov_equations(system):
    p, q = (g.numpy() for g in real_gramians(system))
    a, b, c = (m.numpy() for m in system.to_real())
    for got, (state, rest) in ((p, (a, b @ b.T)), (q, (a.T, c.T @ c))):
        expected = scipy.linalg.solve_discrete_lyapunov(state, rest)
        np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-12 * np.abs(expected).max())


@quick
@given(systems())
def test_complex_gramians_solve_the_lyapunov_equations(system):
    p, q = gramians(system)
    full = system.double()
    a = torch.diag(full.eigenvalues)
    torch.testing.assert_close(a @ p @ a.mH + full.B @ full.B.mH, p, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(a.mH @ q @ a + full.C.mH @ full.C, q, rtol=1e-10, atol=1e-10)


@quick
@given(systems(max_radius=0.99999), st.integers(1, 70))
def test_time_limited_gramians_are_finite_sums(system, horizon):
    full = system.double()
    complex_form = torch.diag(full.eigenvalues), full.B, full.C
    for form, pair in (
        (complex_form, gramians(system, horizon=horizon)),
        (system.to_real(), real_gramians(system, horizon=horizon)),
    ):
        for got, expected in zip(pair, finite_sums(*form, horizon), strict=True):
            scale = float(expected.abs().max())
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12 * scale)


@pytest.mark.parametrize("horizon", [1, 2, 3, 64, 1000])
def test_horizon_and_unit_circle_do_not_cancel(horizon):
    system = random_system(5, 2, 2, radii=(1 - 1e-13, 1 - 1e-12))
    full = system.double()
    expected = finite_sums(torch.diag(full.eigenvalues), full.B, full.C, horizon)
    for got, wanted in zip(gramians(system, horizon=horizon), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11 * horizon)


def test_long_horizons_reach_the_infinite_gramians():
    system = random_system(4, 2, 2)
    for got, wanted in zip(real_gramians(system, horizon=5000), real_gramians(system), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("distance", [1e-3, 1e-9, 1e-12])
@pytest.mark.parametrize("angle", [0.0, 0.3, 0.7853981633974483, 3.0])
def test_diagonal_is_exact_near_the_unit_circle(distance, angle):
    value = torch.polar(
        torch.tensor(1 - distance, dtype=torch.float64), torch.tensor(angle, dtype=torch.float64)
    )
    gap = 1 - Fraction(float(value.real)) ** 2 - Fraction(float(value.imag)) ** 2
    one = torch.ones(1, 1)
    p, _ = gramians(DiagonalLTI(value.reshape(1), one, one))
    assert float(p.real) == pytest.approx(float(1 / gap), rel=1e-14)


@pytest.mark.parametrize("horizon", [None, 1, 37])
@pytest.mark.parametrize("real_output", [True, False])
def test_impulse_energy_is_the_sum_of_squares(horizon, real_output):
    system = random_system(4, 2, 3, radii=(0.2, 0.9), batch=(3,), real_output=real_output)
    response = system.impulse_response(horizon or 600)
    expected = response.abs().square().sum((-3, -2, -1))
    torch.testing.assert_close(impulse_energy(system, horizon=horizon), expected)


def test_batched_gramians_are_those_of_each_system():
    system = random_system(4, 2, 3, batch=(2, 3))
    for function in (gramians, real_gramians):
        together = function(system, horizon=9)
        one = DiagonalLTI(system.eigenvalues[1, 2], system.B[1, 2], system.C[1, 2])
        for got, wanted in zip(together, function(one, horizon=9), strict=True):
            torch.testing.assert_close(got[1, 2], wanted, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("horizon", [0, -3, 2.5, "8", True])
def test_bad_horizons_are_refused(horizon):
    for function in (gramians, real_gramians):
        with pytest.raises(ValueError, match=r"expected horizon=None .* got .*length of your"):
            function(random_system(2, 1, 1), horizon=horizon)


def test_bad_systems_are_refused():
    one = torch.ones(1, 1)
    for function in (gramians, real_gramians):
        with pytest.raises(UnstableSystemError, match="inside the unit circle"):
            function(DiagonalLTI(torch.ones(1), one, one))
        with pytest.raises(NonFiniteError, match="expected finite B"):
            function(DiagonalLTI(torch.zeros(1), one * torch.nan, one))
    with pytest.raises(ValueError, match="real_output=False"):
        real_gramians(DiagonalLTI(torch.zeros(1), one, one, real_output=False))
