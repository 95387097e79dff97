"""What arguments may be: the rules, their limits and their words."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_compressm import _rules
from lightning_compressm._rules import Rule, one_of, optional

CASES: dict[str, tuple[list[Any], list[Any]]] = {
    "SHARE": ([0, 0.0, 0.5, 0.999], [1, -0.1, True, "0.1", None, float("nan")]),
    "POSITIVE_SHARE": ([0.5, 0.001], [0, 1.0, False, None]),
    "COUNT": ([1, 7], [0, -1, 1.0, True, "1", None]),
    "AMOUNT": ([0, 0.5, 7, float("inf")], [-0.1, True, "1", None, float("nan")]),
    "LIMIT": ([0.5, 7], [0, -1, True, None, float("nan")]),
    "FLAG": ([True, False], [0, 1, None, "yes"]),
    "TEXT": (["x"], ["", None, 1]),
    "PATTERNS": ([[], ["a.*"], ("a", "b")], ["a.*", None, [1], {"a": 1}]),
}


@pytest.mark.parametrize("name", CASES)
def test_limits(name: str):
    rule: Rule = getattr(_rules, name)
    good, bad = CASES[name]
    for value in good:
        rule.check("x", value)
        optional(rule).check("x", value)
    for value in bad:
        with pytest.raises(ValueError, match="x: expected ") as caught:
            rule.check("x", value)
        assert str(caught.value) == f"x: expected {rule.expected}, got {value!r}."
    optional(rule).check("x", None)


def test_every_rule_has_its_limits():
    assert set(CASES) == {name for name in _rules.__all__ if name.isupper()}


def test_choices():
    one_of("a", "b").check("x", "a")
    with pytest.raises(ValueError, match="x: expected one of a, b or None, got 'c'"):
        optional(one_of("a", "b")).check("x", "c")
