"""What arguments may be, each rule written once and checked with one voice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = [
    "AMOUNT",
    "COUNT",
    "FLAG",
    "LIMIT",
    "PATTERNS",
    "POSITIVE_SHARE",
    "SHARE",
    "TEXT",
    "Rule",
    "one_of",
    "optional",
]


@dataclass(frozen=True)
class Rule:
    """What values an argument may have.

    Attributes:
        expected: the same in words.
        accepts: whether a value is one of them.

    Example:
        >>> COUNT.check("round_to", 0)
        Traceback (most recent call last):
            ...
        ValueError: round_to: expected an integer >= 1, got 0.
    """

    expected: str
    accepts: Callable[[Any], bool]

    def check(self, name: str, value: object) -> None:
        """Refuse a value.

        Raises:
            ValueError: naming the argument, what was expected and what came.
        """
        if not self.accepts(value):
            raise ValueError(f"{name}: expected {self.expected}, got {value!r}.")


def optional(rule: Rule) -> Rule:
    """The same values, or None."""
    return Rule(f"{rule.expected} or None", lambda value: value is None or rule.accepts(value))


def one_of(*choices: object) -> Rule:
    """One of these values.

    Example:
        >>> one_of("min", "max").check("mode", "min")
    """
    return Rule(f"one of {', '.join(map(str, choices))}", lambda value: value in choices)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_patterns(value: object) -> bool:
    listed = isinstance(value, Sequence) and not isinstance(value, str)
    return listed and all(isinstance(pattern, str) for pattern in value)  # type: ignore[attr-defined]


SHARE = Rule("a share in [0, 1)", lambda v: _is_number(v) and 0 <= v < 1)
POSITIVE_SHARE = Rule("a share in (0, 1)", lambda v: _is_number(v) and 0 < v < 1)
COUNT = Rule("an integer >= 1", lambda v: isinstance(v, int) and v is not True and v >= 1)
AMOUNT = Rule("a number >= 0", lambda v: _is_number(v) and v >= 0)
LIMIT = Rule("a number > 0", lambda v: _is_number(v) and v > 0)
FLAG = Rule("True or False", lambda v: isinstance(v, bool))
TEXT = Rule("text that is not empty", lambda v: isinstance(v, str) and bool(v))
PATTERNS = Rule("a list of glob patterns (strings)", _is_patterns)
