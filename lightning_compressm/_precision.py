"""Double precision: on a tensor's device, or on the CPU where the device has none (MPS)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["back_to", "double", "has_float64", "wide_dtype", "with_cpu_fallback"]

_T = TypeVar("_T")


def has_float64(device: torch.device) -> bool:
    """Whether tensors on ``device`` can hold float64 and complex128."""
    return device.type != "mps"


def wide_dtype(device: torch.device) -> torch.dtype:
    """The widest real dtype of ``device``: float64, or float32 without it."""
    return torch.float64 if has_float64(device) else torch.float32


def double(tensor: Tensor) -> Tensor:
    """In float64 or complex128, on the tensor's device or on the CPU without it."""
    wide = torch.complex128 if tensor.is_complex() else torch.float64
    return tensor.to(tensor.device if has_float64(tensor.device) else "cpu", wide)


def back_to(values: Tensor, device: torch.device) -> Tensor:
    """Double precision values on ``device``; they stay where they are if it can't hold them."""
    return values.to(device) if has_float64(device) else values


def with_cpu_fallback(compute: Callable[[torch.device], _T], device: torch.device) -> _T:
    """``compute(device)``, or on the CPU if ``device`` has no double precision or no kernel."""
    cpu = torch.device("cpu")
    if device.type != "cpu" and has_float64(device):
        try:
            return compute(device)
        except torch.OutOfMemoryError:
            raise  # the caller knows what else may move
        except (RuntimeError, NotImplementedError):  # no such kernel there
            pass
    return compute(cpu)
