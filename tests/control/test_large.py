"""Large systems take other routes to the same results."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_compressm.control import DiagonalLTI, _factors, _numerical, balanced_truncation
from tests.control.systems import hinf_error, quick, random_system, systems


def trained_system(n: int, ports: int, seed: int) -> DiagonalLTI:
    """Poles from slow to fast, mostly at low frequencies: few states matter."""
    generator = torch.Generator().manual_seed(seed)
    slow, low, weight = torch.rand(3, n, generator=generator, dtype=torch.float64)
    radius, angle = torch.exp(-torch.exp(5 * slow - 6)), 0.8 * low.square() + 0.01
    random = random_system(n, ports, ports, seed=seed)
    gain = ((1 - radius.square()).sqrt() * torch.exp(-3 * weight)).unsqueeze(-1)
    return DiagonalLTI(torch.polar(radius, angle), random.B * gain, random.C)


def both(system, order, monkeypatch, **options):
    """The direct reduction and that of a large system."""
    assert 2 * system.order < _factors.LARGE
    direct = balanced_truncation(system, order, **options)
    with monkeypatch.context() as patch:
        patch.setattr(_factors, "LARGE", 1)
        return direct, balanced_truncation(system, order, **options)


def assert_same(system, direct, other, tail=1e-14):
    largest = float(direct.sigma.max())
    torch.testing.assert_close(other.sigma, direct.sigma, rtol=1e-9, atol=tail * largest)
    gain = hinf_error(system, DiagonalLTI(system.eigenvalues, 0 * system.B, system.C))
    assert float(hinf_error(direct.system, other.system)) < 1e-9 * float(gain)


@pytest.mark.parametrize("ports", [1, 8, 64])
@pytest.mark.parametrize("radii", [(0.9, 0.999), (0.1, 0.9)])
@pytest.mark.parametrize("share", [16, 2])
def test_random_systems(ports, radii, share, monkeypatch):
    system = random_system(96, ports, ports, radii=radii)
    assert_same(system, *both(system, 96 // share, monkeypatch))


@pytest.mark.parametrize("ports", [1, 8, 64])
@pytest.mark.parametrize("share", [16, 2])
@pytest.mark.parametrize("balance", ["real", "folded"])
def test_trained_systems(ports, share, balance, monkeypatch):
    system = trained_system(96, ports, seed=ports)
    assert_same(system, *both(system, 96 // share, monkeypatch, balance=balance))


@quick
@given(systems(max_order=12))
def test_any_system_has_the_same_factors(system):
    full = system.double()
    expected = _factors._real_schur_factor(full.eigenvalues[None], full.B[None])[0]
    got = _factors._paired_factor(full.eigenvalues, full.B)
    if got is not None:
        scale = float((expected @ expected.mT).abs().max())
        torch.testing.assert_close(
            got @ got.mT, expected @ expected.mT, rtol=1e-11, atol=1e-13 * scale
        )


@given(st.integers(0, 100), st.sampled_from([1e-3, 1e-7, 1e-10, 0.0]))
@quick
def test_poles_next_to_the_real_axis(seed, angle):
    system = random_system(12, 1, 1, seed=seed)
    system.eigenvalues[:4] = torch.polar(
        system.eigenvalues[:4].abs(), torch.full((4,), angle, dtype=torch.float64)
    )
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert_same(system, *both(system, 6, monkeypatch), tail=1e-13)


def test_there_is_no_pair_where_a_state_is_all_but_its_own_conjugate():
    system = random_system(6, 1, 1)
    system.eigenvalues[0] = torch.polar(*torch.tensor([0.9, 1e-7], dtype=torch.float64))
    assert _factors._paired_factor(system.eigenvalues, system.B) is None


def test_repeated_real_and_unused_states(monkeypatch):
    system = random_system(20, 2, 2)
    system.eigenvalues[1:4] = system.eigenvalues[0]
    system.eigenvalues[4:7] = system.eigenvalues[4:7].abs() + 0j
    system.B[4:7] = system.B[4:7].real + 0j
    system.B[7], system.C[:, 8] = 0, 0
    assert_same(system, *both(system, 8, monkeypatch))


@pytest.mark.parametrize("horizon", [None, 30])
def test_banks(horizon, monkeypatch):
    system = random_system(12, 1, 1, batch=(3,))
    direct, other = both(system, 5, monkeypatch, horizon=horizon)
    torch.testing.assert_close(other.sigma, direct.sigma, rtol=1e-8, atol=1e-13)


def test_little_is_left_of_a_matrix_of_low_rank(monkeypatch):
    monkeypatch.setattr(_factors, "LARGE", 1)
    matrix = torch.zeros(40, 40, dtype=torch.float64)
    matrix[3:9, 20:25] = torch.randn(6, 5, dtype=torch.float64)
    matrix[30] = 1e-20
    rows, columns = _numerical.numerical_part(matrix)
    assert rows.tolist() == list(range(3, 9))
    assert columns.tolist() == list(range(20, 25))
    assert _numerical.numerical_part(torch.eye(40, dtype=torch.float64)) is None


def test_trained_systems_are_of_low_rank_and_small_ones_take_the_direct_route(monkeypatch):
    system = trained_system(96, 1, seed=0)
    direct, other = both(system, 6, monkeypatch)
    assert int((other.sigma == 0).sum()) > 10
    assert torch.equal(direct.sigma, balanced_truncation(system, 6).sigma)
