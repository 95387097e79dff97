import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_compressm.control import (
    DiagonalLTI,
    gramians,
    hankel_singular_values,
    per_state_energy,
    real_gramians,
)
from lightning_compressm.errors import NonFiniteError, UnstableSystemError
from tests.control.exact import exact_singular_values, real_system_as_complex
from tests.control.systems import BALANCES, conjugate, quick, random_system, systems

HARD = [
    # order, inputs, outputs, radii: Gramians that are singular in double precision
    (14, 1, 1, (0.0, 0.5)),
    (12, 2, 1, (0.0, 0.3)),
    (10, 1, 3, (0.9, 0.999)),
    (6, 2, 2, (1 - 1e-9, 1 - 1e-11)),
]


def assert_close_above(got, expected, floor, rtol):
    got, expected = np.asarray(got), np.asarray(expected)
    relevant = expected > floor * expected[0]
    np.testing.assert_allclose(got[: len(expected)][relevant], expected[relevant], rtol=rtol)


def scipy_singular_values(a, b, c):
    p = scipy.linalg.solve_discrete_lyapunov(a, b @ b.T)
    q = scipy.linalg.solve_discrete_lyapunov(a.T, c.T @ c)
    squares = np.linalg.eigvals(p @ q)
    return np.sqrt(np.sort(squares.real.clip(min=0))[::-1])


def scipy_square_root(a, b, c):
    p = scipy.linalg.solve_discrete_lyapunov(a, b @ b.T)
    q = scipy.linalg.solve_discrete_lyapunov(a.T, c.T @ c)
    l_p, l_q = np.linalg.cholesky(p), np.linalg.cholesky(q)
    return np.linalg.svd(l_q.T @ l_p, compute_uv=False)


# As many ports as half the states: there SciPy and pyMOR know all digits as well.
well_posed = st.builds(
    random_system,
    st.integers(1, 7),
    st.integers(4, 6),
    st.integers(4, 6),
    seed=st.integers(0, 10_000),
    radii=st.sampled_from([(0.3, 0.9), (0.5, 0.99), (0.8, 0.999)]),
    dtype=st.sampled_from([torch.complex64, torch.complex128]),
)


@quick
@given(well_posed)
def test_real_values_are_those_of_scipys_gramians(system):
    expected = scipy_square_root(*(m.numpy() for m in system.to_real()))
    assert_close_above(hankel_singular_values(system), expected, 1e-7, 1e-8)


@quick
@given(well_posed)
def test_real_values_are_those_of_pymor(system):
    iosys = pytest.importorskip("pymor.models.iosys")
    model = iosys.LTIModel.from_matrices(*(m.numpy() for m in system.to_real()), sampling_time=1)
    assert_close_above(hankel_singular_values(system), model.hsv(), 1e-7, 1e-8)


@quick
@given(well_posed)
def test_values_are_roots_of_the_eigenvalues_of_pq(system):
    for balance, (p, q) in (("real", real_gramians(system)), ("complex", gramians(system))):
        squares = torch.linalg.eigvals(p @ q).real.clamp(min=0)
        expected = squares.sqrt().sort(descending=True).values
        assert_close_above(hankel_singular_values(system, balance=balance), expected, 1e-4, 1e-6)


@pytest.mark.parametrize(("n", "inputs", "outputs", "radii"), HARD)
def test_complex_values_are_exact_for_singular_gramians(n, inputs, outputs, radii):
    system = random_system(n, inputs, outputs, radii=radii, seed=n)
    got = hankel_singular_values(system, balance="complex")
    # The issue is not the largest ones: a formed Gramian loses all digits below 1e-8.
    assert_close_above(got, exact_singular_values(system), 1e-14, 1e-8)


@pytest.mark.parametrize(("n", "inputs", "outputs", "radii"), HARD[:2])
def test_real_values_are_exact_for_singular_gramians(n, inputs, outputs, radii):
    system = random_system(n // 2, inputs, outputs, radii=radii, seed=n)
    got = hankel_singular_values(system)
    assert_close_above(got, exact_singular_values(real_system_as_complex(system)), 1e-14, 1e-8)


@pytest.mark.parametrize("balance", BALANCES)
def test_a_single_state_is_a_quotient(balance):
    one = torch.ones(1, 1)
    values = hankel_singular_values(DiagonalLTI(torch.tensor([0.5]), 3 * one, one), balance=balance)
    assert float(values[0]) == pytest.approx(4.0, rel=1e-14)
    assert values.shape == ((2,) if balance == "real" else (1,))
    assert values.dtype == torch.float64


@quick
@given(systems(max_order=6), st.lists(st.booleans(), min_size=6, max_size=6), st.booleans())
def test_real_and_folded_do_not_depend_on_conjugated_states(system, flags, limited):
    other = conjugate(system, torch.tensor(flags[: system.order]))
    for balance in ("real", "folded"):
        expected, got = (
            hankel_singular_values(s, balance=balance, horizon=20 if limited else None)
            for s in (system, other)
        )
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-9 * float(expected[0]))


def test_complex_values_do_depend_on_conjugated_states():
    # The same map and other values: they are no property of the layer, hence not the default.
    system = random_system(4, 2, 2)
    other = conjugate(system, torch.tensor([True, False, False, False]))
    torch.testing.assert_close(other.impulse_response(20), system.impulse_response(20))
    before, after = (hankel_singular_values(s, balance="complex") for s in (system, other))
    assert float((before - after).abs().max()) > 0.01 * float(before[0])


@quick
@given(systems(), st.integers(1, 100))
def test_longer_horizons_have_larger_values(system, horizon):
    for balance in BALANCES:
        short, longer, infinite = (
            hankel_singular_values(system, balance=balance, horizon=h)
            for h in (horizon, horizon + 1, None)
        )
        slack = 1e-7 * float(infinite[0])
        assert bool((short <= longer + slack).all())
        assert bool((longer <= infinite + slack).all())


@pytest.mark.parametrize("balance", BALANCES)
@pytest.mark.parametrize("horizon", [None, 10])
@pytest.mark.parametrize("ports", [1, 3])
def test_batched_values_are_those_of_each_system(balance, horizon, ports):
    # With one port some of the Gramians are singular and take the other route.
    system = random_system(9, ports, ports, radii=(0.1, 0.8), batch=(2, 2))
    together = hankel_singular_values(system, balance=balance, horizon=horizon)
    assert together.shape == (2, 2, 18 if balance == "real" else 9)
    for i in range(2):
        for j in range(2):
            one = DiagonalLTI(system.eigenvalues[i, j], system.B[i, j], system.C[i, j])
            alone = hankel_singular_values(one, balance=balance, horizon=horizon)
            torch.testing.assert_close(
                together[i, j], alone, rtol=1e-9, atol=1e-12 * float(alone[0])
            )


@pytest.mark.parametrize("balance", BALANCES)
@pytest.mark.parametrize("horizon", [None, 15])
@pytest.mark.parametrize("ports", [1, 3])
def test_gradients_are_finite_differences(balance, horizon, ports):
    system = random_system(4, ports, ports)
    real = [torch.view_as_real(p).clone() for p in (system.eigenvalues, system.B, system.C)]

    def score(*parts):
        whole = DiagonalLTI(*(torch.view_as_complex(part) for part in parts))
        values = hankel_singular_values(whole, balance=balance, horizon=horizon)
        return values[0] + values[:3].square().sum()

    for part in real:
        part.requires_grad_()
    assert torch.autograd.gradcheck(score, real, eps=1e-6, atol=1e-6, rtol=1e-5)


def test_gradients_survive_repeated_and_unused_states():
    system = random_system(4, 2, 2)
    eigenvalues = system.eigenvalues.clone()
    eigenvalues[1] = eigenvalues[0]
    eigenvalues[2] = 0
    b = system.B.clone()
    b[3] = 0
    parts = [p.requires_grad_() for p in (eigenvalues, b, system.C.clone())]
    hankel_singular_values(DiagonalLTI(*parts)).sum().backward()
    assert all(bool(torch.isfinite(part.grad).all()) for part in parts)


def test_second_derivatives_are_refused():
    system = random_system(2, 1, 1)
    b = system.B.clone().requires_grad_()
    values = hankel_singular_values(DiagonalLTI(system.eigenvalues, b, system.C))
    with pytest.raises(RuntimeError, match="second derivatives are not available"):
        torch.autograd.grad(values.sum(), b, create_graph=True)


def test_per_state_energy_adds_pairs_of_the_real_form():
    sigma = torch.tensor([[4.0, 3.0, 2.0, 0.5]])
    assert per_state_energy(sigma, "real").tolist() == [[7.0, 2.5]]
    assert per_state_energy(sigma, "folded") is sigma
    with pytest.raises(ValueError, match=r"even number .* got 3"):
        per_state_energy(sigma[..., :3], "real")
    with pytest.raises(ValueError, match="one of real, folded, complex, modes, got 'imaginary'"):
        per_state_energy(sigma, "imaginary")


def test_single_precision_input_is_promoted():
    system = random_system(5, 2, 2, dtype=torch.complex64)
    expected = hankel_singular_values(system.double())
    torch.testing.assert_close(hankel_singular_values(system), expected, rtol=0, atol=0)


def test_bad_arguments_are_refused():
    system = random_system(2, 1, 1)
    with pytest.raises(ValueError, match="got 'auto'"):
        hankel_singular_values(system, balance="auto")
    with pytest.raises(ValueError, match="got 0"):
        hankel_singular_values(system, horizon=0)
    one = torch.ones(1, 1)
    with pytest.raises(UnstableSystemError, match="modulus 1 or more"):
        hankel_singular_values(DiagonalLTI(torch.tensor([-1.0]), one, one))
    with pytest.raises(NonFiniteError, match="expected finite C"):
        hankel_singular_values(DiagonalLTI(torch.zeros(1), one, one * torch.nan))
    with pytest.raises(NonFiniteError, match="rescale the layer"):
        hankel_singular_values(
            DiagonalLTI(torch.zeros(1), one.double() * 1e200, one), balance="complex"
        )
    complex_output = DiagonalLTI(torch.zeros(1), one, one, real_output=False)
    assert hankel_singular_values(complex_output, balance="complex").shape == (1,)
    for balance in ("real", "folded"):
        with pytest.raises(ValueError, match="balance='complex'"):
            hankel_singular_values(complex_output, balance=balance)
