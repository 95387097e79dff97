"""Decide which states of which layers go; nothing is changed here."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor, nn

from lightning_compressm._precision import back_to
from lightning_compressm.errors import (
    CompreSSMError,
    IllConditionedError,
    NonFiniteError,
    UnstableSystemError,
    about,
)
from lightning_compressm.model.layers import SSMLayer
from lightning_compressm.reduction import linear, selective  # noqa: F401 (the kinds of layers)
from lightning_compressm.reduction.analysis import Analysis, Cut, analyse
from lightning_compressm.reduction.decision import Decision, Twins
from lightning_compressm.reduction.events import LayerEvent
from lightning_compressm.reduction.order import Order, choose_orders, level_orders, smaller_cut
from lightning_compressm.reduction.policy import ReductionPolicy
from lightning_compressm.reduction.processes import Outcome, Processes
from lightning_compressm.reduction.recorder import Seen
from lightning_compressm.reduction.trial import Trial, affordable

__all__ = ["decide", "measure_spectra"]

Layers = Mapping[str, SSMLayer]


def decide(
    model: nn.Module,
    layers: Layers,
    policy: ReductionPolicy,
    seen: Seen | None = None,
    processes: Processes | None = None,
    *,
    seed: int = 0,
    trial: Trial | None = None,
) -> Decision:
    """Decide what to remove from which layer; changes nothing.

    A layer whose analysis fails for numerical reasons, or for want of memory on its device and on
    the CPU, is left as it is, with a warning; the others go on.

    Args:
        model: the module with the layers.
        layers: from :func:`~lightning_compressm.model.layers.select_layers`.
        policy: how much to remove.
        seen: what is known of the data: lengths for ``horizon="auto"``, calibration data.
        processes: those that decide together.
        seed: for random selections.
        trial: tries cuts under a policy with a ``loss_budget``.

    Returns:
        The plan and one event for each layer.

    Raises:
        NonFiniteError: if a layer's parameters hold NaN or infinity.
        UnstableSystemError: if a layer has an eigenvalue outside the open unit disc.
        CalibrationError: for a selective layer without calibration data.

    Example:
        >>> from lightning_compressm.model.layers import select_layers
        >>> from lightning_compressm.nn import LRU
        >>> model = LRU(1, 16)
        >>> decision = decide(model, select_layers(model), ReductionPolicy(state_dim=4))
        >>> decision.events[0].new_state_dim
        4
    """
    twins = _twins(layers.values())
    own, processes = list(twins), processes or Processes()
    work = _Work(own, policy, seen or Seen(), seed)
    alike = _alike(own)
    looked = processes.map(work.look, alike, _told)
    spectra = [None if one.value is None else one.value.sigma for one in looked.values()]
    # Orders steer what is exchanged next, so rounding must not make them differ.
    orders = processes.agree(
        choose_orders(own, spectra, policy, None if trial is None else trial.floors)
    )
    cuts = {
        i: _left_alone(layer, why)
        for i, layer in enumerate(own)
        if (why := looked[i].failure or orders[i].refused)
    }
    again = {i: alike[i] for i in alike if i not in cuts}
    while again:
        for i, outcome in processes.map(partial(work.cut, looked, orders), again).items():
            cuts[i] = _result(own[i], outcome, looked[i])
        reached = [cuts[i].event.new_state_dim for i in alike]
        if policy.share_state_dim:
            orders = level_orders(own, orders, reached)
        again = {i: alike[i] for i in alike if orders[i].wanted > reached[i]}
    if trial is not None:

        def loss_of(choice: Mapping[int, Cut]) -> float:
            chosen = [choice[i] if i in choice else Cut(LayerEvent.skip(own[i])) for i in alike]
            return trial.loss(Decision.of(model, twins, chosen, {}).plan)

        attempts = _Attempts(work, alike, looked, trial, processes)
        wished = {i: cut for i, cut in cuts.items() if cut.plan}
        options = attempts.beside(wished, orders)
        smaller = partial(attempts.smaller, orders)
        cuts |= affordable(options, smaller, loss_of, trial, as_one=policy.share_state_dim)
    known = {x.name: s for x, s in zip(own, spectra, strict=True) if s is not None}
    return Decision.of(model, twins, [cuts[i] for i in alike], known)


def measure_spectra(
    layers: Layers,
    policy: ReductionPolicy,
    seen: Seen | None = None,
    processes: Processes | None = None,
    *,
    leave_out: bool = False,
) -> dict[str, Tensor]:
    """The spectra that a reduction would be decided on.

    Args:
        layers: from :func:`~lightning_compressm.model.layers.select_layers`.
        policy: balance and horizon.
        seen: what is known of the data.
        processes: those that look together.
        leave_out: leave out a layer that can't be analysed for numerical reasons or for want of
            memory, with a warning, instead of raising.

    Returns:
        Layer name -> HSVs of each state, descending, on the layer's device.

    Raises:
        CalibrationError: for a selective layer without calibration data.
        CompreSSMError: for unstable or non-finite layers.

    Example:
        >>> from lightning_compressm.model.layers import find_ssm_layers
        >>> from lightning_compressm.nn import LRU
        >>> seen = Seen(lengths={"": 50})
        >>> measure_spectra(find_ssm_layers(LRU(1, 16)), ReductionPolicy(), seen)[""].shape
        torch.Size([16])
    """
    own, processes = list(layers.values()), processes or Processes()
    work = _Work(own, policy, seen or Seen(), spectrum_only=True)
    spectra: dict[str, Tensor] = {}
    for i, outcome in processes.map(work.look, _alike(own), _told).items():
        if outcome.value is not None:
            spectra[own[i].name] = back_to(outcome.value.sigma, own[i].device)
        elif leave_out:
            _warn(own[i], outcome.failure)
        else:
            raise CompreSSMError(f"layer '{own[i].name}' can't be analysed: {outcome.failure}")
    return spectra


@dataclass(frozen=True, eq=False)
class _Look:
    """What a look at one layer found; the analysis stays in the process that made it."""

    sigma: Tensor
    seconds: float
    analysis: Analysis | None


def _told(look: _Look) -> _Look:
    return replace(look, analysis=None)


@dataclass(frozen=True, eq=False)
class _Work:
    """The work on single layers, by their numbers."""

    layers: Sequence[SSMLayer]
    policy: ReductionPolicy
    seen: Seen
    seed: int = 0
    spectrum_only: bool = False

    def look(self, i: int, processes: Processes, on_cpu: bool) -> _Look:
        start = time.perf_counter()
        layer, seen = self.layers[i], self.seen
        if on_cpu:
            layer, seen = layer.on_cpu(), seen.on_cpu(layer.name)
        with about(layer):
            analysis = analyse(
                layer, self.policy, seen, processes, spectrum_only=self.spectrum_only
            )
        return _Look(analysis.sigma.cpu(), time.perf_counter() - start, analysis)

    def cut(
        self,
        looked: Mapping[int, Outcome[_Look]],
        orders: Sequence[Order] | Mapping[int, Order],
        i: int,
        processes: Processes,
        on_cpu: bool,
    ) -> Cut:
        start, look = time.perf_counter(), looked[i].value
        assert look is not None
        analysis = self.look(i, processes, on_cpu).analysis if on_cpu else look.analysis
        assert analysis is not None
        with about(self.layers[i]):
            try:
                cut = analysis.cut(orders[i], self.policy, self.seed)
            except (NonFiniteError, UnstableSystemError) as error:
                # The layer itself was found to be finite and stable: this is about its reduction.
                raise IllConditionedError(str(error)) from error
        seconds = look.seconds + time.perf_counter() - start
        return replace(cut, event=replace(cut.event, seconds=seconds))

    def task_cuts(
        self,
        looked: Mapping[int, Outcome[_Look]],
        orders: Sequence[Order] | Mapping[int, Order],
        trial: Trial,
        i: int,
        processes: Processes,
        on_cpu: bool,
    ) -> list[Cut]:
        look = looked[i].value
        if on_cpu or look is None or look.analysis is None:
            return []  # out of memory: the cut that there is will do
        with about(self.layers[i]):
            task = trial.task[self.layers[i].name]
            return look.analysis.task_cuts(orders[i], self.policy, task)


@dataclass(frozen=True, eq=False)
class _Attempts:
    """Cuts to choose from where each is tried before it is made."""

    work: _Work
    alike: Mapping[int, bool]
    looked: Mapping[int, Outcome[_Look]]
    trial: Trial
    processes: Processes

    def beside(
        self, cuts: Mapping[int, Cut], orders: Sequence[Order] | Mapping[int, Order]
    ) -> dict[int, list[Cut]]:
        """Each cut, and after it those that are as large by Gramians of the task."""
        names = {i: self.work.layers[i].name for i in cuts}
        alike = {i: self.alike[i] for i in cuts if names[i] in self.trial.task}
        task_cuts = partial(self.work.task_cuts, self.looked, orders, self.trial)
        found = self.processes.map(task_cuts, alike)
        others = {i: outcome.value or [] for i, outcome in found.items()}
        return {i: [cut, *others.get(i, [])] for i, cut in cuts.items()}

    def smaller(self, orders: Sequence[Order], i: int) -> list[Cut]:
        """Cuts that take half as many states of a layer, if that is worth while."""
        less = {i: smaller_cut(orders[i])}
        half = partial(self.work.cut, self.looked, less)
        (outcome,) = self.processes.map(half, {i: self.alike[i]}).values()
        cut = _result(self.work.layers[i], outcome, self.looked[i])
        return self.beside({i: cut}, less)[i] if cut.plan else []


def _alike(layers: Sequence[SSMLayer]) -> dict[int, bool]:
    """Which layers are the same on all processes: those that need no data."""
    return {i: not layer.family.needs_data for i, layer in enumerate(layers)}


def _result(layer: SSMLayer, outcome: Outcome[Cut], looked: Outcome[_Look]) -> Cut:
    """A cut with all that is to be said of it, or none where it failed."""
    if outcome.value is None:
        return _left_alone(layer, outcome.failure)
    event = outcome.value.event
    reason = "; ".join(filter(None, [event.reason, looked.note, outcome.note]))
    return replace(outcome.value, event=replace(event, reason=reason))


def _left_alone(layer: SSMLayer, why: str) -> Cut:
    _warn(layer, why)
    return Cut(LayerEvent.skip(layer, reason=why))


def _warn(layer: SSMLayer, why: str) -> None:
    message = f"{layer} is left as it is: {why}"
    warnings.warn(message, stacklevel=4)


def _twins(layers: Iterable[SSMLayer]) -> Twins:
    found: dict[frozenset[int], list[SSMLayer]] = {}
    for layer in layers:
        found.setdefault(_state_tensors(layer), []).append(layer)
    return {first: others for first, *others in found.values()}


def _state_tensors(layer: SSMLayer) -> frozenset[int]:
    """Ids of the tensors that have a state dimension; equal for layers that share them."""
    tensors = dict(layer.module.named_parameters()) | dict(layer.module.named_buffers())
    return frozenset(id(tensors[name]) for name in layer.family.state_axes(layer.module))
