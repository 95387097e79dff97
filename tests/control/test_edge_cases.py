"""Systems that break naive implementations: the result is right, or a named error."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_compressm.control import (
    DiagonalLTI,
    _eigen,
    _stable,
    balanced_truncation,
    hankel,
    hankel_singular_values,
    order_for_energy,
    per_state_energy,
    truncation,
)
from lightning_compressm.errors import IllConditionedError, NonFiniteError, UnstableSystemError
from tests.control.systems import (
    BALANCES,
    hinf_error,
    quick,
    random_system,
    rank,
    relative_impulse_error,
)

balances = pytest.mark.parametrize("balance", BALANCES)


def assert_sound(system, order, balance, slack=1e-8):
    reduction = balanced_truncation(system, order, balance=balance)
    assert reduction.system.order == reduction.order == order
    reduction.system.check()
    rounding = slack * float(reduction.sigma[0])
    assert float(hinf_error(system, reduction.system)) <= float(reduction.bound) + rounding
    return reduction


@balances
@pytest.mark.parametrize("ports", [(1, 1), (1, 3), (3, 1), (3, 3)])
@pytest.mark.parametrize("order", [1, 4, 5])
def test_repeated_eigenvalues(balance, ports, order):
    system = random_system(6, *ports)
    system.eigenvalues[1] = system.eigenvalues[0]
    system.eigenvalues[2] = system.eigenvalues[0].conj()
    reduction = assert_sound(system, order, balance)
    if ports[0] == 1 and order == 5 and balance != "complex":
        # One port can't tell states with equal poles apart: four of the six remain.
        assert int(rank(reduction)) == 4
        assert relative_impulse_error(system, reduction.system) < 1e-10


@balances
@pytest.mark.parametrize("order", [1, 3, 4])
def test_zero_eigenvalues(balance, order):
    system = random_system(5, 2, 2)
    system.eigenvalues[1] = 0
    assert_sound(system, order, balance)
    system.eigenvalues[:] = 0
    reduction = assert_sound(system, order, balance)
    if order == 4:
        assert relative_impulse_error(system, reduction.system) < 1e-10


@balances
@pytest.mark.parametrize("distance", [1e-6, 1e-9])
@pytest.mark.parametrize("order", [1, 3, 5])
def test_poles_near_the_unit_circle(balance, distance, order):
    system = random_system(6, 2, 2, radii=(1 - 2 * distance, 1 - distance))
    # Rounding moves a pole by 1e-16 or so, which is much of what keeps it off the circle.
    slack = 1e-8 + 1e-14 / distance
    values = assert_sound(system, order, balance, slack).sigma
    assert 0.01 < float(values[0]) * distance < 100
    mixed = random_system(6, 2, 2, radii=(0.2, 0.9))
    mixed.eigenvalues[0] = 1 - distance
    mixed.eigenvalues[1] = -1 + distance
    reduced = assert_sound(mixed, order, balance, slack).system
    assert float(reduced.eigenvalues.abs().max()) < 1


@balances
@pytest.mark.parametrize("what", ["B", "C"])
def test_states_that_are_not_reached_or_not_seen(balance, what):
    system = random_system(6, 2, 2)
    if what == "B":
        system.B[[1, 4]] = 0
    else:
        system.C[:, [1, 4]] = 0
    values = hankel_singular_values(system, balance=balance)
    exist = 8 if balance == "real" else 4
    assert int((values > 1e-14 * values[0]).sum()) == exist
    energies = per_state_energy(values, balance)
    assert order_for_energy(energies, 0.0) == 4
    for order in (4, 5):
        reduction = assert_sound(system, order, balance)
        assert relative_impulse_error(system, reduction.system) < 1e-10
        assert int(rank(reduction)) == 4
        assert float(reduction.energy_kept) == pytest.approx(1)


@balances
def test_padding_can_be_trained(balance):
    system = random_system(8, 2, 2, radii=(0.6, 0.9))
    system.C[:, 1:] = 0
    reduction = balanced_truncation(system, 5, balance=balance)
    assert int(rank(reduction)) == 1
    spare = slice(1, 5)
    assert bool((reduction.system.B[spare].abs().sum(-1) > 0).all())
    assert not bool(reduction.system.C[:, spare].any())
    radii, before = reduction.system.eigenvalues[spare].abs(), system.eigenvalues.abs()
    assert float(radii.min()) >= float(before.min()) - 1e-12
    assert float(radii.max()) <= float(before.max()) + 1e-12
    if balance != "complex":
        assert bool((reduction.system.eigenvalues.imag >= 0).all())
    again = balanced_truncation(system, 5, balance=balance)
    assert torch.equal(reduction.system.B, again.system.B)
    assert len(set(reduction.system.eigenvalues[spare].tolist())) == 4


@balances
def test_a_bank_pads_each_system_by_itself(balance):
    system = random_system(4, 1, 1, batch=(3,))
    system.C[1, :, 1:] = 0
    system.B[2] = 0
    bank = balanced_truncation(system, 3, balance=balance)
    assert rank(bank).tolist() == [3, 1, 0]
    assert bank.energy_kept[1:].tolist() == [1, 1]
    assert bank.bound.shape == (3,)
    torch.testing.assert_close(
        bank.system.impulse_response(20)[1:], system.impulse_response(20)[1:]
    )


@balances
def test_a_system_without_input(balance):
    system = random_system(4, 2, 2)
    system.B[:] = 0
    assert not bool(hankel_singular_values(system, balance=balance).any())
    reduction = balanced_truncation(system, 2, balance=balance)
    assert int(rank(reduction)) == 0
    assert float(reduction.bound) == 0
    assert float(reduction.energy_kept) == 1
    assert not bool(reduction.system.impulse_response(5).any())
    with pytest.raises(ValueError, match="zero Hankel energy"):
        order_for_energy(reduction.sigma, 0.1)


@balances
@pytest.mark.parametrize("horizon", [None, 5])
def test_smallest_sizes(balance, horizon):
    system = random_system(1, 1, 1)
    reduction = balanced_truncation(system, 1, balance=balance, horizon=horizon)
    assert relative_impulse_error(system, reduction.system) < 1e-14
    two = random_system(2, 1, 1)
    assert balanced_truncation(two, 1, balance=balance, horizon=horizon).order == 1


@balances
@quick
@given(st.integers(0, 1000), st.sampled_from([(0.0, 0.3), (0.1, 0.9), (0.9, 0.999)]))
def test_one_port_with_a_spectrum_below_rounding(balance, seed, radii):
    # Values fall below 1e-14 of the first: every order is still served, with a correct map.
    system = random_system(16, 1, 1, seed=seed, radii=radii)
    for order in (4, 10, 15):
        reduction = assert_sound(system, order, balance)
        if float(reduction.energy_kept) > 1 - 1e-12:
            assert relative_impulse_error(system, reduction.system) < 1e-8


@balances
def test_badly_scaled_states(balance):
    system = random_system(6, 3, 3)
    scale = torch.logspace(-40, 40, 6, dtype=torch.float64)
    scaled = DiagonalLTI(system.eigenvalues, system.B * scale.unsqueeze(-1), system.C / scale)
    expected = hankel_singular_values(system, balance=balance)
    got = hankel_singular_values(scaled, balance=balance)
    if balance == "real":
        assert got.shape == (12,)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=0)
    reduced = balanced_truncation(scaled, 3, balance=balance).system
    reference = balanced_truncation(system, 3, balance=balance).system
    torch.testing.assert_close(reduced.impulse_response(30), reference.impulse_response(30))


def test_real_poles_take_a_state_each():
    # SISO with real poles: N of the 2N real states exist, so order r means r of them, not 2r.
    eigenvalues = torch.tensor([0.9, 0.7, -0.5, 0.3, 0.1], dtype=torch.float64)
    one = torch.ones(5, 1, dtype=torch.float64)
    system = DiagonalLTI(eigenvalues, one, one.mT)
    real = assert_sound(system, 3, "real")
    folded = assert_sound(system, 3, "folded")
    assert bool((real.system.eigenvalues.imag == 0).all())
    torch.testing.assert_close(real.system.impulse_response(30), folded.system.impulse_response(30))
    torch.testing.assert_close(real.bound, folded.bound, rtol=1e-7, atol=1e-10)
    assert bool((real.system.B.imag == 0).all())


@balances
@pytest.mark.parametrize("name", ["eigenvalues", "B", "C"])
def test_nan_is_refused(balance, name):
    system = random_system(4, 2, 2)
    getattr(system, name).view(-1)[1] = torch.nan
    with pytest.raises(NonFiniteError, match=f"expected finite {name}"):
        balanced_truncation(system, 2, balance=balance)


@balances
@pytest.mark.parametrize("order", [2, 4])
@pytest.mark.parametrize("horizon", [None, 10])
def test_unstable_systems_are_refused(balance, order, horizon):
    system = random_system(4, 2, 2)
    system.eigenvalues[0] = 1.0 if horizon is None else 1.001
    with pytest.raises(UnstableSystemError, match="got 1 of 4"):
        balanced_truncation(system, order, balance=balance, horizon=horizon)


def test_dependent_eigenvectors_are_refused():
    jordan = torch.tensor([[0.5, 1.0], [0.0, 0.5]], dtype=torch.complex128)
    with pytest.raises(IllConditionedError, match="choose another number of states"):
        _eigen.diagonalise(jordan)
    with pytest.raises(NonFiniteError, match="reduced state matrix"):
        _eigen.diagonalise(jordan * torch.nan)


@balances
def test_failed_diagonalisation_is_reported(balance, monkeypatch):
    monkeypatch.setattr(_eigen, "MAX_CONDITION", 0.5)
    with pytest.raises(IllConditionedError, match="condition number up to"):
        balanced_truncation(random_system(6, 3, 3), 3, balance=balance)


@balances
def test_unstable_results_are_reported(balance, monkeypatch):
    monkeypatch.setattr(_stable, "_ROUNDING", -1.0)
    system = random_system(6, 3, 3)

    def outside(form, *_):
        far = replace(form.system, eigenvalues=form.system.eigenvalues * 3)
        return replace(form, system=far)

    modes = truncation._modes
    monkeypatch.setattr(truncation, "_modes", lambda *a: outside(modes(*a)))
    with pytest.raises(UnstableSystemError, match="expected a stable reduced system"):
        balanced_truncation(system, 3, balance=balance)


class Elsewhere:
    """Stands for a tensor on another device."""

    device = torch.device("cuda")

    def __init__(self, tensor):
        self.tensor = tensor
        self.ndim, self.shape, self.is_complex = tensor.ndim, tensor.shape, tensor.is_complex

    def to(self, device, *_):
        return self.tensor if device == torch.device("cpu") else self


def test_device_that_fails_hands_over_to_the_cpu():
    """The tensors of a system that lies elsewhere are only moved, until one comes to the CPU."""
    system = random_system(3, 1, 1, dtype=torch.complex64)
    there = DiagonalLTI(*(Elsewhere(p) for p in (system.eigenvalues, system.B, system.C)))
    tried = []

    def compute(candidate):
        tried.append(candidate)
        if isinstance(candidate.B, Elsewhere):
            raise RuntimeError("no such kernel")
        return hankel_singular_values(candidate)

    result = hankel.in_double(compute, there)
    assert len(tried) == 2
    assert tried[1].B.dtype == torch.complex128
    assert torch.equal(result, hankel_singular_values(system))


@pytest.mark.cuda
@balances
@pytest.mark.parametrize("horizon", [None, 12])
@pytest.mark.parametrize("ports", [1, 3])
def test_cuda_gives_the_cpus_result(balance, horizon, ports):
    system = random_system(10, ports, ports, batch=(2,))
    there = DiagonalLTI(*(p.cuda() for p in (system.eigenvalues, system.B, system.C)))
    expected = balanced_truncation(system, 4, balance=balance, horizon=horizon)
    got = balanced_truncation(there, 4, balance=balance, horizon=horizon)
    assert got.basis.left.device.type == got.sigma.device.type == got.system.B.device.type == "cuda"
    torch.testing.assert_close(got.sigma.cpu(), expected.sigma, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(
        got.system.impulse_response(30).cpu(),
        expected.system.impulse_response(30),
        rtol=1e-6,
        atol=1e-7,
    )


def fit_step_by_step(matrix, order):
    """Size of the first leading block that fits, by eigenvalues in double precision alone."""
    size = len(matrix)
    while True:
        states = int((torch.linalg.eigvals(matrix[:size, :size]).imag >= 0).sum())
        if states <= order:
            return size
        size -= states - order


@pytest.mark.parametrize("order", [70, 75, 90, 100, 130])
@pytest.mark.parametrize("kind", ["random", "ill-conditioned pairs"])
def test_the_block_that_fits_is_that_of_double_precision(kind, order):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(140, 140, generator=generator, dtype=torch.float64)
    if kind == "random":
        matrix = 0.05 * matrix
    else:  # 6e-5 apart: single precision can't tell them from complex pairs
        pair = torch.tensor([[0.0, 1.0], [1e-9, 0.0]], dtype=torch.float64)
        pairs = [pair + a * torch.eye(2) for a in torch.linspace(-0.9, 0.9, 70).double()]
        basis = torch.linalg.qr(matrix).Q
        matrix = basis @ torch.block_diag(*pairs) @ basis.mT
    found = len(_eigen.largest_fit(matrix, order)[0])
    wanted = fit_step_by_step(matrix, order)
    # Rounding decides whether such a pair is complex, so the way down may differ by a step.
    assert found == wanted if kind == "random" else abs(found - wanted) <= 1
