"""The scan in about 2 log2(L) steps, for devices where launching a kernel costs more than it does.

Each step touches half as many states as the one before it, so that both sweeps together touch every
state about twice. On a CPU the strides defeat the cache: the two-level form is faster there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_compressm._precision import wide_dtype
from lightning_compressm.nn._adjoint import shifted_product

__all__ = ["adjoint_scan_", "powers_of", "scan_"]


def powers_of(eigenvalues: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    r"""Return ``eigenvalues ** (1, 2, 4, ...)`` up to less than L, rounded only once to ``dtype``.

    Shape (max(1, ceil(log2 L)), N). With :math:`|\lambda| > 1` the last of them, about
    :math:`\lambda^{L/2}`, must not overflow, or states become NaN.
    """
    powers = [eigenvalues.to(wide_dtype(eigenvalues.device).to_complex())]
    for _ in range((length - 1).bit_length() - 1):
        powers.append(powers[-1].square())
    return torch.stack(powers).to(dtype)


def scan_(states: Tensor, powers: Tensor, *, reverse: bool = False) -> None:
    r"""Overwrite inputs :math:`u` by states :math:`x_k = \lambda x_{k-1} + u_k`, zero before.

    Going up, every 2d-th step gets what the d steps before it sum up to, for d = 1, 2, 4, ...;
    going down, the steps half-way between finished ones are finished.

    Args:
        states: (M, L, N) complex, any L >= 1; overwritten.
        powers: from :func:`powers_of`.
        reverse: run from the last step to the first, :math:`x_k = \lambda x_{k+1} + u_k`.

    Source:
        The in-place sweeps of Brent & Kung (1982), "A Regular Layout for Parallel Adders"; see
        also Blelloch (1990), "Prefix Sums and Their Applications".
    """
    distances = [(1 << level, power) for level, power in enumerate(powers)]
    for distance, power in distances:
        _add_(states, 2 * distance - 1, distance, power, reverse)
    for distance, power in reversed(distances):
        _add_(states, 3 * distance - 1, distance, power, reverse)


def adjoint_scan_(adjoint: Tensor, states: Tensor, powers: Tensor) -> Tensor:
    """Scan ``adjoint`` in reverse and return its :func:`shifted_product` with ``states``."""
    scan_(adjoint, powers, reverse=True)
    return shifted_product(adjoint, states)


def _add_(states: Tensor, first: int, distance: int, power: Tensor, reverse: bool) -> None:
    """Add to steps ``first``, ``first + 2 d``, ... ``power`` times the step d before each."""
    length, stride = states.shape[1], 2 * distance
    if first >= length:
        return
    if reverse:
        start = (length - 1 - first) % stride
        targets, sources = states[:, start : length - first : stride], states[:, start + distance :]
    else:
        targets, sources = states[:, first::stride], states[:, first - distance :]
    targets.addcmul_(power, sources[:, ::stride][:, : targets.shape[1]])
