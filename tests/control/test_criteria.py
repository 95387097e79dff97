"""Criteria rank states as their definitions say."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from lightning_compressm.control import DiagonalLTI, hankel_singular_values
from lightning_compressm.control.calibration import SelectiveStatistics
from lightning_compressm.control.criteria import CRITERIA, averaged_lti, rank_states
from tests.control.selective_signals import F64, random_signals, walk

SEED = torch.Generator()


def _with_gram(gram: torch.Tensor) -> SelectiveStatistics:
    base = SelectiveStatistics.of([random_signals(groups=1, states=gram.shape[-1])])
    return replace(base, gram=gram.unsqueeze(0))


@given(groups=st.integers(1, 3), states=st.integers(1, 6), scalar=st.booleans())
def test_every_criterion_gives_a_permutation(groups: int, states: int, scalar: bool):
    signals = random_signals(groups=groups, states=states, scalar=scalar)
    statistics = SelectiveStatistics.of([signals])
    for name in CRITERIA:
        ranking = rank_states(statistics, name)
        assert ranking.dtype == torch.int64
        assert ranking.sort().values.tolist() == [list(range(states))] * groups


@pytest.mark.parametrize("name", ["averaged_lti", "empirical", "greedy"])
def test_states_come_in_the_order_of_their_read_out(name: str):
    scale = torch.tensor([[1.0, 9.0, 0.01, 0.1], [0.01, 1.0, 9.0, 0.1]], dtype=F64)
    s = random_signals(4, 40)
    s = replace(s, A=torch.full_like(s.A, -1.0), C=s.C * scale**3)
    ranking = rank_states(SelectiveStatistics.of([s]), name)
    assert ranking.tolist() == [[1, 0, 3, 2], [2, 1, 3, 0]]


@pytest.mark.parametrize("scalar", [False, True])
def test_averaged_lti_is_the_spectrum_of_each_state_on_its_own(scalar: bool):
    s = random_signals(scalar=scalar)
    found = averaged_lti(SelectiveStatistics.of([s]), SEED)
    for g in range(2):
        for n in range(s.n_states):
            wanted = torch.zeros((), dtype=F64)
            for d in range(s.x.shape[3]):
                pole = torch.exp(s.dt[:, :, g, d].mean() * s.A[g, d, 0 if scalar else n])
                size = (s.dt * s.x)[:, :, g, d].square().mean().sqrt()
                size = size * s.weight[:, :, g, d].square().mean().sqrt()
                B, C = (t[:, :, g, n].square().mean().sqrt().view(1, 1) for t in (s.B, s.C))
                system = DiagonalLTI(pole.view(1), B, C, False)
                wanted += size * hankel_singular_values(system, balance="complex")[0]
            # Sums where the definition has means: the same factor for all states.
            assert_close(found[g, n] / (s.x.shape[0] * s.x.shape[1]), wanted, rtol=1e-9, atol=0)


def test_empirical_is_the_energy_of_the_states_as_they_ran():
    s = random_signals()
    energy = torch.zeros(2, s.n_states, dtype=F64)
    for b, k, g, d, h in walk(s):
        energy[g] += (s.weight[b, k, g, d] * h) ** 2
    wanted = (energy * s.C.square().sum((0, 1))).argsort(descending=True)
    assert torch.equal(rank_states(SelectiveStatistics.of([s]), "empirical"), wanted)


def _lost(gram: torch.Tensor, states: tuple[int, ...]) -> float:
    return float(gram[list(states)][:, list(states)].sum())


@given(seed=st.integers(0, 200), n=st.integers(2, 6))
def test_greedy_drops_what_brute_force_drops_first(seed: int, n: int):
    rows = torch.randn(20, n, generator=torch.Generator().manual_seed(seed), dtype=F64)
    gram = rows.mT @ rows
    dropped = rank_states(_with_gram(gram), "greedy")[0].flip(0).tolist()
    gone: tuple[int, ...] = ()
    for state in dropped:
        left = [n for n in range(len(gram)) if n not in gone]
        costs = {other: _lost(gram, (*gone, other)) for other in left}
        assert costs[state] <= min(costs.values()) + 1e-9
        gone += (state,)


def test_greedy_knows_that_contributions_cancel():
    """Two large states that cancel each other go before a small one that nothing cancels."""
    rows = torch.tensor([[10.0, -10.0, 2.0, 30.0], [0.1, 0.0, 2.0, 5.0]], dtype=F64)
    gram = rows.mT @ rows
    assert min(combinations(range(4), 2), key=lambda pair: _lost(gram, pair)) == (0, 1)
    # The small one goes first, as the cheapest on its own; then greedy sees no pair coming.
    assert rank_states(_with_gram(gram), "greedy")[0].tolist()[-1] == 2
    gram[2, 2] = 400.0
    assert set(rank_states(_with_gram(gram), "greedy")[0].tolist()[-2:]) == {0, 1}


def test_ablations():
    statistics = SelectiveStatistics.of([random_signals()])
    best = rank_states(statistics, "averaged_lti")
    assert torch.equal(rank_states(statistics, "smallest"), best.flip(-1))
    seeds = [torch.Generator().manual_seed(seed) for seed in (0, 0, 3)]
    first, again, other = (rank_states(statistics, "random", seed) for seed in seeds)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_states_of_equal_worth_keep_their_order():
    s = random_signals(groups=1)
    equal = replace(s, A=s.A[..., :1], B=s.B[..., :1].expand_as(s.B), C=torch.ones_like(s.C))
    ranking = rank_states(SelectiveStatistics.of([equal]), "averaged_lti")
    assert ranking.tolist() == [[0, 1, 2, 3]]


def test_an_unknown_criterion_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"expected one of averaged_lti, .*, got 'best'"):
        rank_states(SelectiveStatistics.of([random_signals()]), "best")
