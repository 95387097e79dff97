"""Argument checks that the layers share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "check_dtype",
    "check_inputs",
    "check_size",
    "check_state",
    "check_time_steps",
]


def check_size(name: str, value: object) -> None:
    """Raise ``ValueError`` unless ``value`` is an integer >= 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {value!r}")


def check_dtype(dtype: torch.dtype | None) -> None:
    """Raise ``TypeError`` unless parameters can have ``dtype``."""
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"dtype must be a real floating-point type, got {dtype}")


def check_time_steps(dt_min: float, dt_max: float) -> None:
    """Raise ``ValueError`` unless 0 < dt_min <= dt_max, both finite."""
    if not 0 < dt_min <= dt_max < math.inf:
        raise ValueError(f"steps must satisfy 0 < dt_min <= dt_max, got {dt_min} and {dt_max}")


def check_inputs(layer: str, inputs: Tensor, expected: str, d_model: int) -> None:
    """Raise unless ``inputs`` is real, and of the shape ``expected`` with at least one step."""
    if not inputs.is_floating_point():
        raise TypeError(f"{layer} needs real floating-point inputs, got {inputs.dtype}")
    if inputs.ndim != expected.count(",") + 1 or inputs.shape[-1] != d_model:
        raise ValueError(
            f"{layer} needs inputs of shape {expected} with d_model = {d_model}, "
            f"got {tuple(inputs.shape)}"
        )
    if inputs.ndim == 3 and inputs.shape[1] == 0:
        raise ValueError(f"{layer} needs at least one step, got shape {tuple(inputs.shape)}")


def check_state(state: Tensor, names: str, expected: tuple[int, ...]) -> None:
    """Raise unless ``state`` is complex and has the shape ``expected``."""
    if state.shape != expected:
        raise ValueError(
            f"state must have shape {names} = {expected}, got {tuple(state.shape)}; "
            "start from initial_state(batch), also after the layer was reduced"
        )
    if not state.is_complex():
        raise TypeError(f"state must be complex, got {state.dtype}; use initial_state(batch)")
