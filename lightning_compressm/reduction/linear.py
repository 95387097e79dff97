"""Linear time-invariant layers: Hankel singular values and balanced truncation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import get_args

import torch

from lightning_compressm._precision import back_to
from lightning_compressm.control import Reduction, per_state_energy
from lightning_compressm.control.hankel import Factors, factorise
from lightning_compressm.control.task_aware import TaskForm, TaskGramians, factorise_task
from lightning_compressm.control.truncation import truncate
from lightning_compressm.errors import CompreSSMError
from lightning_compressm.families import Family
from lightning_compressm.model.layers import SSMLayer
from lightning_compressm.reduction.analysis import Analysis, Cut, Task, analyses
from lightning_compressm.reduction.events import LayerEvent
from lightning_compressm.reduction.failures import LinAlgError, numerics
from lightning_compressm.reduction.order import Order
from lightning_compressm.reduction.policy import HorizonChoice, ReductionPolicy
from lightning_compressm.reduction.processes import Processes
from lightning_compressm.reduction.recorder import Seen

__all__ = ["LinearAnalysis", "analyse_linear"]


@dataclass(frozen=True, eq=False)
class LinearAnalysis(Analysis):
    """A linear layer with its system.

    Attributes:
        family: the layer's family.
        factors: of the Gramians of its system, which spectrum and reductions share.
    """

    family: Family
    factors: Factors = field(repr=False)

    @torch.no_grad()
    def cut(self, order: Order, policy: ReductionPolicy, seed: int) -> Cut:
        """Truncate to the order, or to the next higher one that keeps the promised energy."""
        with numerics():
            reduction = self._reduce_within(order, policy, seed)
        if reduction is None:
            used = {"balance": self.factors.form.name, "horizon": self.factors.horizon}
            return Cut(LayerEvent.skip(self.layer, reason=order.needed(), **used))
        return self._cut(reduction)

    @torch.no_grad()
    def task_cuts(self, order: Order, policy: ReductionPolicy, task: Task) -> list[Cut]:
        """By Gramians of data and gradients, in the forms that there are."""
        if order.wanted > order.most or not isinstance(task, TaskGramians):
            return []
        cuts, used = [], self.factors
        for form in get_args(TaskForm):
            try:
                with numerics():
                    factors = factorise_task(
                        used.system, task, form, balance=used.form.name, horizon=used.horizon
                    )
                    reduction = truncate(factors, order.wanted)
                cuts.append(self._cut(reduction, f"balanced by the task ({form})"))
            except (CompreSSMError, LinAlgError):
                continue  # one candidate less; the cut by the system's own Gramians stays
        return cuts

    def _cut(self, reduction: Reduction, reason: str = "") -> Cut:
        kept, total = _energies(reduction)
        event = LayerEvent.reduce(
            self.layer,
            reduction.order,
            energy_kept=kept / total if total else 1.0,
            # A bank is block-diagonal: its gain is the largest of its systems'.
            error_bound=None if reduction.bound is None else float(reduction.bound.max()),
            balance=reduction.balance,
            horizon=reduction.horizon,
            reason=reason,
        )
        return Cut(event, self.family.reduction_plan(self.layer.module, reduction))

    def _reduce_within(self, order: Order, policy: ReductionPolicy, seed: int) -> Reduction | None:
        """The reduction to the order, or to the next higher one that keeps the promised energy.

        A complex state holds two real ones only if its poles come as a conjugate pair, so a system
        with real poles may need more states than its spectrum says. ``None`` if too few states go.
        """
        promised = 0.0 if policy.tolerance is None else 1 - policy.tolerance
        for candidate in range(order.wanted, order.most + 1, order.step):
            reduction = self._reduce(candidate, policy, seed)
            kept, total = _energies(reduction)
            # A spectrum of another horizon, and the ablations, promise nothing.
            comparable = reduction.horizon == self.factors.horizon and policy.selection == "largest"
            if kept >= (promised - 1e-9) * total or not comparable:
                return reduction
        return None

    def _reduce(self, order: int, policy: ReductionPolicy, seed: int) -> Reduction:
        generator = torch.Generator().manual_seed(seed) if policy.selection == "random" else None
        return truncate(self.factors, order, selection=policy.selection, generator=generator)


@analyses(Family)
@torch.no_grad()
def analyse_linear(
    layer: SSMLayer,
    policy: ReductionPolicy,
    seen: Seen,
    processes: Processes,
    spectrum_only: bool = False,
) -> LinearAnalysis:
    """Read a layer's system and compute its HSVs.

    With ``spectrum_only`` no cut is expected to follow: then the singular vectors are left for
    later, which is faster for the spectrum but slower for both.

    Raises:
        NonFiniteError: if its parameters hold NaN or infinity.
        UnstableSystemError: if an eigenvalue is outside the unit circle, or on it without horizon.
    """
    family = layer.family
    assert isinstance(family, Family)
    system = family.system(layer.module)
    horizon = _resolve_horizon(policy.horizon, seen.lengths.get(layer.name))
    system.check(horizon=horizon)
    balance = family.balance_for(policy.balance, system, trained_on=policy.trained_on)
    with numerics():
        factors = factorise(system, balance, horizon)
        if not spectrum_only and (policy.state_dim or 0) < system.order:
            _ = factors.balancing  # gives the spectrum as well, so that it isn't computed twice
        energy = per_state_energy(back_to(factors.sigma, system.eigenvalues.device), balance)
    return LinearAnalysis(layer, energy, family, factors)


def _resolve_horizon(horizon: HorizonChoice, length: int | None) -> int | None:
    if isinstance(horizon, str):
        return length if length is not None and length > 1 else None
    return horizon


def _energies(reduction: Reduction) -> tuple[float, float]:
    """Hankel energy kept and in all, over all systems of a bank."""
    total = reduction.sigma.sum(-1)
    return float((reduction.energy_kept * total).sum()), float(total.sum())
