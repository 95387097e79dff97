"""Selective layers: which states to keep, the refit that makes up for the rest, and its check."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property, reduce
from itertools import zip_longest

import torch
from torch import Tensor, nn

from lightning_compressm.control.calibration import (
    SelectiveSignals,
    SelectiveStatistics,
    averaged_spectrum,
)
from lightning_compressm.control.criteria import rank_states
from lightning_compressm.control.readout import refit_readout
from lightning_compressm.errors import CalibrationError
from lightning_compressm.families import SelectiveFamily
from lightning_compressm.families._base import tensor_of
from lightning_compressm.families._selective import READOUT, SHIFT
from lightning_compressm.model.layers import SSMLayer
from lightning_compressm.reduction.analysis import Analysis, Cut, Task, analyses
from lightning_compressm.reduction.events import LayerEvent
from lightning_compressm.reduction.failures import numerics
from lightning_compressm.reduction.order import Order
from lightning_compressm.reduction.output_fit import fit_output, output_error
from lightning_compressm.reduction.output_weights import OutputWeights
from lightning_compressm.reduction.policy import ReductionPolicy
from lightning_compressm.reduction.processes import Processes
from lightning_compressm.reduction.recorder import Seen
from lightning_compressm.surgery.apply import apply_plan
from lightning_compressm.surgery.plan import SurgeryPlan, TensorEdit

__all__ = ["SelectiveAnalysis", "analyse_selective"]

AUTO_CRITERION = "greedy"
MAX_TOKENS = 16384  # steps of calibration data that a layer is analysed on, for each batch
_RETRIES = 3


@dataclass(frozen=True, eq=False)
class SelectiveAnalysis(Analysis):
    """A selective layer with the statistics of its calibration data.

    Attributes:
        family: the layer's family.
        statistics: summed over all processes.
        inputs: the layer's inputs on this process.
        original: a copy of the layer for evaluation, in single precision at least.
        processes: those that hold other parts of the data.
        weights: factors of the outputs' errors, (batch, L) for each input; all alike if empty.
    """

    family: SelectiveFamily
    statistics: SelectiveStatistics = field(repr=False)
    inputs: Sequence[Tensor] = field(repr=False)
    original: nn.Module = field(repr=False)
    processes: Processes = field(repr=False)
    weights: Sequence[Tensor] = field(default=(), repr=False)

    @cached_property
    def wanted(self) -> list[Tensor]:
        """The original layer's outputs, which every cut and every step of a refit aim at."""
        with torch.no_grad():
            return [self.family.run(self.original, inputs) for inputs in self.inputs]

    def cut(self, order: Order, policy: ReductionPolicy, seed: int) -> Cut:
        """Cut to the order, or to more states where the layer's output would change too much."""
        criterion = _resolve_criterion(policy)
        limit = float("inf") if policy.max_output_error is None else policy.max_output_error
        reason = order.needed()
        ranking = self._rank(criterion, seed) if order.wanted <= order.most else None
        for tried in _tries(order):
            assert ranking is not None
            plan, error = self._selected(ranking[:, :tried].sort(dim=-1).values, policy)
            if error <= limit:
                note = f"{order.wanted} states change the output by more than {limit:.0%}"
                event = self._event(tried, error, criterion, note if tried != order.wanted else "")
                return Cut(event, plan)
            reason = (
                f"even with {tried} states the output changes by {error:.0%}, more than "
                f"max_output_error = {limit:.0%}"
            )
        return Cut(LayerEvent.skip(self.layer, reason=reason, balance=criterion))

    def task_cuts(self, order: Order, policy: ReductionPolicy, task: Task) -> list[Cut]:
        """With each output's error weighted by what the loss asks of it."""
        if order.wanted > order.most or not isinstance(task, OutputWeights):
            return []
        dtype = next(self.original.parameters()).dtype
        inputs = [_capped(x).to(dtype) for x in task.inputs]
        factors = task.relative(self.processes.add_up)
        weights = [w[: len(x)] for w, x in zip(factors, inputs, strict=True)]
        statistics = _statistics(self.family, self.original, inputs, weights)
        statistics = statistics.summed(lambda _, total: self.processes.add_up(total))
        weighted = replace(self, statistics=statistics, inputs=inputs, weights=weights)
        criterion = _resolve_criterion(policy)
        keep, usual = (
            each._rank(criterion, 0)[:, : order.wanted].sort(dim=-1).values
            for each in (weighted, self)
        )
        if self.family.refit == "local" and torch.equal(keep, usual):
            return []  # a local refit goes by the output as it is: it would be the same cut
        plan, error = weighted._selected(keep, policy)
        limit = float("inf") if policy.max_output_error is None else policy.max_output_error
        if error > limit:
            return []
        return [Cut(self._event(order.wanted, error, criterion, "weighted by the loss"), plan)]

    def _event(self, order: int, error: float, criterion: str, note: str) -> LayerEvent:
        total = float(self.sigma.sum())
        return LayerEvent.reduce(
            self.layer,
            order,
            energy_kept=float(self.sigma[:order].sum()) / total if total else 1.0,
            output_error=error,
            reason=note,
            balance=criterion,
        )

    def _rank(self, criterion: str, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        with numerics():
            ranking = rank_states(self.statistics, criterion, generator)
        return self.processes.agree(ranking.cpu())

    def _selected(self, keep: Tensor, policy: ReductionPolicy) -> tuple[SurgeryPlan, float]:
        """The plan that keeps some states, and the error of the layer's output afterwards."""
        plan = self.family.selection_plan(self.layer.module, keep)
        refit = self.family.refit if policy.refit else None
        if refit == "readout":
            plan = self._with_readout(plan, keep)
        reduced = deepcopy(self.original)
        apply_plan(reduced, plan)
        error = output_error(self._runs(reduced), self.processes)
        if refit == "local" and error > 0:
            names = self.family.local_tensors(self.layer.module)
            fitted = {name: tensor_of(reduced, name) for name in names}
            error = fit_output(list(fitted.values()), lambda: self._runs(reduced), self.processes)
            values = {name: tensor.detach() for name, tensor in fitted.items()}
            shifts = {SHIFT + n: v - plan.edits[n].value.to(v) for n, v in values.items()}
            plan = _with_values(plan, values, shifts)
        return plan, self.processes.agree(error)

    def _with_readout(self, plan: SurgeryPlan, keep: Tensor) -> SurgeryPlan:
        batches = list(_signals(self.family, self.original, self.inputs, self.weights))
        with numerics():
            delta = refit_readout(batches, keep, add_up=self.processes.add_up)
        with torch.no_grad():
            values = self.family.write_readout(self.layer.module, keep, delta)
        return _with_values(plan, values, {READOUT: delta})

    def _runs(self, reduced: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        """Outputs of the reduced layer and of the original one, batch by batch."""
        for inputs, wanted in zip(self.inputs, self.wanted, strict=True):
            yield self.family.run(reduced, inputs), wanted


@analyses(SelectiveFamily)
@torch.no_grad()
def analyse_selective(
    layer: SSMLayer,
    policy: ReductionPolicy,
    seen: Seen,
    processes: Processes,
    spectrum_only: bool = False,
) -> SelectiveAnalysis:
    """Compute a layer's statistics on its calibration data, and its averaged spectrum.

    Raises:
        CalibrationError: if there is no calibration data.
        NonFiniteError: if parameters or data hold NaN or infinity.
    """
    family = layer.family
    assert isinstance(family, SelectiveFamily)
    family.check_finite(layer.module)
    if not seen.inputs.get(layer.name):
        raise CalibrationError(
            "expected calibration data, got none: what a selective layer's states are worth "
            "depends on its input. Give `sample`, a batch for the model; under a Trainer, the "
            "layer must be called in training_step with whole sequences."
        )
    original = _for_evaluation(layer.module)
    dtype = next(original.parameters()).dtype
    inputs = [_capped(x).to(dtype) for x in seen.inputs[layer.name]]
    statistics = _statistics(family, original, inputs)
    statistics = statistics.summed(lambda _, total: processes.add_up(total))
    with numerics():
        sigma = averaged_spectrum(statistics).sum(0).sort(descending=True).values
    return SelectiveAnalysis(layer, sigma, family, statistics, inputs, original, processes)


def _statistics(
    family: SelectiveFamily,
    module: nn.Module,
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor] = (),
) -> SelectiveStatistics:
    parts = []
    for signals in _signals(family, module, inputs, weights):
        with numerics():
            parts.append(SelectiveStatistics.of([signals]))
    return reduce(SelectiveStatistics.combined, parts)


def _signals(
    family: SelectiveFamily,
    module: nn.Module,
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor] = (),
) -> Iterator[SelectiveSignals]:
    with torch.no_grad():
        for batch, factors in zip_longest(inputs, weights):
            signals = family.signals(module, batch)
            if factors is not None:
                scale = factors[:, :, None, None].to(signals.weight)
                signals = replace(signals, weight=signals.weight * scale)
            yield signals


def _for_evaluation(module: nn.Module) -> nn.Module:
    """A frozen copy; half precision is too coarse to compare and to fit outputs."""
    copy = deepcopy(module).eval().requires_grad_(False)
    half = any(p.dtype in (torch.float16, torch.bfloat16) for p in copy.parameters())
    return copy.float() if half else copy


def _capped(inputs: Tensor) -> Tensor:
    return inputs[: max(1, MAX_TOKENS // inputs.shape[1])]


def _with_values(
    plan: SurgeryPlan, values: dict[str, Tensor], projection: dict[str, Tensor]
) -> SurgeryPlan:
    """A refit's values, and what copies of the layer need to be refitted alike."""
    edits = dict(plan.edits)
    for name, value in values.items():
        edits[name] = TensorEdit(value, edits[name].moments) if name in edits else TensorEdit(value)
    return SurgeryPlan(edits, plan.attributes, {"": {**plan.projections[""], **projection}})


def _tries(order: Order) -> Iterator[int]:
    """The order asked for, then ever closer to the largest one that is worth while."""
    tried, most, step = order.wanted, order.most, order.step
    if tried <= most:
        yield tried
    most = most // step * step
    for _ in range(_RETRIES):
        halfway = -(-(tried + most) // 2)
        halfway = min(most, -(-halfway // step) * step)
        if halfway <= tried:
            return
        tried = halfway
        yield tried


def _resolve_criterion(policy: ReductionPolicy) -> str:
    if policy.selection != "largest":
        return policy.selection
    return AUTO_CRITERION if policy.criterion == "auto" else policy.criterion
