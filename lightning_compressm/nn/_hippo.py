"""The normal part of the HiPPO-LegS matrix, where S4D-LegS and S5 start from."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["hippo_normal"]


def hippo_normal(states: int) -> tuple[Tensor, Tensor]:
    r"""Diagonalise HiPPO-N of 2N real states, one eigenvalue of each conjugate pair.

    HiPPO-LegS plus the rank-one :math:`p p^T` with :math:`p_n = \sqrt{n + 1/2}` is
    :math:`-I/2` plus a skew-symmetric matrix, so all real parts are -1/2.

    Args:
        states: complex states N, half of the real ones.

    Returns:
        The imaginary parts, ascending, positive, (N,) float64; and the eigenvectors, orthonormal,
        (2N, N) complex128, each turned so that its first entry is positive.

    Source:
        Gu et al. (2022), "On the Parameterization and Initialization of Diagonal State Space
        Models", arXiv 2206.11893, section 2.3; Smith et al. (2023), arXiv 2208.04933, B.1.
    """
    n = torch.arange(2 * states, dtype=torch.float64, device="cpu")
    outer = torch.outer(2 * n + 1, 2 * n + 1).sqrt() / 2
    skew = outer.triu(1) - outer.tril(-1)
    frequencies, vectors = torch.linalg.eigh(torch.complex(torch.zeros_like(skew), -skew))
    upper = vectors[:, states:]
    return frequencies[states:], upper * (upper[0].conj() / upper[0].abs())
