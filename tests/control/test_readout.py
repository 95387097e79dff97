"""The refit of the read-out against dense least squares."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from lightning_compressm.control import readout
from lightning_compressm.control.calibration import SelectiveSignals, state_chunks
from lightning_compressm.control.readout import refit_readout
from tests.control.selective_signals import F64, random_signals

KEEP = torch.tensor([[0, 2], [1, 3]])


def _rows(s: SelectiveSignals, g: int, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Features w h_i C_m and what is missing, w sum_lost C_n h_n; one row a channel and step."""
    states = torch.cat([states for _, states in state_chunks(s)], 1)[:, :, g]
    weighted = states * s.weight[:, :, g, :, None]
    read = s.C[:, :, g, None]
    features = weighted[..., keep].unsqueeze(-1) * read.unsqueeze(-2)
    lost = [n for n in range(s.n_states) if n not in keep.tolist()]
    missing = (weighted * read)[..., lost].sum(-1)
    return features.flatten(0, 2).flatten(1), missing.flatten()


def _error(batches: list[SelectiveSignals], keep: Tensor, delta: Tensor) -> float:
    total = 0.0
    for s in batches:
        for g in range(len(keep)):
            features, missing = _rows(s, g, keep[g])
            total += float((missing - features @ delta[g].flatten()).square().sum())
    return total


@given(
    groups=st.integers(1, 2),
    channels=st.integers(2, 4),
    states=st.integers(2, 4),
    r=st.integers(1, 3),
    scalar=st.booleans(),
)
@settings(max_examples=25)
def test_equals_least_squares(groups: int, channels: int, states: int, r: int, scalar: bool):
    r = min(r, states - 1)
    s = random_signals(3, 21, groups, channels, states, scalar=scalar)
    keep = torch.arange(r).expand(groups, r)
    delta = refit_readout([s], keep, ridge=1e-13)
    for g in range(groups):
        features, missing = _rows(s, g, keep[g])
        wanted = torch.linalg.lstsq(features, missing.unsqueeze(1)).solution.view(r, states)
        assert_close(delta[g], wanted, rtol=1e-5, atol=1e-6)


def test_equals_the_ridge_solution_over_several_batches():
    first = random_signals(2, 21, seed=1)
    batches = [first, replace(random_signals(1, 9, seed=2), A=first.A)]
    delta = refit_readout(batches, KEEP, ridge=0.1)
    for g in range(2):
        features, missing = (
            torch.cat(parts) for parts in zip(*(_rows(s, g, KEEP[g]) for s in batches), strict=True)
        )
        normal = features.mT @ features
        damped = normal + 0.1 * torch.diag(normal.diagonal())
        wanted = torch.linalg.solve(damped, features.mT @ missing)
        assert_close(delta[g].flatten(), wanted, rtol=1e-9, atol=1e-11)


def test_sums_over_processes_are_those_of_all_batches():
    first = random_signals(2, 21, seed=1)
    batches = [first, replace(random_signals(1, 9, seed=2), A=first.A)]
    # What the other process sends, in the order of the calls.
    sent: list[list[Tensor]] = [[], []]

    def spy(box: list[Tensor]):
        return lambda total: (box.append(total.clone()), total)[1]

    for s, box in zip(batches, sent, strict=True):
        refit_readout([s], KEEP, add_up=spy(box))
    others = iter(sent[1])
    delta = refit_readout(batches[:1], KEEP, add_up=lambda total: total + next(others))
    assert_close(delta, refit_readout(batches, KEEP), rtol=1e-10, atol=1e-12)


def test_no_change_if_the_lost_states_are_not_read():
    s = random_signals()
    C = s.C.clone()
    for g, keep in enumerate(KEEP):
        lost = [n for n in range(s.n_states) if n not in keep.tolist()]
        C[:, :, g, lost] = 0
    delta = refit_readout([replace(s, C=C)], KEEP)
    assert torch.equal(delta, torch.zeros(2, 2, s.n_states, dtype=F64))


def test_no_change_without_any_data():
    s = random_signals()
    assert not refit_readout([replace(s, weight=0 * s.weight)], KEEP).any()


def test_a_state_that_a_kept_one_repeats_is_made_up_for_exactly():
    s = random_signals(groups=1)
    s = replace(
        s,
        A=torch.stack([s.A[..., 0], s.A[..., 0], *s.A[..., 2:].unbind(-1)], -1),
        B=torch.stack([s.B[..., 0], 2 * s.B[..., 0], *s.B[..., 2:].unbind(-1)], -1),
    )
    delta = refit_readout([s], torch.tensor([[0, 2, 3]]), ridge=1e-12)
    wanted = torch.zeros(1, 3, 4, dtype=F64)
    wanted[0, 0, 1] = 2.0
    assert_close(delta, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("limit", [2, 4, 6])
def test_many_unknowns_are_sought_among_the_principal_directions(
    limit: int, monkeypatch: pytest.MonkeyPatch
):
    s = random_signals()
    full = refit_readout([s], KEEP, ridge=1e-12)
    monkeypatch.setattr(readout, "MAX_UNKNOWNS", limit)
    delta = refit_readout([s], KEEP, ridge=1e-12)
    k = limit // KEEP.shape[1]
    for g in range(2):
        rows = s.C[:, :, g].flatten(0, 1)
        directions = torch.linalg.svd(rows, full_matrices=False).Vh[:k]
        inside = delta[g] @ directions.mT @ directions
        assert_close(delta[g], inside, rtol=1e-8, atol=1e-9)
        assert int(torch.linalg.matrix_rank(delta[g])) <= k
    errors = [_error([s], KEEP, d) for d in (full, delta, torch.zeros_like(delta))]
    assert errors[0] <= errors[1] <= errors[2]


def test_a_limit_below_the_kept_states_still_leaves_one_direction(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(readout, "MAX_UNKNOWNS", 1)
    delta = refit_readout([random_signals()], KEEP)
    assert [int(torch.linalg.matrix_rank(d)) for d in delta] == [1, 1]


def test_single_precision_signals_are_solved_in_double():
    s = random_signals()
    single = SelectiveSignals(*(t.float() for t in (s.dt, s.A, s.B, s.C, s.x, s.weight)))
    delta = refit_readout([single], KEEP)
    assert delta.dtype == F64
    assert_close(delta, refit_readout([s], KEEP), rtol=1e-3, atol=1e-4)
