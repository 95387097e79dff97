"""Layers that are known and can't be reduced, by qualified class name; nothing is imported."""

from __future__ import annotations

from torch import nn

__all__ = ["nothing_to_reduce", "refusal_reason"]

_ONE_SIZE = (
    "(Kimi delta attention) has one head_dim for keys, values and the bottlenecks of its gates, so "
    "key channels can't go alone"
)
_REASONS = {
    "mamba_ssm.modules.mamba3.Mamba3": (
        "rotates pairs of its states by angles that depend on the input (a complex recurrence), so "
        "states can't be dropped one by one"
    ),
    "transformers.models.kimi_linear.modeling_kimi_linear.KimiLinearDeltaAttention": _ONE_SIZE,
    "transformers.models.bailing_hybrid.modeling_bailing_hybrid.BailingHybridDeltaAttention": (
        _ONE_SIZE
    ),
}
# How the names of classes end, and why there is nothing to reduce.
_WITHOUT_STATES = {
    "ShortConv": "a short convolution, which has no state",
    "Rglru": "a recurrence with one state for each channel",
    "RGLRU": "a recurrence with one state for each channel",
    "Attention": "attention, which keeps all keys and values in place of a state",
}


def refusal_reason(module: nn.Module) -> str | None:
    """Why a layer is known but can't be reduced; ``None`` for every other module.

    Example:
        >>> refusal_reason(nn.Linear(2, 2)) is None
        True
    """
    names = (f"{cls.__module__}.{cls.__qualname__}" for cls in type(module).__mro__)
    return next((_REASONS[name] for name in names if name in _REASONS), None)


def nothing_to_reduce(module: nn.Module) -> str | None:
    """What a sequence layer is that has no states to reduce; ``None`` for every other module.

    Example:
        >>> nothing_to_reduce(nn.MultiheadAttention(2, 1))
        'attention, which keeps all keys and values in place of a state'
    """
    name = type(module).__name__
    return next((what for part, what in _WITHOUT_STATES.items() if name.endswith(part)), None)
