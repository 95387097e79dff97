"""Balanced truncation as textbooks have it, in NumPy and SciPy, and by pyMOR: what to compare with.

Source:
    Antoulas (2005), "Approximation of Large-Scale Dynamical Systems", section 7.1: with
    R = P^(1/2), S = Q^(1/2) and S R = U diag(sigma) V^H, the projections are
    sigma^(-1/2) U^H S and R V sigma^(-1/2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

Array = NDArray[Any]
Form = Literal["real", "complex"]


@dataclass(frozen=True)
class System:
    """Diagonal, discrete in time: eigenvalues (N,), B (N, H), C (P, N), all complex128."""

    eigenvalues: Array
    B: Array
    C: Array


@dataclass(frozen=True)
class Truncated:
    """Eigenvalues, B and C of the reduced system in modal form, and all singular values."""

    eigenvalues: Array
    B: Array
    C: Array
    sigma: Array


def truncate(system: System, order: int, form: Form) -> Truncated:
    """Reduce to `order` complex states, or to twice as many of the real system [Re x; Im x]."""
    A, B, C, P, Q = (_real if form == "real" else _complex)(system)
    root_p, root_q = scipy.linalg.sqrtm(P), scipy.linalg.sqrtm(Q)
    left, sigma, right = np.linalg.svd(root_q @ root_p)
    kept = 2 * order if form == "real" else order
    scale = np.sqrt(sigma[:kept])
    T_l = (left[:, :kept].conj().T @ root_q) / scale[:, None]
    T_r = (root_p @ right[:kept].conj().T) / scale
    eigenvalues, vectors = np.linalg.eig(T_l @ A @ T_r)
    return Truncated(eigenvalues, np.linalg.solve(vectors, T_l @ B), C @ T_r @ vectors, sigma)


def by_pymor(system: System, order: int) -> Array:
    """Reduce the real form by pyMOR, and return all of its Hankel singular values."""
    from pymor.models.iosys import LTIModel
    from pymor.reductors.bt import BTReductor

    A, B, C = _matrices(system)
    model = LTIModel.from_matrices(A, B, C, sampling_time=1)
    BTReductor(model).reduce(2 * order)
    sigma: Array = model.hsv()
    return sigma


def _complex(system: System) -> tuple[Array, ...]:
    lam, B, C = system.eigenvalues, system.B, system.C
    conj = lam.conj()
    P = B @ B.conj().T / (1 - np.outer(lam, conj))
    Q = C.conj().T @ C / (1 - np.outer(conj, lam))
    return np.diag(lam), B, C, P, Q


def _real(system: System) -> tuple[Array, ...]:
    """Gramians of the real form: from those of x with itself and with its conjugate."""
    lam, B, C = system.eigenvalues, system.B, system.C
    *_, P, Q = _complex(system)
    pair = 1 - np.outer(lam, lam)
    M, S = B @ B.T / pair, C.T @ C / pair
    real_p = np.block([[(P + M).real, (M - P).imag], [(P + M).imag, (P - M).real]]) / 2
    real_q = np.block([[(Q + S).real, -(Q + S).imag], [(Q - S).imag, (Q - S).real]]) / 2
    return *_matrices(system), real_p, real_q


def _matrices(system: System) -> tuple[Array, Array, Array]:
    """A, B and C of z = [Re x; Im x] for a real input and the output Re(C x)."""
    lam, B, C = system.eigenvalues, system.B, system.C
    re, im = np.diag(lam.real), np.diag(lam.imag)
    return (
        np.block([[re, -im], [im, re]]),
        np.vstack([B.real, B.imag]),
        np.hstack([C.real, -C.imag]),
    )
