"""Balanced truncation to a given order, with the maps between old and new states."""

from __future__ import annotations

import operator
from dataclasses import dataclass, fields, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_compressm._precision import back_to
from lightning_compressm.control import _modal
from lightning_compressm.control.gramians import impulse_energy
from lightning_compressm.control.hankel import (
    NEGLIGIBLE,
    Balance,
    Balancing,
    Factors,
    factorise,
)
from lightning_compressm.control.system import DiagonalLTI
from lightning_compressm.errors import UnstableSystemError

__all__ = ["Reduction", "Selection", "balanced_truncation", "truncate"]

Selection = Literal["largest", "smallest", "random"]
_ROUNDING = 1e-8  # how far outside the unit circle a pole may land by rounding alone


@dataclass(frozen=True, eq=False)
class Reduction:
    """A reduced system and how its states relate to the original ones.

    The maps are widely linear: ``x' = left @ x + left_conj @ conj(x)`` and ``x ~ right @ x' +
    right_conj @ conj(x')``. The conjugate parts are zero for ``balance="complex"``, mark conjugated
    states for "folded", and belong to the real form for "real". Then ``B' = left @ B + left_conj @
    conj(B)`` and ``C' = C @ right + conj(C) @ conj(right_conj)``. The state of a real pole of the
    real form stays real. Rows and columns of padded states (the last ``order - rank``) are zero.

    Attributes:
        system: Reduced system of ``order`` states, complex128.
        left: Shape ``(..., r, N)``, complex128.
        left_conj: Shape ``(..., r, N)``, complex128.
        right: Shape ``(..., N, r)``, complex128.
        right_conj: Shape ``(..., N, r)``, complex128.
        sigma: All Hankel singular values, ``(..., 2N)`` for "real", else ``(..., N)``, float64.
        bound: Upper bound ``2 * sum(discarded sigma)`` of the H-infinity error, shape ``(...)``;
            None where no theorem holds (time-limited, or not the largest states kept).
        energy_kept: Share of the sum of sigma that was kept, shape ``(...)``, in [0, 1].
        rank: Number of states that are not padding, shape ``(...)``, int64.
        fell_back: Systems whose time-limited reduction was unstable and worse than the infinite one
            that replaces it, shape ``(...)``, bool.
        horizon: As used: None also if every system fell back.
        balance: As used.
        selection: As used.

    Example:
        >>> import torch
        >>> system = DiagonalLTI(torch.tensor([0.9, 0.1]), torch.ones(2, 1), torch.ones(1, 2))
        >>> reduction = balanced_truncation(system, 1)
        >>> reduction.system.order, reduction.left.shape, reduction.right.shape
        (1, torch.Size([1, 2]), torch.Size([2, 1]))
    """

    system: DiagonalLTI
    left: Tensor
    left_conj: Tensor
    right: Tensor
    right_conj: Tensor
    sigma: Tensor
    bound: Tensor | None
    energy_kept: Tensor
    rank: Tensor
    fell_back: Tensor
    horizon: int | None
    balance: Balance
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
    above that of the infinite-horizon reduction.

    Args:
        system: Stable system(s) with N states; leading dimensions are independent systems.
        order: Number of states to keep, 1 to N.
        balance: "real", "folded" or "complex", as in
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

    Example:
        >>> system = DiagonalLTI(torch.tensor([0.9, 0.1]), torch.ones(2, 1), torch.ones(1, 2))
        >>> factors = factorise(system, "real", None)
        >>> truncate(factors, 1).order, factors.sigma.shape
        (1, torch.Size([4]))
    """
    if selection not in get_args(Selection):
        raise ValueError(f"expected selection 'largest', 'smallest' or 'random', got {selection!r}")
    order = _check_order(order, factors.system.order)
    job = _Job(order, factors.balance, factors.horizon, selection, generator)
    return _truncate(factors, job)


@dataclass(frozen=True)
class _Job:
    order: int
    balance: Balance
    horizon: int | None
    selection: Selection
    generator: torch.Generator | None


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
    moved: dict[str, Tensor] = {}
    for field in fields(Reduction):
        value = getattr(reduction, field.name)
        if isinstance(value, Tensor):
            moved[field.name] = back_to(value, device)
    system = reduction.system.each(lambda tensor: back_to(tensor, device))
    return replace(reduction, system=system, **moved)  # type: ignore[arg-type]


def _truncate(factors: Factors, job: _Job) -> Reduction:
    balancing = factors.balancing
    flat, sigma = balancing.system, balancing.sigma.clone()
    forms, unstable = _reduce_all(balancing, job)
    fell_back = torch.zeros(len(forms), dtype=torch.bool, device=sigma.device)
    if unstable:
        fell_back[unstable] = _replace_worse(flat, forms, sigma, unstable, job)
    horizon = None if bool(fell_back.all()) else job.horizon
    batch = factors.system.batch_shape
    return _assemble(flat, forms, sigma, fell_back, replace(job, horizon=horizon), batch)


def _reduce_all(balancing: Balancing, job: _Job) -> tuple[list[_modal.ModalForm], list[int]]:
    """Reduce every system; also name those whose poles had to be clamped."""
    forms, unstable = [], []
    for index in range(len(balancing.sigma)):
        form, clamped = _reduce(balancing.single(index), job)
        forms.append(form)
        if clamped:
            unstable.append(index)
    return forms, unstable


def _reduce(balancing: Balancing, job: _Job) -> tuple[_modal.ModalForm, bool]:
    system = balancing.system
    if job.order == system.order:
        return _modal.identity(system, job.balance), False
    form = _modal.modal_form(balancing, _select(balancing.sigma, job), job.order).canonical()
    form, clamped = _stabilised(form, system, job.horizon)
    form = form.padded(job.order, system)
    return (form if job.balance == "complex" else form.upper()), clamped


def _select(sigma: Tensor, job: _Job) -> Tensor:
    """Indices of the balanced states to keep, the first to drop last."""
    alive = int((sigma > NEGLIGIBLE * sigma[0]).sum())
    count = min(job.order * (2 if job.balance == "real" else 1), alive)
    if job.selection == "largest":
        return torch.arange(count, device=sigma.device)
    if job.selection == "smallest":
        return torch.arange(alive - count, alive, device=sigma.device).flip(0)
    where = "cpu" if job.generator is None else job.generator.device
    shuffled = torch.randperm(alive, generator=job.generator, device=where)
    return shuffled[:count].to(sigma.device)


def _stabilised(
    form: _modal.ModalForm, system: DiagonalLTI, horizon: int | None
) -> tuple[_modal.ModalForm, bool]:
    """Clamp radii; tell whether that was more than rounding."""
    radius, limit = form.eigenvalues.abs(), system.eigenvalues.abs().max()
    # A pole ten times closer to the circle than any before would not survive single precision.
    allowed = 1.0 if horizon is None else float(1 - (1 - limit) / 10)
    outside = radius >= allowed
    if not bool(outside.any()):
        return form, False
    largest = float(radius.max())
    if horizon is None and largest > 1 + _ROUNDING:
        raise UnstableSystemError(
            f"expected a stable reduced system, got a pole of modulus {largest:.9g} at order "
            f"{form.rank}; keep the layer, or choose another order"
        )
    scale = torch.where(outside, limit / radius, 1)
    return replace(form, eigenvalues=form.eigenvalues * scale), horizon is not None


def _replace_worse(
    system: DiagonalLTI,
    forms: list[_modal.ModalForm],
    sigma: Tensor,
    unstable: list[int],
    job: _Job,
) -> Tensor:
    """Put the infinite-horizon reduction in place of clamped ones that are worse."""
    assert job.horizon is not None
    chosen = system.each(lambda tensor: tensor[unstable])
    balancing = Factors.of(chosen, job.balance, None).balancing
    others, _ = _reduce_all(balancing, replace(job, horizon=None))
    worse = []
    for row, index in enumerate(unstable):
        single = balancing.single(row).system
        clamped = _output_error(single, forms[index], job.horizon)
        worse.append(_output_error(single, others[row], job.horizon) < clamped)
        if worse[-1]:
            forms[index], sigma[index] = others[row], balancing.sigma[row]
    return torch.tensor(worse, device=sigma.device)


def _output_error(system: DiagonalLTI, form: _modal.ModalForm, horizon: int) -> float:
    """Squared energy of the impulse response's error over the horizon."""
    error = DiagonalLTI(
        torch.cat([system.eigenvalues, form.eigenvalues]),
        torch.cat([system.B, form.B]),
        torch.cat([system.C, -form.C], -1),
        system.real_output,
    )
    return float(impulse_energy(error, horizon=horizon))


def _assemble(
    system: DiagonalLTI,
    forms: list[_modal.ModalForm],
    sigma: Tensor,
    fell_back: Tensor,
    job: _Job,
    batch: torch.Size,
) -> Reduction:
    def gather(name: str) -> Tensor:
        parts = torch.stack([getattr(form, name) for form in forms])
        return parts.reshape(*batch, *parts.shape[1:])

    mask = torch.zeros_like(sigma, dtype=torch.bool)
    for row, form in zip(mask, forms, strict=True):
        row[form.kept] = True
    kept, lost = (sigma * mask).sum(-1), (sigma * ~mask).sum(-1)
    total = kept + lost
    energy = torch.where(total > 0, kept / total, 1.0)
    certain = job.horizon is None and job.selection == "largest"
    return Reduction(
        system=DiagonalLTI(gather("eigenvalues"), gather("B"), gather("C"), system.real_output),
        left=gather("left"),
        left_conj=gather("left_conj"),
        right=gather("right"),
        right_conj=gather("right_conj"),
        sigma=sigma.reshape(*batch, -1),
        bound=(2 * lost).reshape(batch) if certain else None,
        energy_kept=energy.reshape(batch),
        rank=torch.tensor([form.rank for form in forms], device=sigma.device).reshape(batch),
        fell_back=fell_back.reshape(batch),
        horizon=job.horizon,
        balance=job.balance,
        selection=job.selection,
    )
