"""A reduction policy holds only what can be meant."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from lightning_compressm.reduction.policy import ReductionPolicy


def test_defaults():
    policy = ReductionPolicy()
    assert (policy.tolerance, policy.fraction, policy.state_dim) == (0.05, None, None)
    assert (policy.min_reduction, policy.min_state_dim, policy.round_to) == (0.0, 1, 1)
    assert (policy.balance, policy.horizon, policy.selection) == ("auto", "auto", "largest")


@pytest.mark.parametrize("target", [{"fraction": 0.5}, {"state_dim": 4}, {"tolerance": 0.0}])
def test_one_target_is_kept_as_it_is(target: dict[str, Any]):
    policy = ReductionPolicy(**target)
    given = {k: getattr(policy, k) for k in ("tolerance", "fraction", "state_dim")}
    assert {k: v for k, v in given.items() if v is not None} == target


@pytest.mark.parametrize(
    ("targets", "named"),
    [
        ({"tolerance": 0.1, "fraction": 0.5}, "tolerance=0.1 and fraction=0.5"),
        ({"fraction": 0.5, "state_dim": 4}, "fraction=0.5 and state_dim=4"),
        ({"tolerance": 0.0, "fraction": 0.5, "state_dim": 4}, "tolerance=0.0 and fraction=0.5 and"),
    ],
)
def test_two_targets_are_refused_by_name(targets: dict[str, Any], named: str):
    with pytest.raises(ValueError, match=named):
        ReductionPolicy(**targets)


def test_a_fraction_that_is_less_than_the_least_reduction_is_refused():
    with pytest.raises(ValueError, match=r"fraction=0.03 drops less .* min_reduction=0.05"):
        ReductionPolicy(fraction=0.03, min_reduction=0.05)
    ReductionPolicy(fraction=0.05, min_reduction=0.05)


NAN = float("nan")
BAD = [
    *[("tolerance", v) for v in (1, 1.0, -1e-9, NAN, float("inf"), "0.1", True, [0.1])],
    *[("fraction", v) for v in (0, 0.0, 1.0, -0.5, NAN, True)],
    *[("min_reduction", v) for v in (1.0, -0.1, NAN, "no")],
    *[(n, v) for n in ("state_dim", "min_state_dim", "round_to") for v in (0, -1, 1.5, True, "4")],
    *[(n, None) for n in ("min_state_dim", "round_to")],
    *[("horizon", v) for v in (0, -5, 1.5, True, "infinite", "")],
    *[(n, v) for n in ("layers", "ignore") for v in ("lru", {"lru"}, [1], [None], 3)],
    *[(n, v) for n in ("balance", "selection", "criterion") for v in ("", "best", None, 1)],
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_values_out_of_range_are_refused_by_name_and_value(name: str, value: object):
    with pytest.raises(ValueError, match=f"^{name}: expected ") as caught:
        ReductionPolicy(**{name: value})
    assert repr(value) in str(caught.value)


GOOD = [
    *[("tolerance", v) for v in (0, 0.0, 0.999)],
    *[("fraction", v) for v in (1e-9, 0.5)],
    *[("horizon", v) for v in (None, 1, 64, "auto")],
    *[("balance", v) for v in ("auto", "real", "folded", "complex")],
    *[("selection", v) for v in ("largest", "smallest", "random")],
    *[("layers", v) for v in (None, [], ["a", "b.*"], ("a",))],
]


@pytest.mark.parametrize(("name", "value"), GOOD)
def test_values_in_range(name: str, value: object):
    assert getattr(ReductionPolicy(**{name: value}), name) == value


def test_a_policy_can_not_be_changed():
    with pytest.raises(FrozenInstanceError):
        ReductionPolicy().tolerance = 0.5  # type: ignore[misc]


def test_only_keywords():
    with pytest.raises(TypeError):
        ReductionPolicy(0.1)  # type: ignore[misc]
