"""Controllability and observability Gramians of diagonal systems, in closed form."""

from __future__ import annotations

import operator

import torch
from torch import Tensor

from lightning_compressm.control._kernel import Kernel
from lightning_compressm.control.system import DiagonalLTI

__all__ = ["check_horizon", "gramians", "impulse_energy", "real_gramians"]


def check_horizon(horizon: int | None) -> int | None:
    """Return the horizon as an int, or None for an infinite one.

    Args:
        horizon: Number of steps, at least 1, or None.

    Raises:
        ValueError: If it is neither None nor an integer of at least 1.
    """
    if horizon is None:
        return None
    try:
        steps = operator.index(horizon)
    except TypeError:
        steps = 0
    if isinstance(horizon, bool) or steps < 1:
        raise ValueError(
            f"expected horizon=None (infinite) or a number of steps >= 1, got {horizon!r}; "
            "use the length of your sequences"
        )
    return steps


def gramians(system: DiagonalLTI, *, horizon: int | None = None) -> tuple[Tensor, Tensor]:
    """Gramians of the complex system ``(Lambda, B, C)``, infinite or limited to ``horizon`` steps.

    ``P = sum_t Lambda^t B B^H Lambda^tH`` and ``Q = sum_t Lambda^tH C^H C Lambda^t`` over
    ``t = 0 .. horizon - 1``. For a diagonal ``Lambda`` the sums are geometric, entry by entry
    (Antoulas, *Approximation of Large-Scale Dynamical Systems*, 2005, sections 4.3 and 7.3).

    Args:
        system: Stable system(s) with N states.
        horizon: Number of steps, at least 1; None for infinitely many.

    Returns:
        ``(P, Q)``, Hermitian, complex128, each of shape ``(..., N, N)``.

    Raises:
        NonFiniteError: If a parameter is NaN or infinite.
        UnstableSystemError: If an eigenvalue is outside the unit circle, or on it and there is no
            horizon.
        ValueError: If the horizon is not None and not an integer of at least 1.

    Example:
        >>> import torch
        >>> one = torch.ones(1, 1)
        >>> P, Q = gramians(DiagonalLTI(torch.tensor([0.5]), one, one))
        >>> round(P.real.item(), 6)
        1.333333
        >>> P, Q = gramians(DiagonalLTI(torch.tensor([0.5]), one, one), horizon=2)
        >>> P.real.item()
        1.25
    """
    full = system.check(horizon=horizon).double()
    kernel = Kernel(full.eigenvalues, check_horizon(horizon)).hermitian()
    return (full.B @ full.B.mH) * kernel, (full.C.mH @ full.C) * kernel.conj()


def real_gramians(system: DiagonalLTI, *, horizon: int | None = None) -> tuple[Tensor, Tensor]:
    """Gramians of the real system with state ``[Re x; Im x]`` and output ``Re(C x)``.

    Built from the Hermitian Gramians and their unconjugated counterparts ``sum Lambda^t B B^T
    Lambda^t`` and ``sum Lambda^t C^T C Lambda^t``. They do not depend on which of its states a
    layer happens to store conjugated.

    Args:
        system: Stable system(s) with N states and real outputs.
        horizon: Number of steps, at least 1; None for infinitely many.

    Returns:
        ``(P, Q)``, symmetric, float64, each of shape ``(..., 2N, 2N)``.

    Raises:
        NonFiniteError: If a parameter is NaN or infinite.
        UnstableSystemError: If an eigenvalue is outside the unit circle, or on it and there is no
            horizon.
        ValueError: If the horizon is not valid, or the system's output is complex.

    Example:
        >>> import torch
        >>> one = torch.ones(1, 1)
        >>> P, Q = real_gramians(DiagonalLTI(torch.tensor([0.5j]), one, one))
        >>> P
        tensor([[1.0667, 0.0000],
                [0.0000, 0.2667]], dtype=torch.float64)
    """
    system.require_real_output("the real Gramian")
    full = system.check(horizon=horizon).double()
    kernel = Kernel(full.eigenvalues, check_horizon(horizon))
    hermitian, symmetric = kernel.hermitian(), kernel.symmetric()
    return (
        _real_gramian(full.B, hermitian, symmetric),
        _real_gramian(full.C.mH, hermitian.conj(), symmetric.conj()),
    )


def impulse_energy(system: DiagonalLTI, *, horizon: int | None = None) -> Tensor:
    """Sum of squares of the impulse response: the squared H2 norm, or its time-limited form.

    ``sum_t |Re h_t|^2 = (sum_t |h_t|^2 + Re sum_t h_t^2) / 2`` gives the energy of real outputs.

    Args:
        system: Stable system(s).
        horizon: Number of steps, at least 1; None for infinitely many.

    Returns:
        Energy in float64, shape ``(...)``.

    Raises:
        NonFiniteError: If a parameter is NaN or infinite.
        UnstableSystemError: If an eigenvalue is outside the unit circle, or on it and there is no
            horizon.
        ValueError: If the horizon is not None and not an integer of at least 1.

    Example:
        >>> import torch
        >>> one = torch.ones(1, 1)
        >>> impulse_energy(DiagonalLTI(torch.tensor([0.5]), one, one), horizon=2)
        tensor(1.2500, dtype=torch.float64)
    """
    full = system.check(horizon=horizon).double()
    kernel = Kernel(full.eigenvalues, check_horizon(horizon))
    p, m = _products(full.B)
    q, s = _products(full.C.mT)
    energy = (q * p * kernel.hermitian()).real.sum((-2, -1))
    if not system.real_output:
        return energy
    return (energy + (s * m * kernel.symmetric()).real.sum((-2, -1))) / 2


def _products(rows: Tensor) -> tuple[Tensor, Tensor]:
    """``X X^H`` and ``X X^T`` out of three real products, where complex ones take eight."""
    re, im = rows.real.contiguous(), rows.imag.contiguous()
    re_re, im_im, im_re = re @ re.mT, im @ im.mT, im @ re.mT
    hermitian = torch.complex(re_re + im_im, im_re - im_re.mT)
    return hermitian, torch.complex(re_re - im_im, im_re + im_re.mT)


def _real_gramian(rows: Tensor, hermitian: Tensor, symmetric: Tensor) -> Tensor:
    """Gramian of ``[Re x; Im x]`` for inputs ``rows``, with the kernels of ``x``."""
    product, unconjugated = _products(rows)
    p, m = product * hermitian, unconjugated * symmetric
    upper = torch.cat([p.real + m.real, m.imag - p.imag], -1)
    lower = torch.cat([m.imag + p.imag, p.real - m.real], -1)
    return torch.cat([upper, lower], -2) / 2
