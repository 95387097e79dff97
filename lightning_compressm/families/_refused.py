"""Layers that are known and can't be reduced, by qualified class name; nothing is imported."""

from __future__ import annotations

from torch import nn

__all__ = ["refusal_reason"]

_REASONS = {
    "mamba_ssm.modules.mamba3.Mamba3": (
        "rotates pairs of its states by angles that depend on the input (a complex recurrence), so "
        "states can't be dropped one by one"
    ),
}


def refusal_reason(module: nn.Module) -> str | None:
    """Why a layer is known but can't be reduced; ``None`` for every other module.

    Example:
        >>> refusal_reason(nn.Linear(2, 2)) is None
        True
    """
    names = (f"{cls.__module__}.{cls.__qualname__}" for cls in type(module).__mro__)
    return next((_REASONS[name] for name in names if name in _REASONS), None)
