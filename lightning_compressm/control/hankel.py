"""Hankel singular values by the square-root method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from lightning_compressm._precision import back_to, with_cpu_fallback
from lightning_compressm.control._factors import Gramian
from lightning_compressm.control._numerical import filled, numerical_part
from lightning_compressm.control.balance import Balance, BalanceForm, form_of
from lightning_compressm.control.gramians import check_horizon
from lightning_compressm.control.system import DiagonalLTI
from lightning_compressm.errors import NonFiniteError

__all__ = [
    "Balancing",
    "Factors",
    "Source",
    "factorise",
    "hankel_singular_values",
    "per_state_energy",
]

NEGLIGIBLE = 1e-14  # a Hankel singular value below this share of the largest one is rounding
_T = TypeVar("_T")

Source = Literal["system", "stable", "data"]


@dataclass(frozen=True, eq=False)
class Balancing:
    """A system with the factors that every balanced truncation of it starts from.

    Attributes:
        system: In double precision, as it was given.
        form: What was balanced.
        controllability: Factor ``L_P`` with ``P = L_P L_P^H``, shape ``(..., M, K)``; M is 2N for
            the real form, else N. K is M, or less for a large system where the rest is rounding.
        observability: Factor ``L_Q`` with ``Q = L_Q L_Q^H``, shape ``(..., M, J)``.
        left: Left singular vectors of ``L_Q^H L_P``, as columns, at least as many as matter.
        sigma: Hankel singular values, descending, shape ``(..., M)``.
        right: Right singular vectors, as columns.
    """

    system: DiagonalLTI
    form: BalanceForm
    controllability: Tensor
    observability: Tensor
    left: Tensor
    sigma: Tensor
    right: Tensor

    @cached_property
    def singles(self) -> list[Balancing]:
        """The systems of a bank with one leading dimension, the same objects for every order."""
        return [self._single(index) for index in range(len(self.sigma))]

    def _single(self, index: int) -> Balancing:
        one = self.system.each(lambda tensor: tensor[index])
        factors = (self.controllability, self.observability, self.left, self.sigma, self.right)
        return Balancing(one, self.form, *(f[index] for f in factors))

    def projections(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        """To and from the balanced states ``kept`` of one system: ``T_l`` and ``T_r``."""
        return scaled_projections(
            self.controllability,
            self.observability,
            self.left[:, kept],
            self.sigma[kept],
            self.right[:, kept],
        )


@dataclass(frozen=True, eq=False)
class Factors:
    """The factors of a system's Gramians: for its spectrum, and for reductions to any order.

    Attributes:
        system: In double precision, with any leading dimensions.
        form: What the Gramians are of.
        horizon: Number of steps, or None.
        controllability: ``L_P`` as in :class:`Balancing`, square.
        observability: ``L_Q``, square.
        source: What the Gramians are from: the "system"; data, in a form that makes truncations
            "stable"; or just "data". Only infinite ones of the system bound the error.
    """

    system: DiagonalLTI
    form: BalanceForm
    horizon: int | None
    controllability: Tensor
    observability: Tensor
    source: Source = "system"

    @classmethod
    def of(cls, system: DiagonalLTI, form: BalanceForm, horizon: int | None) -> Factors:
        """Factorise the Gramians of a double precision system, on its device."""
        p, q = _gramians_of(system, form, horizon)
        return cls(system, form, horizon, p.factor(), q.factor())

    @cached_property
    def sigma(self) -> Tensor:
        """Hankel singular values, without their vectors: half the work."""
        if "balancing" in vars(self):
            return self.balancing.sigma.reshape(*self.system.batch_shape, -1)
        product = self.observability.mH @ self.controllability
        numerical = numerical_part(product)
        if numerical is None:
            values: Tensor = torch.linalg.svdvals(product)
            return values
        rows, columns = numerical
        return filled(torch.linalg.svdvals(product[rows][:, columns]), len(product))

    @cached_property
    def balancing(self) -> Balancing:
        """What a truncation needs; leading dimensions are flattened into one."""
        batch = len(self.system.batch_shape)
        flat = self.system.each(lambda tensor: tensor.reshape(-1, *tensor.shape[batch:]))
        size = self.controllability.shape[-1]
        l_p, l_q = (f.reshape(-1, size, size) for f in (self.controllability, self.observability))
        product = l_q.mH @ l_p
        numerical = numerical_part(product[0]) if len(product) == 1 else None
        if numerical is not None:
            rows, columns = numerical
            product, l_q, l_p = product[:, rows][:, :, columns], l_q[..., rows], l_p[..., columns]
        left, sigma, right_h = torch.linalg.svd(product, full_matrices=False)
        return Balancing(flat, self.form, l_p, l_q, left, filled(sigma, size), right_h.mH)


def factorise(system: DiagonalLTI, balance: Balance, horizon: int | None) -> Factors:
    """Factorise the Gramians of a system, in double precision, where that can be computed.

    Raises:
        NonFiniteError: If a parameter is NaN or infinite.
        UnstableSystemError: If an eigenvalue is outside the unit circle, or on it and there is no
            horizon.
        ValueError: If ``balance`` or ``horizon`` is not valid for the system.
    """
    form = form_of(balance)
    form.check(system)
    compute = partial(Factors.of, form=form, horizon=check_horizon(horizon))
    return in_double(compute, system.each(Tensor.detach).check(horizon=horizon))


def hankel_singular_values(
    system: DiagonalLTI, *, balance: Balance = "real", horizon: int | None = None
) -> Tensor:
    """Hankel singular values: the square roots of the eigenvalues of ``P Q``, descending.

    They are computed as the singular values of ``L_Q^H L_P`` with ``P = L_P L_P^H`` and
    ``Q = L_Q L_Q^H`` (square-root method; Tombs and Postlethwaite, 1987), in double precision. Of
    large systems, those below rounding of the largest one (some 1e-15 of it) may be zero.
    First derivatives are available; those of a single value need a gap to its neighbours, those of
    a symmetric function, such as the sum, do not. Values below 1e-14 of the largest get none.

    Args:
        system: Stable system(s) with N states.
        balance: "real": of the real system with 2N states, independent of which states are stored
            conjugated; "folded": of the complex system after conjugating every state into the
            upper half-plane; "complex": of the complex system as it is (Algorithm 1 of CompreSSM,
            arXiv 2510.02823), which changes when a state is stored conjugated; "modes": as "real"
            (reductions keep states as they are).
        horizon: Number of steps of a time-limited Gramian; None for an infinite one.

    Returns:
        float64 on the system's device, shape ``(..., 2N)`` for "real" and "modes", else
        ``(..., N)``. On a device without float64 (MPS) the values are computed on the CPU, and stay
        there.

    Raises:
        NonFiniteError: If a parameter is NaN or infinite.
        UnstableSystemError: If an eigenvalue is outside the unit circle, or on it and there is no
            horizon.
        ValueError: If ``balance`` or ``horizon`` is not valid, or a system with complex outputs is
            to be balanced in another form than "complex".

    Example:
        >>> import torch
        >>> one = torch.ones(1, 1)
        >>> system = DiagonalLTI(torch.tensor([0.5]), one, one)
        >>> hankel_singular_values(system, balance="folded")
        tensor([1.3333], dtype=torch.float64)
        >>> hankel_singular_values(system)
        tensor([1.3333, 0.0000], dtype=torch.float64)
    """
    form = form_of(balance)
    form.check(system)
    compute = partial(_singular_values, form=form, horizon=check_horizon(horizon))
    checked = system.check(horizon=horizon)
    return back_to(in_double(compute, checked), system.eigenvalues.device)


def per_state_energy(sigma: Tensor, balance: Balance = "real") -> Tensor:
    """Sum Hankel singular values by state of the layer.

    One complex state holds two states of the real form, so "real" adds neighbouring pairs. Twice
    the sum of the discarded energies then bounds the error in every form, as long as the reduced
    system's poles come in complex pairs (a real pole takes a state of its own).

    Args:
        sigma: Descending Hankel singular values, ``(..., 2N)`` for "real", else ``(..., N)``.
        balance: The form they were computed in.

    Returns:
        Energies, descending, shape ``(..., N)``.

    Raises:
        ValueError: If "real" meets an odd number of values, or ``balance`` is unknown.

    Example:
        >>> import torch
        >>> per_state_energy(torch.tensor([4.0, 3.0, 2.0, 1.0]), "real")
        tensor([7., 3.])
    """
    return form_of(balance).energies(sigma)


def in_double(compute: Callable[[DiagonalLTI], _T], system: DiagonalLTI) -> _T:
    """Compute in double precision on the system's device, or on the CPU if that one can't."""
    device = system.eigenvalues.device
    return with_cpu_fallback(
        lambda there: compute(system.each(lambda tensor: tensor.to(there)).double()), device
    )


def scaled_projections(
    l_p: Tensor, l_q: Tensor, left: Tensor, sigma: Tensor, right: Tensor
) -> tuple[Tensor, Tensor]:
    """``T_l = sigma^-1/2 U^H L_Q^H`` and ``T_r = L_P V sigma^-1/2``, so that ``T_l T_r = I``."""
    root = sigma.sqrt()
    return (left.mH @ l_q.mH) / root.unsqueeze(-1), (l_p @ right) / root.unsqueeze(-2)


def _gramians_of(
    system: DiagonalLTI, form: BalanceForm, horizon: int | None
) -> tuple[Gramian, Gramian]:
    system = form.written(system)
    p, q = form.gramians(system, horizon)
    if not all(bool(torch.isfinite(g.detach()).all()) for g in (p, q)):
        raise NonFiniteError(
            "expected finite Gramians, got NaN or infinity although the parameters are finite; "
            "B or C overflows double precision: rescale the layer"
        )
    eigenvalues = system.eigenvalues.detach()
    return (
        Gramian(p, eigenvalues, system.B.detach(), horizon),
        Gramian(q, eigenvalues.conj(), system.C.detach().mH, horizon),
    )


def _singular_values(system: DiagonalLTI, form: BalanceForm, horizon: int | None) -> Tensor:
    p, q = _gramians_of(system, form, horizon)
    if p.matrix.requires_grad or q.matrix.requires_grad:
        values: Tensor = _SingularValues.apply(p.matrix, q.matrix, p, q)
        return values
    return Factors(system, form, horizon, p.factor(), q.factor()).sigma


class _SingularValues(torch.autograd.Function):
    """``sigma(P, Q)`` with ``d sigma_i = (t_i dP t_i^H + s_i^H dQ s_i) / 2``.

    ``t_i`` and ``s_i`` are the rows and columns of the balancing projections: this is first-order
    perturbation of the eigenvalues of ``P Q``, and holds whichever way the factors were computed.
    """

    @staticmethod
    def forward(ctx: Any, p: Tensor, q: Tensor, source_p: Gramian, source_q: Gramian) -> Tensor:
        l_p = replace(source_p, matrix=p).factor()
        l_q = replace(source_q, matrix=q).factor()
        sigma: Tensor
        left, sigma, right_h = torch.linalg.svd(l_q.mH @ l_p)
        real = sigma > NEGLIGIBLE * sigma[..., :1]
        safe = torch.where(real, sigma, torch.inf)
        ctx.save_for_backward(*scaled_projections(l_p, l_q, left, safe, right_h.mH))
        return sigma

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "expected first derivatives of Hankel singular values only, got create_graph=True; "
                "second derivatives are not available"
            )
        t_l, t_r = ctx.saved_tensors
        half = grad.unsqueeze(-1) / 2
        return t_l.mH @ (half * t_l), t_r @ (half * t_r.mH), None, None
