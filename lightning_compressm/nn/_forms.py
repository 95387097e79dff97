"""Which form of the scan runs where: the one place that decides."""

from __future__ import annotations

import functools
import importlib.util
import math
import warnings
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_compressm.nn import _log_depth, _two_level

__all__ = ["Form", "form_for"]

# Triton 3 is made for these and later ones.
_CAPABILITY = (8, 0)
# The one module of ours that is imported late: where Triton is not installed it can't be.
_KERNEL = "lightning_compressm.nn._triton"


class _Scan(Protocol):
    def __call__(self, states: Tensor, powers: Tensor, *, reverse: bool = False) -> None: ...


class Form(NamedTuple):
    """One way to run the recurrence; powers of one form mean nothing to another."""

    powers_of: Any  # (eigenvalues, length, dtype) -> the powers that the others need
    scan_: _Scan
    adjoint_scan_: Any  # (adjoint, states, powers) -> gradient of the eigenvalues, conjugated
    name: str


def _form(name: str, module: Any) -> Form:
    return Form(module.powers_of, module.scan_, module.adjoint_scan_, name)


TWO_LEVEL = _form("two-level", _two_level)
LOG_DEPTH = _form("log-depth", _log_depth)


def form_for(device: torch.device, dtype: torch.dtype) -> Form:
    """Choose the form for states of ``dtype`` on ``device``.

    Two-level on a CPU; on CUDA (capability 8.0 or later) the Triton kernel, for complex64 and
    complex128 and where it passes a trial; log-depth everywhere else.
    """
    if device.type == "cpu":
        return TWO_LEVEL
    if device.type == "cuda" and dtype in (torch.complex64, torch.complex128):
        return _kernel(device) or LOG_DEPTH
    return LOG_DEPTH


@functools.cache
def _kernel(device: torch.device) -> Form | None:
    """The Triton form, or ``None`` where Triton is missing, too new for the device, or fails."""
    if importlib.util.find_spec("triton") is None or torch.version.hip is not None:
        return None
    if torch.cuda.get_device_capability(device) < _CAPABILITY:
        return None
    try:
        form = _form("triton", importlib.import_module(_KERNEL))
        # Triton needs a C compiler and a matching driver, which show only when a kernel runs.
        _try_out(form, device)
    except Exception as error:
        warnings.warn(
            f"the Triton scan does not work on {device} ({type(error).__name__}: {error}); scans "
            "run in plain PyTorch there, with the same results. Triton needs a C compiler and a "
            "driver that fits it",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return form


def _try_out(form: Form, device: torch.device) -> None:
    """Compare a small scan, in both directions, with the two-level form on the CPU."""
    shape = (2, 75, 35)
    angles = torch.linspace(0, 6, shape[2], dtype=torch.float64, device="cpu")
    eigenvalues = torch.polar(torch.full_like(angles, 0.95), angles)
    phases = torch.arange(math.prod(shape), dtype=torch.float32, device="cpu").view(shape)
    inputs = torch.polar(torch.ones_like(phases), phases)
    results = []
    for which, where in ((TWO_LEVEL, torch.device("cpu")), (form, device)):
        powers = which.powers_of(eigenvalues.to(where), shape[1], inputs.dtype)
        states = inputs.to(where, copy=True)
        which.scan_(states, powers)
        adjoint = inputs.to(where, copy=True)
        gradient = which.adjoint_scan_(adjoint, states, powers)
        results.append([tensor.cpu() for tensor in (states, adjoint, gradient)])
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-3)
