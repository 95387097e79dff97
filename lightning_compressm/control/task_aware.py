"""Gramians from data and from gradients of the loss, in a form that keeps truncations stable."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_compressm._rules import one_of
from lightning_compressm.control._factors import Gramian
from lightning_compressm.control._kernel import one_minus_product, unit_gap
from lightning_compressm.control.balance import BalanceForm, form_of
from lightning_compressm.control.gramians import check_horizon
from lightning_compressm.control.hankel import Factors, Source, in_double
from lightning_compressm.control.system import DiagonalLTI
from lightning_compressm.errors import CalibrationError, NonFiniteError

__all__ = ["TaskForm", "TaskGramians", "factorise_task"]

TaskForm = Literal["stable", "blend"]

# The part of the system's own Gramians: what no data reached is still in order, or a fair share.
_SHARES: dict[TaskForm, float] = {"stable": 1e-3, "blend": 0.1}


@dataclass(frozen=True, eq=False)
class TaskGramians:
    """What the task does with a layer's states, summed over the steps of some batches.

    With ``z = [Re x; Im x]`` of the states x that the data excites, and ``s = [Re; Im]`` of the
    adjoint states ``s_k = conj(lambda) s_{k+1} + C^H g_k`` that the gradient g of the loss at the
    layer's output drives.

    Attributes:
        P: Sum of ``z z^T``, ``(..., 2N, 2N)``, float64.
        Q: Sum of ``s s^T``, ``(..., 2N, 2N)``, float64. Its scale is that of the loss, squared.
        steps: Number of steps in the sums, a float64 scalar.

    Example:
        >>> import torch
        >>> one = TaskGramians(torch.eye(2), torch.eye(2), torch.tensor(1.0))
        >>> (one + one).steps
        tensor(2.)
    """

    P: Tensor
    Q: Tensor
    steps: Tensor

    def __add__(self, other: TaskGramians) -> TaskGramians:
        """Those of both parts of the data."""
        return TaskGramians(self.P + other.P, self.Q + other.Q, self.steps + other.steps)

    def summed(self, add_up: Callable[[Tensor], Tensor]) -> TaskGramians:
        """Those of all processes, with ``add_up`` that sums a tensor over them."""
        return TaskGramians(add_up(self.P), add_up(self.Q), add_up(self.steps))

    def check(self, system: DiagonalLTI) -> TaskGramians:
        """Return these Gramians themselves if they are of such a system, and not of nothing.

        Raises:
            ValueError: If their shapes do not fit the system.
            NonFiniteError: If they hold NaN or infinity.
            CalibrationError: If no data excites any state, or no state has a part in the loss.
        """
        size = 2 * system.order
        expected = (*system.batch_shape, size, size)
        if self.P.shape != expected or self.Q.shape != expected:
            raise ValueError(
                f"expected Gramians of the shape {expected} for a system of {system.order} states, "
                f"got {tuple(self.P.shape)} and {tuple(self.Q.shape)}; record them anew after the "
                "layer has been reduced"
            )
        for name, gramian in (("P", self.P), ("Q", self.Q)):
            if not bool(torch.isfinite(gramian).all()):
                raise NonFiniteError(
                    f"expected a finite Gramian {name} of the task, got NaN or infinity; leave out "
                    "batches whose loss or gradient is not finite"
                )
        if not bool((_diagonal(self.P) > 0).any() and (_diagonal(self.Q) > 0).any()):
            raise CalibrationError(
                "expected states that data excites and that the loss depends on, got Gramians of "
                "zero; record a backward pass of the loss through the layer"
            )
        return self


def factorise_task(
    system: DiagonalLTI,
    task: TaskGramians,
    form: TaskForm = "stable",
    *,
    balance: str = "folded",
    horizon: int | None = None,
) -> Factors:
    """Factors that balance what the data excites against what the loss depends on.

    Like :func:`~lightning_compressm.control.hankel.factorise`, with P and Q from data instead of
    white noise, and with a part of the system's own Gramians mixed in.

    - "stable": a thousandth of these. Then P is replaced by one with ``P - A P A^H >= 0``: the
      residual ``W = P - A P A^H`` by its positive part ``W+`` (with states scaled so that W has a
      unit diagonal), and P by the solution of ``P - A P A^H = W+``. Every truncation is stable,
      whatever Q is (see "Task-aware Gramians" in the documentation).
    - "blend": a tenth of these, and P as it is. That is closer to the data, and often better at a
      small order, but poles may land outside the unit circle; they are clamped as those of
      time-limited reductions are.

    The values ``sigma`` are singular values of ``L_Q^H L_P``, for means over steps; no bound of the
    error follows from them.

    Args:
        system: Stable system(s) with N states, as when the Gramians were recorded.
        task: Second moments in the system's own coordinates.
        form: "stable" or "blend".
        balance: As in :func:`~lightning_compressm.control.balanced_truncation`.
        horizon: Number of steps of the Gramians that are mixed in; None for infinitely many.

    Returns:
        The factors, on the system's device (on the CPU for MPS).

    Raises:
        CalibrationError: If a Gramian of the task is zero.
        NonFiniteError: If a parameter or a Gramian is NaN or infinite.
        UnstableSystemError: If an eigenvalue is not inside the unit circle, whatever the horizon.
        ValueError: If an argument is not valid, or a shape does not fit.

    Source:
        Balancing of empirical Gramians: Moore (1981), IEEE Trans. Automatic Control 26(1). The
        positive part is the closest semi-definite matrix: Higham (1988), "Computing a nearest
        symmetric positive semidefinite matrix", theorem 2.1.

    Example:
        >>> import torch
        >>> from lightning_compressm.control.truncation import truncate
        >>> system = DiagonalLTI(torch.tensor([0.9, 0.1]), torch.ones(2, 1), torch.ones(1, 2))
        >>> eye = torch.eye(4, dtype=torch.float64)
        >>> loss = torch.diag(torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=torch.float64))
        >>> factors = factorise_task(system, TaskGramians(eye, loss, torch.tensor(1.0)))
        >>> round(truncate(factors, 1).system.eigenvalues.item().real, 2)
        0.1
    """
    one_of(*get_args(TaskForm)).check("form", form)
    written = form_of(balance)
    written.check(system)
    steps = check_horizon(horizon)
    checked, task = system.each(Tensor.detach).check(), task.check(system)
    compute = partial(_factors, task=task, form=written, horizon=steps, kind=form)
    return in_double(compute, checked)


def _factors(
    system: DiagonalLTI,
    task: TaskGramians,
    form: BalanceForm,
    horizon: int | None,
    kind: TaskForm,
) -> Factors:
    own = form.gramians(form.written(system), horizon)
    seen = (form.of_moments(system, (m / task.steps).to(system.B.device)) for m in (task.P, task.Q))
    p, q = (_mixed(form, *pair, _SHARES[kind]) for pair in zip(seen, own, strict=True))
    if kind == "stable":
        p = _from_modes(form, _dissipative(_poles(form, system), _to_modes(form, p)))
    if not all(bool(torch.isfinite(g).all()) for g in (p, q)):
        raise NonFiniteError(
            "expected finite Gramians, got NaN or infinity although parameters and data are "
            "finite; B or C overflows double precision: rescale the layer"
        )
    source: Source = "stable" if kind == "stable" else "data"
    return Factors(system, form, horizon, Gramian.of(p).factor(), Gramian.of(q).factor(), source)


def _mixed(form: BalanceForm, seen: Tensor, own: Tensor, share: float) -> Tensor:
    """The task's Gramian with a share of the system's own, and as large as it on the mean.

    The size of the loss and of the data must not reach the reduced B and C: a balanced B shrinks
    where C grows, and an optimizer whose steps have one size would then move B far and C hardly.
    """
    energy, scale = _energy(form, seen), _energy(form, own)
    ratio = torch.where(scale > 0, energy / scale, 0).mean(-1)
    # A channel without a signal in these batches may have one in others.
    least = torch.where(ratio > 0, ratio, torch.inf).amin()
    ratio = torch.where(ratio > 0, ratio, least)[..., None, None]
    mixed: Tensor = (1 - share) / ratio * seen + share * own
    return mixed


def _energy(form: BalanceForm, gramian: Tensor) -> Tensor:
    """What a Gramian says of each complex state, (..., N)."""
    diagonal = _diagonal(gramian)
    return diagonal.view(*diagonal.shape[:-1], form.states_each, -1).sum(-2)


def _diagonal(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1).real


def _dissipative(poles: Tensor, gramian: Tensor) -> Tensor:
    """The solution of ``P - A P A^H = W+``, for a diagonal A."""
    # Entry by entry the residual is a product, so that nothing cancels near the unit circle.
    factor = one_minus_product(poles, poles, unit_gap(poles))
    residual = gramian * factor
    scale = _diagonal(residual).clamp(min=0).sqrt()
    inverse = torch.where(scale > 0, 1 / scale, 0)
    residual = residual * inverse.unsqueeze(-1) * inverse.unsqueeze(-2)
    values, vectors = torch.linalg.eigh((residual + residual.mH) / 2)
    positive = (vectors * values.clamp(min=0).unsqueeze(-2)) @ vectors.mH
    solved = positive * scale.unsqueeze(-1) * scale.unsqueeze(-2) / factor
    hermitian: Tensor = (solved + solved.mH) / 2
    return hermitian


def _poles(form: BalanceForm, system: DiagonalLTI) -> Tensor:
    """Eigenvalues in the coordinates in which the state matrix is diagonal."""
    poles = form.written(system).eigenvalues
    return poles if form.states_each == 1 else torch.cat([poles, poles.conj()], -1)


def _to_modes(form: BalanceForm, gramian: Tensor) -> Tensor:
    """From ``[Re x; Im x]`` to ``[x; conj x] / sqrt(2)``, a unitary map."""
    if form.states_each == 1:
        return gramian
    turn = _turn(gramian)
    return turn @ gramian.to(turn.dtype) @ turn.mH


def _from_modes(form: BalanceForm, gramian: Tensor) -> Tensor:
    if form.states_each == 1:
        return gramian
    turn = _turn(gramian)
    real: Tensor = (turn.mH @ gramian @ turn).real
    return real


def _turn(gramian: Tensor) -> Tensor:
    eye = torch.eye(gramian.shape[-1] // 2, dtype=torch.complex128, device=gramian.device)
    rows = torch.cat([eye, 1j * eye], 1), torch.cat([eye, -1j * eye], 1)
    turn: Tensor = torch.cat(rows) * 0.5**0.5
    return turn
