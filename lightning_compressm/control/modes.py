"""Reduction that keeps states as they are: for layers that can't hold balanced ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lightning_compressm.control._modal import ModalForm
from lightning_compressm.control.balance import Real, register_balance
from lightning_compressm.control.basis import ChangeOfBasis
from lightning_compressm.control.system import DiagonalLTI

if TYPE_CHECKING:
    from lightning_compressm.control.hankel import Balancing

__all__ = ["Modes"]

_RIDGE = 1e-10  # states that are copies of each other have no unique share in what is lost


# Which states stay longest; found once for all orders that a system is tried with.
_rankings: WeakKeyDictionary[Balancing, Tensor] = WeakKeyDictionary()


@register_balance
class Modes(Real):
    """The system's own states, of which some are kept and stand in for the others.

    With Gramians P and Q of the real form, states are dropped one after another, each time the one
    whose loss costs least of ``tr Q (I - M S) P (I - M S)^T``: S picks the states that are left and
    ``M = P S^T (S P S^T)^-1`` estimates all of them from these. At the end ``C' = C M``; the kept
    rows of Lambda and B stay as they are. What balancing would drop instead has no simple relation
    to it, so that no bound of the error is known; the energy lost is the sum of the singular values
    of ``Q^1/2 (I - M S) P^1/2``.

    Example:
        >>> from lightning_compressm.control import balanced_truncation
        >>> system = DiagonalLTI(torch.tensor([0.9, 0.5, 0.1]), torch.ones(3, 1), torch.ones(1, 3))
        >>> reduction = balanced_truncation(system, 2, balance="modes")
        >>> reduction.system.eigenvalues.real, reduction.bound is None
        (tensor([0.9000, 0.5000], dtype=torch.float64), True)
    """

    name: ClassVar[str] = "modes"
    balances: ClassVar[bool] = False

    def reduced(self, balancing: Balancing, kept: Tensor, order: int) -> ModalForm:
        """Keep ``order`` states.

        Raises:
            ValueError: If it is not the largest balanced states that are asked for.
        """
        if not torch.equal(kept, torch.arange(len(kept), device=kept.device)):
            raise ValueError(
                f"expected selection='largest' for balance={self.name!r}, which makes no choice "
                "among balanced states, got another"
            )
        l_p, l_q = balancing.controllability, balancing.observability
        p = l_p @ l_p.mT
        if balancing not in _rankings:
            _rankings[balancing] = _ranked(p, l_q @ l_q.mT)
        states = _rankings[balancing][:order].sort().values
        estimate = _estimate(p, states)
        lost = l_p - estimate @ l_p[_both(states, len(p))]
        total = balancing.sigma.sum()
        energy = 1 - torch.linalg.svdvals(l_q.mT @ lost).sum() / total
        system, n = balancing.system, balancing.system.order
        complex_rows = torch.complex(estimate[:n], estimate[n:])
        of_real, of_imag = complex_rows.chunk(2, -1)
        picked = torch.eye(n, dtype=torch.complex128, device=p.device)[states]
        basis = ChangeOfBasis(
            left=picked,
            left_conj=torch.zeros_like(picked),
            right=(of_real - 1j * of_imag) / 2,
            right_conj=(of_real + 1j * of_imag) / 2,
        )
        smaller = DiagonalLTI(
            system.eigenvalues[states], system.B[states], basis.outputs(system.C), True
        )
        return ModalForm(smaller, basis, kept, energy.clamp(0, 1))

    def finished(self, form: ModalForm) -> ModalForm:
        """As they are."""
        return form


def _both(states: Tensor, size: int) -> Tensor:
    """Where real and imaginary parts of states are in ``[Re x; Im x]``."""
    return torch.cat([states, states + size // 2])


def _estimate(p: Tensor, states: Tensor) -> Tensor:
    """M: the least squares estimate of all states from some, (2N, 2r)."""
    index = _both(states, len(p))
    correlation, scale = _correlation(p)
    eye = torch.eye(len(index), dtype=p.dtype, device=p.device)
    square = correlation[index][:, index] + _RIDGE * eye
    solved = torch.linalg.solve(square, correlation[index]).mT
    estimate: Tensor = scale.unsqueeze(-1) * solved / scale[index]
    estimate[index] = eye
    return estimate


def _correlation(p: Tensor) -> tuple[Tensor, Tensor]:
    """The Gramian with a unit diagonal, and standard deviations: one where a state never moves."""
    deviation = p.diagonal().clamp(min=0).sqrt()
    scale = torch.where(deviation > 0, deviation, 1.0)
    return p / scale.unsqueeze(-1) / scale, scale


def _ranked(p: Tensor, q: Tensor) -> Tensor:
    """Drop one state after another, the cheapest first; indices, the last to go in front."""
    search, dropped = _Elimination.of(p, q), []
    for _ in range(len(p) // 2):
        dropped.append(int(search.costs().argmin()))
        search.drop(dropped[-1])
    return torch.tensor(dropped[::-1], device=p.device)


@dataclass
class _Elimination:
    """Backward elimination; blocks of two rows belong to real and imaginary part of a state.

    Attributes:
        left: Which states are left, a mask (N,).
        inverse: Of the correlations of what is left, zero elsewhere, (N, 2, N, 2).
        weight: How errors of the states that are left count in what is read of them, by now also
            for those that they stand in for, (N, 2, N, 2).
    """

    left: Tensor
    inverse: Tensor
    weight: Tensor

    @classmethod
    def of(cls, p: Tensor, q: Tensor) -> _Elimination:
        n = len(p) // 2
        correlation, scale = _correlation(p)
        ridge = _RIDGE * torch.eye(len(p), dtype=p.dtype, device=p.device)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(correlation + ridge))
        weight = scale.unsqueeze(-1) * q * scale
        blocks = (m.view(2, n, 2, n).permute(1, 0, 3, 2).clone() for m in (inverse, weight))
        return cls(torch.ones(n, dtype=torch.bool, device=p.device), *blocks)

    def costs(self) -> Tensor:
        """What is lost with each state, (N,)."""
        own = torch.arange(len(self.left), device=self.left.device)
        variance = torch.linalg.inv(self._safe(self.inverse[own, :, own]))
        cost = (variance * self.weight[own, :, own].mT).sum((-2, -1))
        return torch.where(self.left, cost, torch.inf)

    def drop(self, state: int) -> None:
        """Let the others stand in for a state."""
        self.left[state] = False
        along = self.inverse[state].flatten(1)
        variance = torch.linalg.inv(self.inverse[state, :, state])
        estimate = variance @ along
        square = self.weight[state, :, state]
        cross = self.weight[state].flatten(1).mT @ estimate
        change = estimate.mT @ square @ estimate - cross - cross.mT
        self.weight += change.view_as(self.weight)
        self.inverse -= (along.mT @ estimate).view_as(self.inverse)

    def _safe(self, blocks: Tensor) -> Tensor:
        eye = torch.eye(2, dtype=blocks.dtype, device=blocks.device)
        return torch.where(self.left.view(-1, 1, 1), blocks, eye)
