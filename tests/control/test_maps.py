"""The widely linear maps between the old and the new state."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_compressm.control import DiagonalLTI, balanced_truncation
from tests.control.systems import BALANCES, genuine, quick, random_system, rank, systems


def to_new(reduction, x):
    return reduction.basis.left @ x + reduction.basis.left_conj @ x.conj()


def to_old(reduction, x):
    return reduction.basis.right @ x + reduction.basis.right_conj @ x.conj()


def assert_consistent(system, reduction):
    full, rows = system.double(), genuine(reduction)
    b = to_new(reduction, full.B)[rows]
    c = full.C @ reduction.basis.right + full.C.conj() @ reduction.basis.right_conj.conj()
    scale_b, scale_c = float(b.abs().max()), float(c.abs().max())
    torch.testing.assert_close(reduction.system.B[rows], b, rtol=1e-9, atol=1e-10 * scale_b)
    torch.testing.assert_close(reduction.system.C, c, rtol=1e-9, atol=1e-10 * scale_c)


@quick
@given(systems(), st.data())
def test_maps_give_the_reduced_matrices(system, data):
    order = data.draw(st.integers(1, system.order))
    horizon = data.draw(st.sampled_from([None, 10]))
    for balance in BALANCES:
        reduction = balanced_truncation(system, order, balance=balance, horizon=horizon)
        assert_consistent(system, reduction)


@pytest.mark.parametrize("balance", BALANCES)
@pytest.mark.parametrize("order", [1, 3, 6, 7])
def test_old_and_back_is_the_identity(balance, order):
    reduction = balanced_truncation(random_system(7, 2, 2), order, balance=balance)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(order, 5, generator=generator, dtype=torch.complex128)
    real = reduction.system.eigenvalues.imag == 0
    if balance == "real" and order < 7:
        x[real] = x[real].real.to(x.dtype)
    torch.testing.assert_close(to_new(reduction, to_old(reduction, x)), x)


def test_states_of_real_poles_stay_real():
    found = 0
    for seed in range(10):
        reduction = balanced_truncation(random_system(6, 2, 2, seed=seed), 5)
        real = reduction.system.eigenvalues.imag == 0
        found += int(real.sum())
        assert bool((reduction.system.B[real].imag == 0).all())
        assert bool((reduction.system.C[:, real].imag == 0).all())
        torch.testing.assert_close(
            reduction.basis.left[real].conj(), reduction.basis.left_conj[real]
        )
    assert found > 0


@pytest.mark.parametrize("balance", BALANCES)
def test_new_states_follow_the_projected_old_ones(balance):
    # x' = left x must obey its own recurrence as far as the truncated part allows: exactly so
    # where the discarded state is unreachable.
    system = random_system(5, 2, 2)
    system.B[2] = 0
    reduction = balanced_truncation(system, 4, balance=balance)
    generator = torch.Generator().manual_seed(2)
    old = torch.zeros(5, dtype=torch.complex128)
    new = torch.zeros(4, dtype=torch.complex128)
    for _ in range(12):
        u = torch.randn(2, generator=generator, dtype=torch.float64).to(torch.complex128)
        old = system.eigenvalues * old + system.B @ u
        new = reduction.system.eigenvalues * new + reduction.system.B @ u
        torch.testing.assert_close(to_new(reduction, old), new, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(to_old(reduction, new), old, rtol=1e-8, atol=1e-8)


def test_complex_form_is_linear():
    reduction = balanced_truncation(random_system(6, 2, 2), 3, balance="complex")
    assert not bool(reduction.basis.left_conj.any())
    assert not bool(reduction.basis.right_conj.any())


def test_folded_form_conjugates_what_was_stored_below():
    system = random_system(6, 2, 2)
    low = system.eigenvalues.imag < 0
    assert bool(low.any())
    assert not bool(low.all())
    # Before the new poles are folded each old state is either conjugated or not, never both.
    reduction = balanced_truncation(system, 3, balance="folded")
    assert bool(((reduction.basis.left == 0) | (reduction.basis.left_conj == 0)).all())
    assert bool((reduction.basis.left_conj != 0).any())


def test_poles_that_leave_the_upper_half_plane_are_folded_back():
    generator = torch.Generator().manual_seed(22)
    system = random_system(8, 1, 1, seed=22, radii=(0.1, 0.9))
    phases = 0.01 * torch.rand(8, generator=generator, dtype=torch.float64)
    phases[1::2] *= -1
    system.eigenvalues[:] = torch.polar(system.eigenvalues.abs(), phases)
    below = balanced_truncation(system.folded(), 2, balance="complex").system.eigenvalues.imag < 0
    assert bool(below.any())
    reduction = balanced_truncation(system, 2, balance="folded")
    assert bool((reduction.system.eigenvalues.imag >= 0).all())
    assert bool((reduction.basis.left_conj != 0).any())
    assert_consistent(system, reduction)
    x = torch.randn(2, 3, generator=generator, dtype=torch.float64) * (1 + 2j)
    torch.testing.assert_close(to_new(reduction, to_old(reduction, x)), x)


@pytest.mark.parametrize("balance", BALANCES)
def test_padding_has_no_part_in_the_maps(balance):
    system = random_system(5, 2, 2)
    system.C[:, 1:4] = 0
    reduction = balanced_truncation(system, 4, balance=balance)
    genuine_states = int(rank(reduction))
    assert genuine_states == 2
    for rows in (reduction.basis.left, reduction.basis.left_conj):
        assert not bool(rows[genuine_states:].any())
    for columns in (reduction.basis.right, reduction.basis.right_conj):
        assert not bool(columns[:, genuine_states:].any())
    assert not bool(reduction.system.C[:, genuine_states:].any())
    assert_consistent(system, reduction)


@pytest.mark.parametrize("balance", BALANCES)
def test_maps_of_a_bank_belong_to_its_systems(balance):
    system = random_system(5, 2, 2, batch=(3,))
    bank = balanced_truncation(system, 2, balance=balance)
    x_old = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0)).to(torch.complex128)
    together = to_new(bank, x_old)
    for index in range(3):
        one = DiagonalLTI(system.eigenvalues[index], system.B[index], system.C[index])
        alone = balanced_truncation(one, 2, balance=balance)
        torch.testing.assert_close(together[index], to_new(alone, x_old[index]))


@pytest.mark.parametrize("horizon", [None, 12])
@pytest.mark.parametrize("balance", BALANCES)
@pytest.mark.parametrize("seed", range(5))
def test_the_reduced_system_does_not_depend_on_how_the_states_are_written(balance, horizon, seed):
    """Another order, other phases and other scales of the states: the same reduced tensors."""
    system = random_system(7, 2, 3, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(7, generator=generator)
    scale = torch.randn(7, generator=generator, dtype=torch.complex128)
    rewritten = DiagonalLTI(
        system.eigenvalues[order],
        (scale.unsqueeze(-1) * system.double().B)[order],
        (system.double().C / scale)[:, order],
    )
    one, other = (
        balanced_truncation(s, 4, balance=balance, horizon=horizon).system
        for s in (system, rewritten)
    )
    for name in ("eigenvalues", "B", "C"):
        torch.testing.assert_close(getattr(other, name), getattr(one, name), rtol=1e-8, atol=1e-9)
