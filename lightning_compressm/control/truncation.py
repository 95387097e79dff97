"""Balanced truncation to a given order, with the maps between old and new states."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_compressm._precision import back_to
from lightning_compressm._rules import one_of
from lightning_compressm.control._modal import ModalForm, all_states, no_states, spare_states
from lightning_compressm.control._stable import is_inside, output_error, stabilised
from lightning_compressm.control.balance import Balance, BalanceForm
from lightning_compressm.control.basis import ChangeOfBasis
from lightning_compressm.control.hankel import NEGLIGIBLE, Balancing, Factors, Source, factorise
from lightning_compressm.control.system import DiagonalLTI
from lightning_compressm.errors import NonFiniteError

__all__ = ["Reduction", "Selection", "balanced_truncation", "truncate"]

Selection = Literal["largest", "smallest", "random"]


@dataclass(frozen=True, eq=False)
class Reduction:
    """A reduced system and how its states relate to the original ones.

    With ``basis``, ``B' = basis.inputs(B)`` and ``C' = basis.outputs(C)`` but for padded states,
    whose rows and columns are zero there. Its conjugate parts are zero for ``balance="complex"``,
    mark conjugated states for "folded", and belong to the real form for "real". The state of a real
    pole of the real form stays real.

    Attributes:
        system: Reduced system of ``order`` states, complex128.
        basis: The maps between the N original states and those of ``system``, complex128.
        sigma: All Hankel singular values, ``(..., 2N)`` for "real", else ``(..., N)``, float64.
        bound: Upper bound ``2 * sum(discarded sigma)`` of the H-infinity error, shape ``(...)``;
            None where no theorem holds (time-limited, from data, not the largest states kept, or
            "modes").
        energy_kept: Share of the sum of sigma that was kept, shape ``(...)``, in [0, 1].
        horizon: As used: None also where the infinite-horizon reduction, being better and stable,
            replaced the time-limited one of every system.
        balance: As used.
        selection: As used.

    Example:
        >>> import torch
        >>> system = DiagonalLTI(torch.tensor([0.9, 0.1]), torch.ones(2, 1), torch.ones(1, 2))
        >>> reduction = balanced_truncation(system, 1)
        >>> reduction.system.order, reduction.basis.left.shape, reduction.basis.right.shape
        (1, torch.Size([1, 2]), torch.Size([2, 1]))
    """

    system: DiagonalLTI
    basis: ChangeOfBasis
    sigma: Tensor
    bound: Tensor | None
    energy_kept: Tensor
    horizon: int | None
    balance: str
    selection: Selection

    @property
    def order(self) -> int:
        """Number of states r of the reduced system."""
        return self.system.order


def balanced_truncation(
    system: DiagonalLTI,
    order: int,
    *,
    balance: Balance = "real",
    horizon: int | None = None,
    selection: Selection = "largest",
    generator: torch.Generator | None = None,
) -> Reduction:
    """Reduce a system to ``order`` states by square-root balanced truncation, in diagonal form.

    The states with the largest Hankel singular values are kept (Moore, 1981; square-root form by
    Tombs and Postlethwaite, 1987) and the reduced state matrix is diagonalised. The result always
    has exactly ``order`` states: where fewer exist numerically, the rest has ``C = 0``, so that it
    changes nothing but can be trained. ``order = N`` returns the system's own states, exactly.

    A time-limited reduction (Gawronski and Juang, 1990) may be unstable. Its radii are then clamped
    to the largest original one, and it is kept only where its output error over the horizon is not
    above that of the infinite-horizon reduction, if there is one: not with poles on the circle.

    Args:
        system: Stable system(s) with N states; leading dimensions are independent systems.
        order: Number of states to keep, 1 to N.
        balance: "real", "folded", "complex" or "modes", as in
            :func:`~lightning_compressm.control.hankel_singular_values`. "real" keeps up to
            ``2 * order`` states of the real form, fewer where real poles take a state each.
        horizon: Number of steps of time-limited Gramians; None for infinite ones.
        selection: "largest"; or, as ablations, "smallest" or "random" among the balanced states.
        generator: Source of randomness for "random".

    Returns:
        The reduction; complex128 on the system's device (on the CPU for MPS).

    Raises:
        NonFiniteError: If a parameter or a result is NaN or infinite.
        UnstableSystemError: If the system is unstable, or the infinite-horizon result is.
        IllConditionedError: If the reduced system can't be diagonalised safely.
        ValueError: If an argument is out of range.

    Example:
        >>> import torch
        >>> system = DiagonalLTI(
        ...     torch.tensor([0.9 + 0.1j, 0.1 + 0.1j]), torch.ones(2, 1), torch.ones(1, 2)
        ... )
        >>> reduction = balanced_truncation(system, 1)
        >>> reduction.order, bool(reduction.energy_kept > 0.5)
        (1, True)
        >>> error = system.frequency_response(torch.linspace(0, 3, 50))
        >>> error = error - reduction.system.frequency_response(torch.linspace(0, 3, 50))
        >>> bool(error.abs().max() <= reduction.bound)
        True
    """
    _check_order(order, system.order)
    factors = factorise(system, balance, horizon)
    reduction = truncate(factors, order, selection=selection, generator=generator)
    return _moved(reduction, system.eigenvalues.device)


def truncate(
    factors: Factors,
    order: int,
    *,
    selection: Selection = "largest",
    generator: torch.Generator | None = None,
) -> Reduction:
    """Like :func:`balanced_truncation`, from factors that are there already, on their device.

    Args:
        factors: Of the system's Gramians, as :func:`factorise` gives them.
        order: Number of states to keep, 1 to N.
        selection: As in :func:`balanced_truncation`.
        generator: Source of randomness for "random".

    Returns:
        The reduction; the factors may be used again for another order.

    Raises:
        As :func:`balanced_truncation`.
    """
    one_of(*get_args(Selection)).check("selection", selection)
    order = _check_order(order, factors.system.order)
    job = _Job(order, factors.form, factors.horizon, selection, generator, factors.source)
    return _truncate(factors, job)


@dataclass(frozen=True)
class _Job:
    order: int
    form: BalanceForm
    horizon: int | None
    selection: Selection
    generator: torch.Generator | None
    source: Source

    @property
    def exact(self) -> bool:
        return self.source == "system" and self.horizon is None


def _check_order(order: int, n: int) -> int:
    try:
        wanted = operator.index(order)
    except TypeError:
        wanted = 0
    if isinstance(order, bool) or not 1 <= wanted <= n:
        raise ValueError(
            f"expected an integer order between 1 and the system's {n} states, got {order!r}"
        )
    return wanted


def _moved(reduction: Reduction, device: torch.device) -> Reduction:
    def move(tensor: Tensor) -> Tensor:
        return back_to(tensor, device)

    return replace(
        reduction,
        system=reduction.system.each(move),
        basis=reduction.basis.each(move),
        sigma=move(reduction.sigma),
        bound=None if reduction.bound is None else move(reduction.bound),
        energy_kept=move(reduction.energy_kept),
    )


def _truncate(factors: Factors, job: _Job) -> Reduction:
    balancing = factors.balancing
    sigma = balancing.sigma.clone()
    forms, unstable = _reduce_all(balancing, job)
    if unstable and _replace_worse(balancing.system, forms, sigma, unstable, job) == len(forms):
        job = replace(job, horizon=None)
    return _assemble(forms, sigma, job, factors.system.batch_shape)


def _reduce_all(balancing: Balancing, job: _Job) -> tuple[list[ModalForm], list[int]]:
    """Reduce every system; also name those with clamped poles, if there is another reduction."""
    forms, unstable = [], []
    for index, single in enumerate(balancing.singles):
        form, clamped = _reduce(single, job)
        forms.append(form)
        if clamped and job.source == "system" and is_inside(balancing.system, index):
            unstable.append(index)
    return forms, unstable


def _reduce(balancing: Balancing, job: _Job) -> tuple[ModalForm, bool]:
    system = balancing.system
    if job.order == system.order:
        kept = torch.arange(len(balancing.sigma), device=system.B.device)
        return job.form.finished(all_states(system, kept)), False
    kept = _select(balancing.sigma, job)
    if len(kept) == 0:
        form, clamped = no_states(system, kept, job.order), False
    else:
        modes = _modes(balancing, kept, job.order)
        form, clamped = stabilised(modes, system, promised=job.exact or job.source == "stable")
        missing = job.order - form.system.order
        form = form.joined(spare_states(system, missing)) if missing else form
    return job.form.finished(form), clamped


def _modes(balancing: Balancing, kept: Tensor, order: int) -> ModalForm:
    """Truncate one balanced system to the states ``kept`` and diagonalise it again."""
    form = balancing.form.reduced(balancing, kept, order)
    s, basis = form.system, form.basis
    parts = (s.eigenvalues, s.B, s.C, basis.left, basis.left_conj, basis.right)
    if not all(bool(torch.isfinite(part).all()) for part in parts):
        raise NonFiniteError(
            f"expected finite matrices, got NaN or infinity in the reduction to order {order}; "
            "keep the layer as it is, or ask for fewer states"
        )
    return form


def _select(sigma: Tensor, job: _Job) -> Tensor:
    """Indices of the balanced states to keep, the first to drop last."""
    alive = int((sigma > NEGLIGIBLE * sigma[0]).sum())
    count = min(job.order * job.form.states_each, alive)
    if job.selection == "largest":
        return torch.arange(count, device=sigma.device)
    if job.selection == "smallest":
        return torch.arange(alive - count, alive, device=sigma.device).flip(0)
    where = "cpu" if job.generator is None else job.generator.device
    shuffled = torch.randperm(alive, generator=job.generator, device=where)
    return shuffled[:count].to(sigma.device)


def _replace_worse(
    system: DiagonalLTI, forms: list[ModalForm], sigma: Tensor, unstable: list[int], job: _Job
) -> int:
    """Put the infinite-horizon reduction in place of clamped ones that are worse; count them."""
    assert job.horizon is not None
    chosen = system.each(lambda tensor: tensor[unstable])
    balancing = Factors.of(chosen, job.form, None).balancing
    others, _ = _reduce_all(balancing, replace(job, horizon=None))
    replaced = 0
    for row, index in enumerate(unstable):
        single = balancing.singles[row].system
        clamped = output_error(single, forms[index].system, job.horizon)
        if output_error(single, others[row].system, job.horizon) < clamped:
            forms[index], sigma[index] = others[row], balancing.sigma[row]
            replaced += 1
    return replaced


def _assemble(forms: Sequence[ModalForm], sigma: Tensor, job: _Job, batch: torch.Size) -> Reduction:
    def unflattened(tensor: Tensor) -> Tensor:
        return tensor.reshape((*batch, *tensor.shape[1:]))

    mask = torch.zeros_like(sigma, dtype=torch.bool)
    for row, form in zip(mask, forms, strict=True):
        row[form.kept] = True
    kept, lost = (sigma * mask).sum(-1), (sigma * ~mask).sum(-1)
    total = kept + lost
    energy = torch.where(total > 0, kept / total, 1.0)
    for row, form in enumerate(forms):
        energy[row] = energy[row] if form.energy is None else form.energy
    certain = job.exact and job.selection == "largest" and job.form.balances
    return Reduction(
        system=DiagonalLTI.stack([form.system for form in forms]).each(unflattened),
        basis=ChangeOfBasis.stack([form.basis for form in forms]).each(unflattened),
        sigma=unflattened(sigma),
        bound=unflattened(2 * lost) if certain else None,
        energy_kept=unflattened(energy),
        horizon=job.horizon,
        balance=job.form.name,
        selection=job.selection,
    )
