"""From continuous time to discrete time, in real arithmetic so that it can be compiled."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

__all__ = ["DISCRETIZATIONS", "Discretization", "discretize"]

Discretization = Literal["zoh", "bilinear"]
DISCRETIZATIONS: tuple[str, ...] = get_args(Discretization)


def discretize(
    decay: Tensor, frequency: Tensor, step: Tensor, method: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Discretize :math:`\dot x = A x + u` with :math:`A = -decay + i\, frequency`.

    Zero-order hold gives :math:`\lambda = e^{\Delta A}` and the input gain
    :math:`(e^{\Delta A} - 1) / A`, the bilinear transform
    :math:`\lambda = (1 + \Delta A / 2) / (1 - \Delta A / 2)` and
    :math:`\Delta / (1 - \Delta A / 2)`. Nothing is singular while decay > 0.

    Args:
        decay: minus the real parts, positive.
        frequency: imaginary parts, in radians per unit of time.
        step: lengths of the steps, positive; all three broadcast.
        method: "zoh" or "bilinear".

    Returns:
        Real and imaginary parts of the eigenvalues, then of the gains.
    """
    a, b = -decay * step, frequency * step
    if method == "bilinear":
        a, b = a / 2, b / 2
        size = (1 - a).square() + b.square()
        gain = step / size
        return (1 - a.square() - b.square()) / size, 2 * b / size, (1 - a) * gain, b * gain
    radius, cosine, sine = a.exp(), b.cos(), b.sin()
    # e^z - 1 cancels for small z unless it is written with expm1 and the half angle.
    less_re = torch.expm1(a) * cosine - 2 * (b / 2).sin().square()
    less_im = radius * sine
    size = decay.square() + frequency.square()
    gain_re = (less_im * frequency - less_re * decay) / size
    gain_im = -(less_im * decay + less_re * frequency) / size
    return radius * cosine, less_im, gain_re, gain_im
