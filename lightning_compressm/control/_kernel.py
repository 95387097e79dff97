"""Geometric sums of products of eigenvalues, accurate up to the unit circle."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Kernel", "one_minus_product", "unit_gap"]

_NEAR = 1e-8  # the square of what is smaller is rounding
_SPLITTER = 2.0**27 + 1  # Veltkamp's constant: splits a float64 into two halves of 26 bits


class Kernel:
    """The geometric sums ``sum_t (lambda_i mu_j)^t``, with ``mu`` either conj(lambda) or lambda.

    Near the unit circle ``1 - lambda_i conj(lambda_j)`` cancels. With ``gap = 1 - |lambda|^2``
    known to full relative precision, ``2 (1 - Re(lambda_i conj(lambda_j))) = gap_i + gap_j +
    |lambda_i - lambda_j|^2`` is a sum of positive terms, so nothing is lost.
    """

    def __init__(self, eigenvalues: Tensor, horizon: int | None) -> None:
        self.eigenvalues, self.gap = eigenvalues, unit_gap(eigenvalues)
        self.power, self.power_gap = self.eigenvalues, self.gap
        self.horizon = horizon
        for bit in "" if horizon is None else format(horizon, "b")[1:]:
            self._double()
            if bit == "1":
                self._increment()

    def _double(self) -> None:
        self.power = self.power * self.power
        self.power_gap = self.power_gap * (2 - self.power_gap)

    def _increment(self) -> None:
        self.power = self.power * self.eigenvalues
        self.power_gap = self.power_gap + self.gap * (1 - self.power_gap)

    def hermitian(self) -> Tensor:
        return self._sum(self.eigenvalues, self.power)

    def symmetric(self) -> Tensor:
        return self._sum(self.eigenvalues.conj(), self.power.conj())

    def _sum(self, other: Tensor, other_power: Tensor) -> Tensor:
        denominator = one_minus_product(self.eigenvalues, other, self.gap)
        if self.horizon is None:
            return 1 / denominator
        # At 1 both are 0: the series has the limit there, and its derivative.
        near = denominator.abs() * self.horizon < _NEAR
        series = self.horizon - self.horizon * (self.horizon - 1) / 2 * denominator
        numerator = one_minus_product(self.power, other_power, self.power_gap)
        return torch.where(near, series, numerator / torch.where(near, 1, denominator))


def one_minus_product(left: Tensor, right: Tensor, gap: Tensor) -> Tensor:
    """``1 - left_i conj(right_j)``, where both have the same ``gap = 1 - |.|^2``."""
    column, row = left.unsqueeze(-1), right.unsqueeze(-2)
    difference = column - row
    squared = difference.real.square() + difference.imag.square()
    real = (gap.unsqueeze(-1) + gap.unsqueeze(-2) + squared) / 2
    imag = difference.real * row.imag - difference.imag * row.real
    return torch.complex(real, imag)


def unit_gap(eigenvalues: Tensor) -> Tensor:
    """``1 - |lambda|^2`` without cancellation, by Dekker's error-free products (1971)."""
    re, im = eigenvalues.real, eigenvalues.imag
    re_square, re_rest = _exact_square(re)
    im_square, im_rest = _exact_square(im)
    large, small = torch.maximum(re_square, im_square), torch.minimum(re_square, im_square)
    rounded = 1 - large
    rounding = (1 - rounded) - large
    return (rounded - small) + (rounding - (re_rest + im_rest))


def _exact_square(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rounded square of float64 values and what rounding took away."""
    scaled = x * _SPLITTER
    high = scaled - (scaled - x)
    low = x - high
    square = x * x
    return square, ((high * high - square) + 2 * high * low) + low * low
