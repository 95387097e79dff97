import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_compressm.control import (
    DiagonalLTI,
    balanced_truncation,
    hankel_singular_values,
    order_for_energy,
    per_state_energy,
)
from lightning_compressm.control.gramians import impulse_energy
from tests.control.systems import (
    BALANCES,
    FREQUENCIES,
    hinf_error,
    quick,
    random_system,
    rank,
    relative_impulse_error,
    systems,
)


@quick
@given(systems(max_order=10), st.data())
def test_error_stays_below_the_bound(system, data):
    order = data.draw(st.integers(1, system.order))
    for balance in BALANCES:
        reduction = balanced_truncation(system, order, balance=balance)
        slack = 1e-9 * float(reduction.sigma[0])
        assert float(hinf_error(system, reduction.system)) <= float(reduction.bound) + slack


@pytest.mark.parametrize("balance", ["folded", "complex"])
def test_bound_holds_for_the_complex_output_too(balance):
    system = random_system(8, 2, 2, real_output=True).folded()
    reduction = balanced_truncation(system, 3, balance=balance)
    complex_outputs = (
        DiagonalLTI(s.eigenvalues, s.B, s.C, real_output=False)
        for s in (system, balanced_truncation(system, 3, balance="complex").system)
    )
    assert float(hinf_error(*complex_outputs)) <= float(reduction.bound)


def test_systems_with_complex_outputs_are_reduced():
    system = random_system(8, 2, 2, real_output=False)
    reduction = balanced_truncation(system, 4, balance="complex")
    assert not reduction.system.real_output
    assert float(hinf_error(system, reduction.system)) <= float(reduction.bound)
    for balance in ("real", "folded"):
        with pytest.raises(ValueError, match="real_output=False; use balance='complex'"):
            balanced_truncation(system, 4, balance=balance)


@pytest.mark.parametrize("balance", BALANCES)
def test_error_falls_with_the_order_and_is_no_worse_than_needed(balance):
    system = random_system(10, 2, 2)
    errors = []
    for order in range(1, 11):
        reduction = balanced_truncation(system, order, balance=balance)
        errors.append(float(hinf_error(system, reduction.system)))
        # No system of that order does better than the first discarded value of the real form.
        lower = hankel_singular_values(system)
        below = float(lower[2 * order]) if order < 10 else 0.0
        assert errors[-1] >= below * (1 - 1e-3) - 1e-12
    assert errors[-1] < 1e-10 * errors[0]
    assert errors[5] < errors[0] / 2


@pytest.mark.parametrize("balance", BALANCES)
@pytest.mark.parametrize("horizon", [None, 16])
def test_full_order_is_the_same_map(balance, horizon):
    system = random_system(7, 2, 3)
    reduction = balanced_truncation(system, 7, balance=balance, horizon=horizon)
    assert relative_impulse_error(system, reduction.system) < 1e-14
    assert float(reduction.energy_kept) == 1.0
    assert int(rank(reduction)) == 7
    if horizon is None:
        assert float(reduction.bound) == 0.0


@pytest.mark.parametrize("balance", BALANCES)
@pytest.mark.parametrize("ports", [1, 3])
def test_a_state_that_does_nothing_is_removed_without_error(balance, ports):
    # Order N - 1 of N goes through balancing and diagonalisation, unlike order N.
    system = random_system(7, ports, ports)
    system.C[:, 3] *= 1e-13
    reduction = balanced_truncation(system, 6, balance=balance)
    assert relative_impulse_error(system, reduction.system) < 1e-10


@pytest.mark.parametrize("balance", ["real", "folded"])
def test_real_systems_get_poles_in_the_upper_half_plane(balance):
    reduction = balanced_truncation(random_system(12, 3, 3), 5, balance=balance)
    assert bool((reduction.system.eigenvalues.imag >= 0).all())


def test_real_reduces_better_than_the_published_form_on_average():
    ratios = []
    for seed in range(12):
        system = random_system(16, 4, 4, seed=seed, radii=(0.7, 0.95))
        errors = []
        for balance in ("real", "complex"):
            reduced = balanced_truncation(system, 8, balance=balance).system
            difference = DiagonalLTI(
                torch.cat([system.eigenvalues, reduced.eigenvalues]),
                torch.cat([system.B, reduced.B]),
                torch.cat([system.C, -reduced.C], -1),
            )
            errors.append(float(impulse_energy(difference)))
        ratios.append(errors[0] / errors[1])
    assert sum(ratios) / len(ratios) < 0.8


@pytest.mark.parametrize("balance", BALANCES)
def test_time_limited_reduction_is_better_over_its_horizon(balance):
    def error(system, reduction):
        difference = system.impulse_response(12) - reduction.system.impulse_response(12)
        return float(difference.square().sum())

    short, infinite = 0.0, 0.0
    for seed in range(8):
        system = random_system(16, 3, 3, seed=seed, radii=(0.9, 0.999))
        short += error(system, balanced_truncation(system, 6, balance=balance, horizon=12))
        infinite += error(system, balanced_truncation(system, 6, balance=balance))
    assert short < 0.8 * infinite


@pytest.mark.parametrize("balance", BALANCES)
def test_unstable_time_limited_reductions_are_clamped_or_replaced(balance):
    horizon, clamped, replaced = 8, 0, 0
    for seed in range(60):
        system = random_system(8, 1, 1, seed=seed, radii=(0.97, 0.999))
        reduction = balanced_truncation(system, 2, balance=balance, horizon=horizon)
        infinite = balanced_truncation(system, 2, balance=balance)
        limit = float(system.eigenvalues.abs().max())
        assert float(reduction.system.eigenvalues.abs().max()) < 1 - (1 - limit) / 10 + 1e-15
        if reduction.horizon is None:
            replaced += 1
            # Products of one system and of a bank may be rounded apart.
            same = [(r.sigma, r.system.eigenvalues) for r in (reduction, infinite)]
            torch.testing.assert_close(*same, rtol=1e-12, atol=1e-12)
            assert float(hinf_error(system, reduction.system)) <= float(reduction.bound)
        else:
            assert reduction.horizon == horizon
            assert reduction.bound is None
            radii = reduction.system.eigenvalues.abs()
            if bool((radii - limit).abs().min() < 1e-12):
                clamped += 1
                target = system.impulse_response(horizon)
                errors = [
                    float((r.system.impulse_response(horizon) - target).square().sum())
                    for r in (reduction, infinite)
                ]
                assert errors[0] <= errors[1] * (1 + 1e-6)
    assert clamped > 0
    assert replaced > 0


def test_a_bank_falls_back_system_by_system():
    system = random_system(8, 1, 1, radii=(0.97, 0.999), batch=(40,))
    bank = balanced_truncation(system, 2, horizon=8)
    assert bank.horizon == 8
    assert bank.bound is None
    fell_back = 0
    for index in range(40):
        one = DiagonalLTI(system.eigenvalues[index], system.B[index], system.C[index])
        alone = balanced_truncation(one, 2, horizon=8)
        fell_back += alone.horizon is None
        # The spectrum that each reduction was made from tells whether it is the infinite one.
        torch.testing.assert_close(bank.sigma[index], alone.sigma, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(
            bank.system.eigenvalues[index], alone.system.eigenvalues, rtol=1e-6, atol=1e-6
        )
    assert 0 < fell_back < 40


@pytest.mark.parametrize("balance", BALANCES)
@pytest.mark.parametrize("horizon", [None, 25])
@pytest.mark.parametrize("ports", [1, 3])
def test_batched_reductions_are_those_of_each_system(balance, horizon, ports):
    system = random_system(8, ports, ports, batch=(2, 2))
    bank = balanced_truncation(system, 3, balance=balance, horizon=horizon)
    assert bank.basis.left.shape == (2, 2, 3, 8)
    assert bank.basis.right_conj.shape == (2, 2, 8, 3)
    assert bank.energy_kept.shape == rank(bank).shape == (2, 2)
    for i in range(2):
        for j in range(2):
            one = DiagonalLTI(system.eigenvalues[i, j], system.B[i, j], system.C[i, j])
            alone = balanced_truncation(one, 3, balance=balance, horizon=horizon)
            torch.testing.assert_close(
                bank.system.frequency_response(FREQUENCIES)[i, j],
                alone.system.frequency_response(FREQUENCIES),
                rtol=1e-7,
                atol=1e-8,
            )
            torch.testing.assert_close(bank.energy_kept[i, j], alone.energy_kept)
            if horizon is None:
                torch.testing.assert_close(bank.bound[i, j], alone.bound)


@pytest.mark.parametrize("balance", BALANCES)
def test_energy_kept_and_bound_count_the_same_values(balance):
    system = random_system(9, 3, 3)
    reduction = balanced_truncation(system, 4, balance=balance)
    torch.testing.assert_close(reduction.sigma, hankel_singular_values(system, balance=balance))
    total = reduction.sigma.sum()
    torch.testing.assert_close(reduction.bound, 2 * (1 - reduction.energy_kept) * total)
    kept = per_state_energy(reduction.sigma, balance)[:4].sum() / total
    assert float(reduction.energy_kept) <= float(kept) + 1e-12
    if balance != "real":
        torch.testing.assert_close(reduction.energy_kept, kept)


@pytest.mark.parametrize("balance", BALANCES)
def test_order_for_energy_and_reduction_agree(balance):
    system = random_system(12, 3, 3, radii=(0.3, 0.9))
    energies = per_state_energy(hankel_singular_values(system, balance=balance), balance)
    order = order_for_energy(energies, 0.1)
    reduction = balanced_truncation(system, order, balance=balance)
    assert 0.85 < float(reduction.energy_kept) <= 1
    assert float(hinf_error(system, reduction.system)) <= float(reduction.bound)


@pytest.mark.parametrize("balance", BALANCES)
def test_ablations_keep_other_states_and_are_worse(balance):
    system = random_system(12, 3, 3)
    generator = torch.Generator().manual_seed(3)
    largest, smallest, random = (
        balanced_truncation(system, 4, balance=balance, selection=s, generator=generator)
        for s in ("largest", "smallest", "random")
    )
    assert float(largest.energy_kept) > float(random.energy_kept) > float(smallest.energy_kept)
    errors = [float(hinf_error(system, r.system)) for r in (largest, random, smallest)]
    assert errors[0] < errors[1]
    assert errors[0] < errors[2]
    assert largest.bound is not None
    assert smallest.bound is None
    assert random.bound is None
    assert smallest.order == 4


def test_random_selection_is_reproducible():
    system = random_system(12, 3, 3)
    first, second, other = (
        balanced_truncation(
            system, 4, selection="random", generator=torch.Generator().manual_seed(seed)
        )
        for seed in (5, 5, 6)
    )
    assert torch.equal(first.system.eigenvalues, second.system.eigenvalues)
    assert not torch.equal(first.system.eigenvalues, other.system.eigenvalues)


def test_single_precision_input_is_promoted():
    system = random_system(6, 2, 2, dtype=torch.complex64)
    reduction = balanced_truncation(system, 3)
    expected = balanced_truncation(system.double(), 3)
    assert reduction.system.B.dtype == torch.complex128
    assert torch.equal(reduction.system.eigenvalues, expected.system.eigenvalues)


def test_gradients_do_not_enter_the_reduction():
    system = random_system(4, 1, 1)
    system.B.requires_grad_()
    reduction = balanced_truncation(system, 2)
    assert not reduction.system.B.requires_grad
    assert not reduction.sigma.requires_grad


@pytest.mark.parametrize("order", [0, -1, 5, 2.0, "2", True, None])
def test_bad_orders_are_refused(order):
    with pytest.raises(ValueError, match="between 1 and the system's 4 states, got"):
        balanced_truncation(random_system(4, 1, 1), order)


def test_bad_arguments_are_refused():
    system = random_system(4, 1, 1)
    with pytest.raises(
        ValueError, match="balance: expected one of real, folded, complex, modes, got 'auto'"
    ):
        balanced_truncation(system, 2, balance="auto")
    with pytest.raises(
        ValueError, match="selection: expected one of largest, smallest, random, got 'best'"
    ):
        balanced_truncation(system, 2, selection="best")
    with pytest.raises(ValueError, match="got -4; use the length"):
        balanced_truncation(system, 2, horizon=-4)
