"""Layers that keep continuous-time parameters: to discrete time as they do it, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_compressm.control.system import NOT_INSIDE
from lightning_compressm.nn._discretize import discretize

__all__ = ["to_continuous", "to_discrete"]

_MIN_RADIUS, _MAX_RADIUS = 1e-12, 1.0 - 1e-12


def to_discrete(poles: Tensor, step: Tensor, method: str) -> tuple[Tensor, Tensor]:
    """Eigenvalues and input gains of ``x' = poles x + u``, both complex128.

    Args:
        poles: continuous-time eigenvalues, complex128.
        step: lengths of the steps, float64; broadcasts with ``poles``.
        method: "zoh" or "bilinear".
    """
    decay = -poles.real
    re, im, gain_re, gain_im = discretize(decay, poles.imag, step, method)
    eigenvalues = torch.complex(re, im)
    # Rounding must not hide that a radius is one (or above: then it is an instability).
    gap = 2 * decay * step
    if method == "bilinear":
        gap = gap / ((1 + decay * step / 2).square() + (poles.imag * step / 2).square())
    on_circle = (1 - gap == 1) & (decay >= 0)
    phase = eigenvalues / eigenvalues.abs().clamp(min=0.5)
    eigenvalues = torch.where(on_circle, phase * NOT_INSIDE, eigenvalues)
    return eigenvalues, torch.complex(gain_re, gain_im)


def to_continuous(eigenvalues: Tensor, step: Tensor, method: str) -> tuple[Tensor, Tensor]:
    """Continuous-time eigenvalues with these discrete ones, and their input gains.

    For "zoh" it is the principal logarithm, with imaginary parts in (-pi, pi] / step. Radii are
    kept away from 0 and 1, so that real parts are finite and negative.

    Args:
        eigenvalues: inside the unit circle, complex128.
        step: lengths of the steps, float64; broadcasts with ``eigenvalues``.
        method: "zoh" or "bilinear".
    """
    radius = eigenvalues.abs().clamp(_MIN_RADIUS, _MAX_RADIUS)
    log_radius, angle = radius.log(), eigenvalues.angle()
    if method == "zoh":
        re, im = log_radius, angle
    else:
        # |1 + lambda|^2, without cancellation next to -1.
        distance = torch.expm1(log_radius).square() + 4 * radius * (angle / 2).cos().square()
        re = 2 * torch.expm1(2 * log_radius) / distance
        im = 4 * radius * angle.sin() / distance
    poles = torch.complex(re / step, im / step)
    _, _, gain_re, gain_im = discretize(-poles.real, poles.imag, step, method)
    return poles, torch.complex(gain_re, gain_im)
