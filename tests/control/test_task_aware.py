"""Task-aware Gramians: every truncation is stable, and nothing depends on how states are scaled."""

from dataclasses import replace
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_compressm.control import DiagonalLTI, balanced_truncation, real_gramians
from lightning_compressm.control.balance import BALANCES as FORMS
from lightning_compressm.control.balance import Complex
from lightning_compressm.control.hankel import factorise
from lightning_compressm.control.task_aware import TaskForm, TaskGramians, factorise_task
from lightning_compressm.control.truncation import truncate
from lightning_compressm.errors import CalibrationError, NonFiniteError, UnstableSystemError
from tests.control.systems import BALANCES, quick, random_system, relative_impulse_error, systems


def semidefinite(system: DiagonalLTI, rank: int, seed: int) -> Tensor:
    """As far from a Gramian of the system as data could make it: any directions, any sizes."""
    generator = torch.Generator().manual_seed(seed)
    shape = (*system.batch_shape, 2 * system.order, rank)
    rows = torch.randn(shape, generator=generator, dtype=torch.float64)
    grades = torch.rand(shape[:-1], generator=generator, dtype=torch.float64) * 6 - 3
    rows = rows * (10**grades).unsqueeze(-1)
    return rows @ rows.mT


def random_task(system: DiagonalLTI, rank: int = 3, seed: int = 0) -> TaskGramians:
    p, q = (semidefinite(system, rank, seed + offset) for offset in (0, 1))
    return TaskGramians(p, q, torch.tensor(7.0, dtype=torch.float64))


def own_task(system: DiagonalLTI, horizon: int | None = None) -> TaskGramians:
    return TaskGramians(*real_gramians(system, horizon=horizon), torch.tensor(1.0).double())


@quick
@given(
    systems(max_order=10, max_radius=0.9999),
    st.sampled_from(BALANCES),
    st.sampled_from(["largest", "smallest", "random"]),
    st.integers(1, 6),
    st.integers(0, 1000),
)
def test_every_truncation_is_stable(system, balance, selection, rank, seed):
    """Whichever states are kept."""
    factors = factorise_task(system, random_task(system, rank, seed), balance=balance, horizon=30)
    for order in range(1, system.order + 1):
        reduction = truncate(factors, order, selection=selection)  # raises if a pole is outside
        assert float(reduction.system.eigenvalues.abs().max()) < 1
        assert reduction.bound is None


def test_the_blend_is_clamped_where_it_is_unstable():
    largest, clamped = 0.0, 0
    for seed in range(20):
        system = random_system(12, 2, 2, radii=(0.99, 0.999), seed=seed)
        factors = factorise_task(system, random_task(system, seed=seed), "blend", horizon=30)
        reduction = truncate(factors, 6)
        radius = float(reduction.system.eigenvalues.abs().max())
        limit = float(system.eigenvalues.abs().max())
        clamped += abs(radius - limit) < 1e-10
        largest = max(largest, radius)
        assert reduction.horizon == 30  # data has no infinite-horizon reduction to fall back to
    assert clamped > 0
    assert largest < 1


@quick
@given(systems(max_order=8), st.sampled_from(BALANCES))
def test_the_own_gramians_give_the_usual_balancing(system, balance):
    """Their residual ``B B^H`` is its own positive part."""
    ours = factorise_task(system, own_task(system), balance=balance).sigma
    usual = factorise(system, balance, None).sigma
    assert float((ours - usual).abs().max()) < 1e-6 * float(usual[0])
    order = max(1, system.order // 2)
    one = truncate(factorise_task(system, own_task(system), balance=balance), order).system
    other = balanced_truncation(system, order, balance=balance).system
    if float(usual[0]) < 1e3 * float(usual[min(order, len(usual) - 1)]):
        assert relative_impulse_error(one, other) < 1e-3


@pytest.mark.parametrize("balance", BALANCES)
def test_the_scale_of_states_plays_no_role(balance):
    """A state times t has B times t, C over t, and data sees it times t."""
    system = random_system(8, 2, 2, radii=(0.6, 0.98))
    task = random_task(system)
    scale = torch.logspace(-4, 4, 8, dtype=torch.float64)
    twice = scale.repeat(2)
    scaled = replace(system, B=system.B * scale.unsqueeze(-1), C=system.C / scale)
    moved = TaskGramians(
        task.P * twice * twice.unsqueeze(-1), task.Q / twice / twice.unsqueeze(-1), task.steps
    )
    one = factorise_task(system, task, balance=balance, horizon=20)
    other = factorise_task(scaled, moved, balance=balance, horizon=20)
    assert torch.allclose(one.sigma, other.sigma, rtol=1e-7)
    assert relative_impulse_error(truncate(one, 3).system, truncate(other, 3).system) < 1e-6


@pytest.mark.parametrize("form", get_args(TaskForm))
def test_the_size_of_loss_and_data_does_not_reach_b_and_c(form):
    """Else Adam, whose steps have one size, would move a tiny B far and a large C hardly."""
    system = random_system(8, 2, 2, radii=(0.6, 0.98))
    task = random_task(system)
    small = TaskGramians(1e3 * task.P, 1e-9 * task.Q, task.steps)
    one, other = (truncate(factorise_task(system, t, form), 4).system for t in (task, small))
    for name in ("B", "C"):
        before, after = (getattr(each, name).norm() for each in (one, other))
        assert float(after / before) == pytest.approx(1, rel=1e-6)
    usual = balanced_truncation(system, 4, balance="folded").system
    shares = [float(each.B.norm() / each.C.norm()) for each in (other, usual)]
    assert 0.1 < shares[0] / shares[1] < 10


@pytest.mark.parametrize("balance", ["real", "folded"])
def test_conjugated_states_play_no_role(balance):
    system = random_system(6, 2, 2)
    task = random_task(system)
    mask = torch.tensor([True, False, True, True, False, False])
    sign = torch.cat([torch.ones(6), torch.where(mask, -1.0, 1.0)]).double()
    moved = TaskGramians(
        task.P * sign * sign.unsqueeze(-1), task.Q * sign * sign.unsqueeze(-1), task.steps
    )
    one = factorise_task(system, task, balance=balance)
    other = factorise_task(system.conjugated(mask), moved, balance=balance)
    assert torch.allclose(one.sigma, other.sigma)
    assert relative_impulse_error(truncate(one, 3).system, truncate(other, 3).system) < 1e-8


@pytest.mark.parametrize("balance", BALANCES)
def test_a_bank_is_its_systems_one_by_one(balance):
    bank = random_system(6, 1, 1, batch=(3,), radii=(0.7, 0.99))
    task = random_task(bank)
    together = truncate(factorise_task(bank, task, balance=balance, horizon=9), 3)
    for index in range(3):
        alone = bank.each(lambda tensor, index=index: tensor[index])
        part = TaskGramians(task.P[index], task.Q[index], task.steps)
        single = truncate(factorise_task(alone, part, balance=balance, horizon=9), 3)
        same = together.system.each(lambda tensor, index=index: tensor[index])
        assert relative_impulse_error(single.system, same) < 1e-8


def test_states_that_no_data_reached_are_in_order():
    """Data drives one state alone; the others are sorted as the system itself would."""
    system = random_system(6, 1, 1)
    empty = torch.zeros(12, 12, dtype=torch.float64)
    one = empty.clone()
    one[2, 2] = one[8, 8] = 1.0
    factors = factorise_task(system, TaskGramians(one, one, torch.tensor(1.0).double()))
    assert bool((factors.sigma[:6] > 0).all())
    first = truncate(factors, 1).system.eigenvalues
    assert float((first.abs() - system.eigenvalues[2].abs()).abs()) < 0.02


def test_a_silent_channel_keeps_its_own_balancing():
    bank = random_system(5, 1, 1, batch=(2,))
    task = own_task(bank)
    silent = torch.tensor([1.0, 0.0]).double().view(2, 1, 1)
    quiet = TaskGramians(task.P * silent, task.Q * silent, task.steps)
    reduction = truncate(factorise_task(bank, quiet), 2)
    usual = balanced_truncation(bank, 2, balance="folded")
    assert relative_impulse_error(reduction.system, usual.system) < 1e-5


def test_what_is_no_task_is_refused():
    system = random_system(4, 1, 1)
    good = own_task(system)
    with pytest.raises(CalibrationError, match="excites"):
        factorise_task(system, replace(good, Q=0 * good.Q))
    with pytest.raises(NonFiniteError, match="Gramian P of the task"):
        factorise_task(system, replace(good, P=good.P / 0))
    with pytest.raises(ValueError, match="record them anew"):
        factorise_task(random_system(3, 1, 1), good)
    with pytest.raises(ValueError, match="form"):
        factorise_task(system, good, "other")
    on_circle = replace(system, eigenvalues=system.eigenvalues / system.eigenvalues.abs())
    with pytest.raises(UnstableSystemError):
        factorise_task(on_circle, good, horizon=5)


def test_a_form_of_ones_own_says_how_moments_look(monkeypatch):
    class Doubled(Complex):
        name = "doubled"

        def written(self, system):
            return replace(system, B=2 * system.B)

        def of_moments(self, system, moments):
            return super().of_moments(system, moments)

    monkeypatch.setitem(FORMS, "doubled", Doubled())
    system = random_system(4, 1, 1)
    sigma = factorise_task(system, own_task(system), balance="doubled").sigma
    assert torch.allclose(sigma, 2 * factorise(system, "complex", None).sigma, rtol=0.01)


def test_parts_of_the_data_add_up():
    system = random_system(3, 1, 1)
    one, other = random_task(system), random_task(system, seed=5)
    both = (one + other).summed(lambda total: 2 * total)
    assert torch.equal(both.P, 2 * (one.P + other.P))
    assert float(both.steps) == 28
