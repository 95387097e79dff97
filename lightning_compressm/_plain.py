"""Reading plain data that was saved: every piece has the type that is expected of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

__all__ = ["count", "flag", "integer", "items", "mapping", "number", "tensor", "tensors", "text"]


def _expected(value: Any, kind: type | tuple[type, ...], name: str) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"expected {name}, got {type(value).__name__}")
    return value


def items(value: Any) -> list[Any]:
    """A list."""
    return list(_expected(value, list, "a list"))


def mapping(value: Any) -> dict[str, Any]:
    """A mapping."""
    return dict(_expected(value, Mapping, "a mapping"))


def text(value: Any) -> str:
    """Text."""
    return str(_expected(value, str, "text"))


def tensor(value: Any) -> Tensor:
    """A tensor."""
    found: Tensor = _expected(value, Tensor, "a tensor")
    return found


def tensors(value: Any) -> dict[str, Tensor]:
    """Tensors by name."""
    return {text(name): tensor(one) for name, one in mapping(value).items()}


def number(value: Any) -> int | float:
    """A number."""
    found: int | float = _expected(value, (int, float), "a number")
    return found


def integer(value: Any) -> int:
    """An integer."""
    return int(_expected(value, int, "an integer"))


def count(value: Any) -> int:
    """An integer >= 0."""
    if integer(value) < 0:
        raise ValueError(f"expected a count, got {value}")
    return int(value)


def flag(value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"expected True or False, got {type(value).__name__}")
    return value
