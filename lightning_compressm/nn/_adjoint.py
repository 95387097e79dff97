"""What backward passes of recurrences share."""

from __future__ import annotations

from torch import Tensor

__all__ = ["conjugating_sign", "shifted_product"]


def shifted_product(adjoint: Tensor, states: Tensor) -> Tensor:
    r"""Return :math:`\sum_{m, k \ge 1} g_{m,k} x_{m,k-1}`, shape (N,), for (M, L, N) operands."""
    return (adjoint[:, 1:] * states[:, :-1]).sum((0, 1))


def conjugating_sign(like: Tensor, count: int) -> Tensor:
    """Return (1, -1, 1, -1, ...) of this length: what conjugates interleaved (re, im) pairs.

    Filled in on the device of ``like``: a copy from the host would wait for all of its work.
    """
    sign = like.new_ones(count)
    sign[1::2] = -1.0
    return sign
