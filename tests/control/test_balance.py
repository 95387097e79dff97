"""The forms of balancing as objects: what they say of themselves, and a new one."""

from copy import deepcopy
from dataclasses import replace
from typing import get_args

import pytest
import torch

from lightning_compressm import compress
from lightning_compressm.control import (
    DiagonalLTI,
    balanced_truncation,
    hankel_singular_values,
    per_state_energy,
)
from lightning_compressm.control.balance import (
    BALANCES,
    Balance,
    Complex,
    Folded,
    Real,
    form_of,
    register_balance,
)
from lightning_compressm.nn import LRU
from lightning_compressm.reduction.policy import ReductionPolicy
from tests.control.systems import hinf_error, random_system


@pytest.fixture
def added():
    """Register forms for one test."""
    before = dict(BALANCES)
    yield register_balance
    BALANCES.clear()
    BALANCES.update(before)


def test_every_form_is_listed_once():
    assert tuple(BALANCES) == get_args(Balance)
    assert all(form.name == name for name, form in BALANCES.items())


def test_a_new_complex_form_works_by_its_name_alone(added):
    """All states stored conjugated: the same spectrum, and the conjugated reduction."""

    @added
    class Mirrored(Complex):
        name = "mirrored"

        def written(self, system):
            return system.conjugated(torch.ones_like(system.eigenvalues, dtype=torch.bool))

        def modes(self, system, t_l, t_r, kept, order):
            form = super().modes(self.written(system), t_l, t_r, kept, order)
            everything = torch.ones_like(system.eigenvalues, dtype=torch.bool)
            return replace(form, basis=form.basis.of_conjugated(everything))

    system = random_system(8, 2, 3)
    sigma = hankel_singular_values(system, balance="mirrored")
    torch.testing.assert_close(sigma, hankel_singular_values(system, balance="complex"))
    assert torch.equal(per_state_energy(sigma, "mirrored"), sigma)
    got = balanced_truncation(system, 4, balance="mirrored")
    plain = balanced_truncation(system, 4, balance="complex")
    assert got.balance == "mirrored"
    torch.testing.assert_close(got.bound, plain.bound)
    torch.testing.assert_close(
        got.system.impulse_response(30), plain.system.impulse_response(30), rtol=1e-8, atol=1e-9
    )
    torch.testing.assert_close(got.basis.inputs(system.B), got.system.B, rtol=1e-8, atol=1e-9)
    assert bool((got.basis.left_conj != 0).any())
    # A time-limited one goes through the same form again where it is replaced.
    assert balanced_truncation(system, 4, balance="mirrored", horizon=8).order == 4


def test_a_new_real_form_counts_its_states_in_pairs(added):
    """Outputs weighted by 3: values three times as large, the same states, its own bound."""

    @added
    class Louder(Real):
        name = "louder"

        def written(self, system):
            return replace(system, C=3 * system.C)

    system = random_system(8, 2, 3)
    sigma = hankel_singular_values(system, balance="louder")
    torch.testing.assert_close(sigma, 3 * hankel_singular_values(system))
    assert per_state_energy(sigma, "louder").shape == (8,)
    got, plain = (balanced_truncation(system, 4, balance=b) for b in ("louder", "real"))
    assert float(hinf_error(system, got.system)) <= float(got.bound) / 3 * (1 + 1e-9)
    torch.testing.assert_close(
        got.system.impulse_response(30), plain.system.impulse_response(30), rtol=1e-8, atol=1e-9
    )


def test_a_form_says_what_it_needs(added):
    @added
    class Strict(Complex):
        name = "strict"
        real_output = True

    system = random_system(4, 1, 1, real_output=False)
    for work in (hankel_singular_values, lambda s, **k: balanced_truncation(s, 2, **k)):
        with pytest.raises(ValueError, match=r"balance='strict' is defined for .* real inputs"):
            work(system, balance="strict")
    poles = balanced_truncation(
        DiagonalLTI(system.eigenvalues, system.B, system.C), 2, balance="strict"
    ).system.eigenvalues
    assert bool((poles.imag >= 0).all())


def test_an_unknown_form_is_refused_with_all_that_there_are(added):
    @added
    class Another(Complex):
        name = "another"

    for work in (
        lambda: form_of("imaginary"),
        lambda: hankel_singular_values(random_system(2, 1, 1), balance="imaginary"),
        lambda: per_state_energy(torch.ones(2), "imaginary"),
        lambda: balanced_truncation(random_system(2, 1, 1), 1, balance="imaginary"),
    ):
        with pytest.raises(
            ValueError, match="one of real, folded, complex, modes, another, got 'imag"
        ):
            work()


def test_a_new_form_serves_whole_models(added):
    @added
    class Another(Folded):
        name = "another"

    models = [LRU(4, 8)]
    models.append(deepcopy(models[0]))
    reports = [
        compress(m, state_dim=4, balance=b)
        for m, b in zip(models, ("another", "folded"), strict=True)
    ]
    assert reports[0].events[0].balance == "another"
    assert torch.equal(models[0].nu_log, models[1].nu_log)
    assert ReductionPolicy(balance="another").balance == "another"
    BALANCES.pop("another")
    with pytest.raises(ValueError, match=r"balance: expected one of auto, real, .*'another'"):
        ReductionPolicy(balance="another")
