import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_compressm.control import constrain_order, order_for_energy, order_for_fraction
from lightning_compressm.errors import NonFiniteError
from tests.control.systems import quick

spectra = st.lists(st.floats(0, 1e6), min_size=1, max_size=40).map(
    lambda values: torch.tensor(sorted([*values, 1.0], reverse=True), dtype=torch.float64)
)
tolerances = st.floats(0, 1, exclude_max=True)


@quick
@given(spectra, tolerances)
def test_order_is_the_smallest_that_reaches_the_energy(sigma, tolerance):
    order = order_for_energy(sigma, tolerance)
    total = float(sigma.sum())
    slack = 1e-12 * total
    assert 1 <= order <= len(sigma)
    assert float(sigma[order:].sum()) <= tolerance * total + slack
    if order > 1:
        assert float(sigma[order - 1 :].sum()) >= tolerance * total - slack


@quick
@given(spectra, tolerances, tolerances)
def test_order_falls_with_the_tolerance(sigma, first, second):
    low, high = sorted((first, second))
    assert order_for_energy(sigma, low) >= order_for_energy(sigma, high)


@pytest.mark.parametrize("seed", range(20))
def test_zero_tolerance_keeps_all_states_whatever_the_rounding(seed):
    generator = torch.Generator().manual_seed(seed)
    sigma = torch.rand(200, generator=generator, dtype=torch.float64).sort(descending=True).values
    assert order_for_energy(sigma, 0.0) == 200
    assert order_for_energy(sigma.float(), 0.0) == 200


def test_states_at_the_level_of_rounding_do_not_count():
    sigma = torch.tensor([1.0, 1e-3, 1e-13, 1e-15, 0.0], dtype=torch.float64)
    assert order_for_energy(sigma, 0.0) == 3
    assert order_for_energy(sigma, 1e-12) == 2


def test_energy_is_the_sum_not_the_sum_of_squares():
    assert order_for_energy(torch.tensor([10.0, 5.0, 5.0]), 0.3) == 2
    assert order_for_energy(torch.tensor([10.0, 5.0, 5.0]), 0.2) == 3


def test_a_bank_pools_its_energy():
    bank = torch.tensor([[8.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    assert order_for_energy(bank, 0.1) == 2
    assert order_for_energy(bank, 0.05) == 3
    assert order_for_energy(bank, 0.1) == order_for_energy(bank.sum(0), 0.1)


@pytest.mark.parametrize("tolerance", [-0.1, 1.0, 1.5, float("nan")])
def test_tolerances_out_of_range_are_refused(tolerance):
    with pytest.raises(ValueError, match=r"tolerance in \[0, 1\)"):
        order_for_energy(torch.ones(3), tolerance)


def test_bad_spectra_are_refused():
    with pytest.raises(ValueError, match="zero Hankel energy"):
        order_for_energy(torch.zeros(3), 0.1)
    with pytest.raises(NonFiniteError, match="finite Hankel"):
        order_for_energy(torch.tensor([1.0, torch.nan]), 0.1)
    for bad in (torch.tensor([1.0, 2.0]), torch.tensor([1.0, -1.0])):
        with pytest.raises(ValueError, match="descending order"):
            order_for_energy(bad, 0.1)
    for shape in ((), (0,), (2, 0), (1, 2, 3)):
        with pytest.raises(ValueError, match="shape"):
            order_for_energy(torch.ones(shape), 0.1)


@pytest.mark.parametrize(
    ("n", "fraction", "expected"),
    [(10, 0.0, 10), (10, 0.3, 7), (100, 0.29, 71), (5, 0.99, 1), (1, 0.5, 1), (256, 0.1, 231)],
)
def test_fraction_of_the_states_is_dropped(n, fraction, expected):
    assert order_for_fraction(n, fraction) == expected


def test_bad_fractions_are_refused():
    for fraction in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=r"fraction in \[0, 1\)"):
            order_for_fraction(10, fraction)
    with pytest.raises(ValueError, match="at least 1 state"):
        order_for_fraction(0, 0.5)


@quick
@given(st.integers(1, 100), st.integers(1, 100), st.integers(1, 20), st.integers(1, 20))
def test_constrained_orders_meet_their_limits(order, n, lowest, multiple):
    result = constrain_order(order, n, min_state_dim=lowest, round_to=multiple)
    assert 1 <= result <= n
    assert result == n or result % multiple == 0
    assert result >= min(n, max(order, lowest))
    assert result == n or result < max(order, lowest) + multiple


@pytest.mark.parametrize("bad", ["order", "n", "min_state_dim", "round_to"])
def test_constraints_below_one_are_refused(bad):
    arguments = {"order": 3, "n": 4, "min_state_dim": 1, "round_to": 1, bad: 0}
    with pytest.raises(ValueError, match=f"expected {bad} >= 1, got 0"):
        constrain_order(
            arguments["order"],
            arguments["n"],
            min_state_dim=arguments["min_state_dim"],
            round_to=arguments["round_to"],
        )
