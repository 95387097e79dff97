"""Diagonal plus low rank, from nothing but poles and residues.

In input-normal coordinates (Gramian of the identity) a stable system of one input is
``A = K - B B^T / 2`` with K skew. Its poles alone give A and B, as a chain of all-pass sections
(the orthonormal functions of Takenaka and Malmquist), and K has orthonormal eigenvectors: so the
diagonal form of K, and P = B / sqrt(2), exist for all poles and are well conditioned. HiPPO-LegS
comes in this form (Gu et al. 2022, arXiv 2111.00396, theorem 1).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["low_rank_form"]


def low_rank_form(poles: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``2 Re(C (s - (D - P P^*))^-1 B)`` over conjugate pairs, for ``Re(weights (s - poles)^-1)``.

    D has equal real parts, half of those of the slowest pole; ``B = sqrt(2) P`` is real and
    positive.

    Args:
        poles: real parts negative, (H, r), complex128; each stands for a conjugate pair.
        weights: (H, outputs, r), complex128.

    Returns:
        D (H, r) with negative imaginary parts, P (H, r), C (H, outputs, r), complex128.
    """
    decay = -poles.real.amax(-1, keepdim=True) / 2
    pairs = torch.cat((poles, poles.conj()), -1) + decay
    gains = (-2 * pairs.real).sqrt()
    # K, and the map from the chain's states to those of the pairs.
    product = gains.unsqueeze(-1) * gains.unsqueeze(-2) / 2
    skew = product.triu(1) - product.tril(-1) + torch.diag_embed(1j * pairs.imag)
    frequencies, vectors = torch.linalg.eigh(-1j * skew)
    half = poles.shape[-1]
    frequencies, vectors = frequencies[..., :half], vectors[..., :half]
    driven = (vectors.mH @ gains.to(vectors.dtype).unsqueeze(-1)).squeeze(-1)
    size = driven.abs()
    phase = torch.where(size > 0, driven / size.clamp(min=torch.finfo(size.dtype).tiny), 1)
    residues = torch.cat((weights, weights.conj()), -1) / 2
    C = residues @ _from_chain(pairs, gains) @ (vectors * phase.unsqueeze(-2))
    D = torch.complex(-decay.expand_as(frequencies), frequencies)
    return D, torch.complex(size / math.sqrt(2), torch.zeros_like(size)), C


def _from_chain(poles: Tensor, gains: Tensor) -> Tensor:
    """``1 / (s - pole_i)`` as sums of the chain's orthonormal functions, (H, K, K)."""
    own, other = poles.unsqueeze(-1), poles.unsqueeze(-2)
    denominators = -own - other.conj()
    sections = torch.cumprod((other - own) / denominators, -1)
    before = torch.cat((torch.ones_like(sections[..., :1]), sections[..., :-1]), -1)
    return before * gains.unsqueeze(-2) / denominators
