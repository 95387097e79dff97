"""The two-level scan: in place, without autograd."""

from __future__ import annotations

import functools
import itertools
import math

import torch
from torch import Tensor

from lightning_compressm._precision import wide_dtype
from lightning_compressm.nn._adjoint import shifted_product

__all__ = ["adjoint_scan_", "powers_of", "scan_"]


@functools.cache
def chunk_length(length: int) -> int:
    """Choose the chunk length Q, near ``sqrt(length)``, that needs the fewest Python steps.

    A sequence is cut into ``length // Q`` chunks and a tail of ``length % Q`` steps, so Q need
    not divide it.
    """
    candidates = range(1, 2 * math.isqrt(length) + 2)
    return min(candidates, key=lambda chunk: chunk + length // chunk + length % chunk)


def powers_of(eigenvalues: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """Return ``eigenvalues ** (1, ..., Q)``, shape (Q, N), rounded only once to ``dtype``."""
    wide = eigenvalues.to(wide_dtype(eigenvalues.device).to_complex())
    return wide.expand(chunk_length(length), -1).cumprod(0).to(dtype)


def scan_(states: Tensor, powers: Tensor, *, reverse: bool = False) -> None:
    r"""Overwrite inputs :math:`u` by states :math:`x_k = \lambda x_{k-1} + u_k`, zero before.

    Chunks of Q steps are scanned side by side; then the chunk ends are scanned with
    :math:`\lambda^Q`; then every chunk gets :math:`\lambda^{1 \ldots Q-1}` times the state that
    it starts from. About :math:`2 \sqrt{L}` steps.

    Args:
        states: (M, L, N) complex; overwritten.
        powers: (Q, N), from :func:`powers_of`.
        reverse: run from the last step to the first, :math:`x_k = \lambda x_{k+1} + u_k`.
    """
    chunk = powers.shape[0]
    whole = states.shape[1] // chunk * chunk
    tail = states[:, whole - 1 :].unbind(1)
    if reverse:
        _sequential_(tail[::-1], powers[0])
    grid = states[:, :whole].view(len(states), -1, chunk, states.shape[2])
    columns = grid.unbind(2)
    _sequential_(columns[::-1] if reverse else columns, powers[0])
    if reverse:
        _sequential_(columns[0].unbind(1)[::-1], powers[-1])
        grid[:, :-1, 1:].addcmul_(powers[:-1].flip(0), grid[:, 1:, :1])
    else:
        _sequential_(columns[-1].unbind(1), powers[-1])
        grid[:, 1:, :-1].addcmul_(powers[:-1], grid[:, :-1, -1:])
        _sequential_(tail, powers[0])


def _sequential_(steps: tuple[Tensor, ...], factor: Tensor) -> None:
    for previous, current in itertools.pairwise(steps):
        current.addcmul_(factor, previous)


def adjoint_scan_(adjoint: Tensor, states: Tensor, powers: Tensor) -> Tensor:
    """Scan ``adjoint`` in reverse and return its :func:`shifted_product` with ``states``."""
    scan_(adjoint, powers, reverse=True)
    return shifted_product(adjoint, states)
