"""Reductions that keep states as they are."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_compressm.control import DiagonalLTI, balanced_truncation, real_gramians
from tests.control.systems import quick, random_system


def _system(states: int, seed: int) -> DiagonalLTI:
    return random_system(states, 2, 2, seed=seed, radii=(0.3, 0.9))


def _lost(system: DiagonalLTI, states: Tensor) -> float:
    """``tr Q (P - P S^T (S P S^T)^-1 S P)``, by its definition."""
    P, Q = real_gramians(system)
    index = torch.cat([states, states + system.order])
    seen = P[:, index] @ torch.linalg.solve(P[index][:, index], P[index])
    return float(torch.trace(Q @ (P - seen)))


def _which(system: DiagonalLTI, reduced: DiagonalLTI) -> Tensor:
    return torch.stack(
        [(system.eigenvalues == pole).nonzero()[0, 0] for pole in reduced.eigenvalues]
    )


@quick
@given(states=st.integers(2, 7), seed=st.integers(0, 2**16))
def test_the_state_that_goes_first_is_the_one_that_costs_least(states: int, seed: int):
    system = _system(states, seed)
    everyone = torch.arange(states)
    costs = [_lost(system, everyone[everyone != state]) for state in everyone]
    reduced = balanced_truncation(system, states - 1, balance="modes").system
    assert _lost(system, _which(system, reduced)) <= min(costs) * (1 + 1e-6) + 1e-12


@quick
@given(seed=st.integers(0, 2**16))
def test_each_further_state_goes_at_the_least_further_cost(seed: int):
    """What has gone already counts in what the next one costs."""
    system = _system(7, seed)
    kept = torch.arange(7)
    while len(kept) > 2:
        rests = [kept[kept != state] for state in kept]
        kept = min(rests, key=lambda rest: _lost(system, rest))
    reduced = balanced_truncation(system, 2, balance="modes").system
    assert _lost(system, _which(system, reduced)) == pytest.approx(_lost(system, kept), rel=1e-5)


@quick
@given(states=st.integers(2, 8), seed=st.integers(0, 2**16))
def test_no_other_output_matrix_stands_in_better(states: int, seed: int):
    """The error is uncorrelated with the kept states, when the input is white."""
    system = _system(states, seed)
    reduction = balanced_truncation(system, states // 2, balance="modes")
    P, _ = real_gramians(system)
    kept = _which(system, reduction.system)
    index = torch.cat([kept, kept + states])
    C, new = (torch.cat([s.C.real, -s.C.imag], 1) for s in (system, reduction.system))
    error = C.clone()
    error[:, index] -= new
    correlation = error @ P[:, index]
    assert float(correlation.abs().max()) <= 1e-6 * float((C @ P).abs().max())


def test_a_copy_of_a_state_is_free():
    half = _system(3, 0)
    twice = DiagonalLTI(*(torch.cat(2 * [t]) for t in (half.eigenvalues, half.B)),
                        torch.cat(2 * [half.C], 1), True)  # fmt: skip
    reduction = balanced_truncation(twice, 3, balance="modes")
    frequencies = torch.linspace(0, 3, 20, dtype=torch.float64)
    error = reduction.system.frequency_response(frequencies) - twice.frequency_response(frequencies)
    assert float(error.abs().max()) < 1e-6
    assert float(reduction.energy_kept) == pytest.approx(1, abs=1e-6)


def test_poles_and_inputs_stay_to_the_bit():
    system = _system(9, 3)
    reduced = balanced_truncation(system, 4, balance="modes", horizon=20).system
    kept = _which(system, reduced)
    assert torch.equal(reduced.B, system.B[kept])
    assert bool((kept.diff() > 0).all())


def test_a_state_that_never_moves_is_dropped_first():
    system = _system(4, 1)
    system.B[2] = 0
    reduced = balanced_truncation(system, 3, balance="modes").system
    assert _which(system, reduced).tolist() == [0, 1, 3]


def test_there_is_no_choice_among_balanced_states():
    with pytest.raises(ValueError, match="expected selection='largest' for balance='modes'"):
        balanced_truncation(_system(4, 0), 2, balance="modes", selection="smallest")
