"""Statistics of selective recurrences against loops, and their averaged systems against ours."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from lightning_compressm.control import DiagonalLTI, hankel_singular_values
from lightning_compressm.control.calibration import (
    CHUNK,
    SelectiveSignals,
    SelectiveStatistics,
    averaged_poles,
    averaged_spectrum,
    channel_sizes,
    state_chunks,
)
from lightning_compressm.errors import NonFiniteError
from tests.control.selective_signals import (
    F64,
    expanded,
    random_signals,
    time_invariant,
    walk,
)

NAMES = [f.name for f in fields(SelectiveStatistics)]


def _equal(a: SelectiveStatistics, b: SelectiveStatistics) -> None:
    for name in NAMES:
        assert_close(getattr(a, name), getattr(b, name), rtol=1e-11, atol=1e-11, msg=name)


@given(
    length=st.integers(1, 2 * CHUNK + 3),
    groups=st.integers(1, 2),
    channels=st.integers(1, 3),
    states=st.integers(1, 4),
    scalar=st.booleans(),
)
def test_states_equal_a_plain_loop(
    length: int, groups: int, channels: int, states: int, scalar: bool
):
    signals = random_signals(2, length, groups, channels, states, scalar=scalar)
    chunks = list(state_chunks(signals))
    assert [k for steps, _ in chunks for k in range(length)[steps]] == list(range(length))
    all_states = torch.cat([states for _, states in chunks], 1)
    assert all_states.shape == (2, length, groups, channels, states)
    for b, k, g, d, h in walk(signals):
        assert_close(all_states[b, k, g, d], h, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scalar", [False, True])
def test_statistics_equal_a_plain_loop(scalar: bool):
    s = random_signals(scalar=scalar)
    batch, length, groups, channels = s.x.shape
    n = s.n_states
    zeros = {"dt": (channels,), "drive": (channels,), "weight": (channels,), "energy": (n,)}
    zeros |= {"B": (n, n), "C": (n, n), "gram": (n, n)}
    sums = {k: torch.zeros(groups, *shape, dtype=F64) for k, shape in zeros.items()}
    for b, k, g, d, h in walk(s):
        w, dt = s.weight[b, k, g, d], s.dt[b, k, g, d]
        sums["dt"][g, d] += dt
        sums["drive"][g, d] += (dt * s.x[b, k, g, d]) ** 2
        sums["weight"][g, d] += w**2
        sums["energy"][g] += (w * h) ** 2
        sums["gram"][g] += torch.outer(w * s.C[b, k, g] * h, w * s.C[b, k, g] * h)
        if d == 0:
            sums["B"][g] += torch.outer(s.B[b, k, g], s.B[b, k, g])
            sums["C"][g] += torch.outer(s.C[b, k, g], s.C[b, k, g])
    found = SelectiveStatistics.of([s])
    assert float(found.count) == batch * length
    assert_close(found.A, s.A)
    for name, value in sums.items():
        assert_close(getattr(found, name), value, rtol=1e-11, atol=1e-11, msg=name)


def test_one_rate_for_all_states_equals_the_same_rate_for_each():
    s = random_signals(scalar=True)
    one, each = SelectiveStatistics.of([s]), SelectiveStatistics.of([expanded(s)])
    _equal(replace(one, A=each.A), each)
    assert_close(averaged_spectrum(one), averaged_spectrum(each), rtol=1e-8, atol=1e-10)


def test_batches_add_up_whatever_their_shapes():
    a, b = random_signals(3, 21, seed=1), random_signals(1, 9, seed=2)
    b = replace(b, A=a.A)
    both, first, second = (SelectiveStatistics.of(x) for x in ([a, b], [a], [b]))
    _equal(both, first.combined(second))
    _equal(both, second.combined(first))
    halves = [
        SelectiveSignals(
            *(a.A if f.name == "A" else getattr(a, f.name)[rows] for f in fields(SelectiveSignals))
        )
        for rows in (slice(0, 1), slice(1, 3))
    ]
    _equal(first, SelectiveStatistics.of(halves))


def test_summed_replaces_every_sum_but_not_the_rates():
    statistics = SelectiveStatistics.of([random_signals()])
    doubled = statistics.summed(lambda _, total: 2 * total)
    for name in NAMES:
        factor = 1 if name == "A" else 2
        assert torch.equal(getattr(doubled, name), factor * getattr(statistics, name))


@pytest.mark.parametrize("gate", [1.0, 3.0])
def test_spectrum_of_a_layer_that_is_time_invariant(gate: float):
    s = time_invariant()
    s = replace(s, weight=gate * s.weight)
    system = DiagonalLTI(
        torch.exp(0.5 * s.A[0, 0]), s.B[0, 0, 0].unsqueeze(1), s.C[0, 0, 0].unsqueeze(0), False
    )
    sigma = hankel_singular_values(system, balance="complex")
    size = gate * 0.5 * s.x.square().mean().sqrt()
    found = averaged_spectrum(SelectiveStatistics.of([s]))[0]
    assert_close(found, sigma * size, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("scalar", [False, True])
def test_spectrum_is_that_of_the_averaged_systems_added_up(scalar: bool):
    s = random_signals(scalar=scalar)
    statistics = SelectiveStatistics.of([s])
    rows, n = s.x.shape[0] * s.x.shape[1], s.n_states
    wanted = torch.zeros(2, n, dtype=F64)
    for g in range(2):
        # Rows of all B as inputs have the second moment B B^T / count, whatever the factor.
        B = s.B[:, :, g].flatten(0, 1).mT / rows**0.5
        C = s.C[:, :, g].flatten(0, 1) / rows**0.5
        for d in range(s.x.shape[3]):
            poles = torch.exp(s.dt[:, :, g, d].mean() * s.A[g, d]).expand(n)
            drive = (s.dt * s.x)[:, :, g, d].square().mean().sqrt()
            size = drive * s.weight[:, :, g, d].square().mean().sqrt()
            system = DiagonalLTI(poles.contiguous(), B, C, False)
            wanted[g] += size * hankel_singular_values(system, balance="complex")
    assert_close(averaged_spectrum(statistics), wanted, rtol=1e-6, atol=1e-8)


def test_many_channels_are_analysed_in_parts(monkeypatch: pytest.MonkeyPatch):
    statistics = SelectiveStatistics.of([random_signals(channels=5)])
    whole = averaged_spectrum(statistics)
    monkeypatch.setattr("lightning_compressm.control.calibration._CHANNELS", 2)
    assert_close(averaged_spectrum(statistics), whole, rtol=1e-10, atol=1e-12)


def test_poles_stay_inside_the_unit_circle_where_nothing_decays():
    s = random_signals()
    statistics = SelectiveStatistics.of([replace(s, A=-1e-20 * torch.ones_like(s.A))])
    assert float(averaged_poles(statistics).max()) < 1
    assert bool(torch.isfinite(averaged_spectrum(statistics)).all())


def test_a_closed_gate_gives_no_energy():
    s = random_signals()
    statistics = SelectiveStatistics.of([replace(s, weight=0 * s.weight)])
    assert not averaged_spectrum(statistics).any()
    assert not channel_sizes(statistics).any()


@pytest.mark.parametrize("name", ["dt", "B", "C", "x", "weight"])
def test_nan_is_refused(name: str):
    s = random_signals()
    tensor = getattr(s, name).clone()
    tensor.view(-1)[0] = torch.nan
    with pytest.raises(NonFiniteError, match="calibration statistics"):
        SelectiveStatistics.of([replace(s, **{name: tensor})])


def test_no_batch_is_refused():
    with pytest.raises(ValueError, match="at least one calibration batch"):
        SelectiveStatistics.of([])


@pytest.mark.parametrize("name", ["dt", "A", "B", "C", "weight"])
def test_shapes_that_do_not_fit_are_refused_by_name(name: str):
    s = random_signals()
    bad = torch.cat([getattr(s, name)] * 2, 1)
    with pytest.raises(ValueError, match=rf"'{name}'"):
        replace(s, **{name: bad})
