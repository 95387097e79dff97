"""Reduced systems that time-limited Gramians left unstable: clamp them, and judge the result."""

from __future__ import annotations

from dataclasses import replace

import torch

from lightning_compressm.control._kernel import unit_gap
from lightning_compressm.control._modal import ModalForm
from lightning_compressm.control.gramians import impulse_energy
from lightning_compressm.control.system import DiagonalLTI
from lightning_compressm.errors import UnstableSystemError

__all__ = ["is_inside", "output_error", "stabilised"]

_ROUNDING = 1e-8  # how far outside the unit circle a pole may land by rounding alone


def stabilised(form: ModalForm, original: DiagonalLTI, *, promised: bool) -> tuple[ModalForm, bool]:
    """Clamp radii to the largest original one, or to 1; tell whether that was necessary.

    Args:
        form: A reduction.
        original: Of this system.
        promised: Whether theory promises stability; then all that may have gone wrong is rounding.

    Raises:
        UnstableSystemError: If it is unstable all the same.
    """
    eigenvalues = form.system.eigenvalues
    radius, limit = eigenvalues.abs(), original.eigenvalues.abs().max().clamp(max=1)
    # A pole ten times closer to the circle than any before would not survive single precision.
    allowed = 1.0 if promised else float(1 - (1 - limit) / 10)
    outside = radius >= allowed
    if not bool(outside.any()):
        return form, False
    largest = float(radius.max())
    if promised and largest > 1 + _ROUNDING:
        raise UnstableSystemError(
            f"expected a stable reduced system, got a pole of modulus {largest:.9g} at order "
            f"{form.system.order}; keep the layer, or choose another order"
        )
    clamped = eigenvalues * torch.where(outside, limit / radius, 1)
    return replace(form, system=replace(form.system, eigenvalues=clamped)), not promised


def is_inside(systems: DiagonalLTI, index: int) -> bool:
    """On the circle there is no infinite-horizon reduction to compare with."""
    return bool((unit_gap(systems.eigenvalues[index]) > 0).all())


def output_error(system: DiagonalLTI, reduced: DiagonalLTI, horizon: int) -> float:
    """Squared energy of the impulse response's error over the horizon."""
    error = DiagonalLTI(
        torch.cat([system.eigenvalues, reduced.eigenvalues]),
        torch.cat([system.B, reduced.B]),
        torch.cat([system.C, -reduced.C], -1),
        system.real_output,
    )
    return float(impulse_energy(error, horizon=horizon))
