"""Decide which states of which layers go; nothing is changed here."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from lightning_compressm.errors import CompreSSMError
from lightning_compressm.families import model_attributes
from lightning_compressm.model.layers import SSMLayer, refuse_irreplaceable, select_layers
from lightning_compressm.reduction.analysis import Attempt, choose_order
from lightning_compressm.reduction.events import LayerEvent
from lightning_compressm.reduction.examination import Examination
from lightning_compressm.reduction.policy import ReductionPolicy
from lightning_compressm.reduction.recorder import Context
from lightning_compressm.surgery.plan import SurgeryPlan

__all__ = ["Proposal", "measure_spectra", "propose"]


@dataclass(frozen=True, eq=False)
class Proposal:
    """A decided but not yet executed reduction of a model.

    Attributes:
        plan: the change, relative to the model; empty if nothing is to be done.
        events: one event for each layer that was looked at.
        spectra: layer name -> HSVs of each state, descending.

    Example:
        >>> bool(Proposal(SurgeryPlan(), [], {}).plan)
        False
    """

    plan: SurgeryPlan
    events: list[LayerEvent]
    spectra: Mapping[str, Tensor]


def propose(
    model: nn.Module,
    policy: ReductionPolicy,
    context: Context | None = None,
    *,
    seed: int = 0,
) -> Proposal:
    """Decide what to remove from which layer; changes nothing.

    A layer whose analysis fails for numerical reasons, or for want of memory on its device and on
    the CPU, is left as it is, with a warning; the others go on.

    Args:
        model: any module with SSM layers.
        policy: how much to remove.
        context: what is known of the data: lengths for ``horizon="auto"``, calibration data.
        seed: for random selections.

    Returns:
        The plan and one event for each layer.

    Raises:
        UnsupportedLayerError: if there is no SSM layer to look at, or one that can't be replaced.
        NonFiniteError: if a layer's parameters hold NaN or infinity.
        UnstableSystemError: if a layer has an eigenvalue outside the open unit disc.
        CalibrationError: for a selective layer without calibration data.

    Example:
        >>> import torch
        >>> from lightning_compressm.nn import LRU
        >>> _ = torch.manual_seed(0)
        >>> proposal = propose(LRU(1, 16), ReductionPolicy(state_dim=4))
        >>> proposal.events[0].new_state_dim
        4
    """
    context = context or Context()
    chosen = select_layers(model, policy.layers, policy.ignore)
    refuse_irreplaceable(chosen.values())
    layers, aliases = _split_aliases(chosen)
    examined = _examine(layers, policy, context)
    # Spectra are read before the attempts, after which a layer may have failed.
    spectra = {e.layer.name: e.analysis.sigma.cpu() for e in examined if e.analysis is not None}
    attempts = _reduce_layers(examined, policy, context, seed)
    plans: list[SurgeryPlan] = []
    events: list[LayerEvent] = []
    for one, attempt in zip(examined, attempts, strict=True):
        events.append(_event(one, attempt))
        if attempt.plan is not None:
            plans.append(attempt.plan.prefixed(one.layer.path))
            plans += _alias_plans(one.layer, aliases, attempt.order)
    orders = {e.layer.path: t.order for e, t in zip(examined, attempts, strict=True)}
    shared = SurgeryPlan({}, model_attributes(model, orders)) if plans else SurgeryPlan()
    return Proposal(SurgeryPlan.merge([*plans, shared]), events, spectra)


def measure_spectra(
    model: nn.Module,
    policy: ReductionPolicy,
    context: Context | None = None,
    *,
    leave_out: bool = False,
) -> dict[str, Tensor]:
    """The spectra that a reduction would be decided on.

    Args:
        model: any module with SSM layers.
        policy: which layers, balance and horizon.
        context: what is known of the data.
        leave_out: leave out a layer that can't be analysed for numerical reasons or for want of
            memory, with a warning, instead of raising.

    Returns:
        Layer name -> HSVs of each state, descending, on the layer's device.

    Raises:
        UnsupportedLayerError: if the model has no SSM layer.
        CalibrationError: for a selective layer without calibration data.
        CompreSSMError: for unstable or non-finite layers.

    Example:
        >>> from lightning_compressm.nn import LRU
        >>> measure_spectra(LRU(1, 16), ReductionPolicy(), Context(lengths={"": 50}))[""].shape
        torch.Size([16])
    """
    context = context or Context()
    spectra: dict[str, Tensor] = {}
    layers = select_layers(model, policy.layers, policy.ignore).values()
    for one in _examine(layers, policy, context, spectrum_only=True):
        if one.sigma is not None:
            spectra[one.layer.name] = one.sigma
        elif not leave_out:
            raise CompreSSMError(f"layer '{one.layer.name}' can't be analysed: {one.failure}")
    return spectra


def _examine(
    layers: Iterable[SSMLayer],
    policy: ReductionPolicy,
    context: Context,
    *,
    spectrum_only: bool = False,
) -> list[Examination]:
    """Analyse all layers; the processes share linear ones out and work on theirs side by side."""
    size = context.processes.size
    examined = [
        Examination(layer, policy, context, owner_of(index, size), spectrum_only=spectrum_only)
        for index, layer in enumerate(layers)
    ]
    for one in examined:
        one.prepare()
    for one in examined:
        one.analyse()
    return examined


def owner_of(index: int, size: int) -> int:
    """The process out of ``size`` that works on the layer number ``index``, if it is linear.

    Example:
        >>> [owner_of(index, 2) for index in range(3)]
        [0, 1, 0]
    """
    return index % size


def _attempt_all(
    examined: Sequence[Examination], orders: Sequence[int], seed: int
) -> list[Attempt]:
    for one, order in zip(examined, orders, strict=True):
        one.prepare_attempt(order, seed=seed)
    return [one.attempt(order, seed=seed) for one, order in zip(examined, orders, strict=True)]


def _reduce_layers(
    examined: Sequence[Examination], policy: ReductionPolicy, context: Context, seed: int
) -> list[Attempt]:
    # Orders steer what is exchanged next, so rounding must not make them differ.
    orders = context.processes.agree([_first_order(one, policy) for one in examined])
    attempts = _attempt_all(examined, orders, seed)
    if not policy.share_state_dim:
        return attempts
    # An attempt may need more states than asked for; then its whole family gets them, as far as a
    # layer has so many. Dimensions only rise, so there is an end.
    present = [one.layer.state_dim for one in examined]
    for _ in range(sum(present) + 1):
        needed: dict[str, int] = defaultdict(int)
        for one, attempt in zip(examined, attempts, strict=True):
            name = one.layer.family.name
            needed[name] = max(needed[name], attempt.order)
        wanted = [
            min(needed[e.layer.family.name], n) for e, n in zip(examined, present, strict=True)
        ]
        if all(attempt.order == n for attempt, n in zip(attempts, wanted, strict=True)):
            return attempts
        again = [i for i, n in enumerate(wanted) if attempts[i].order != n]
        others = _attempt_all([examined[i] for i in again], [wanted[i] for i in again], seed)
        for i, other in zip(again, others, strict=True):
            attempts[i] = other
    raise AssertionError("raising dimensions must end at the present ones")


def _first_order(one: Examination, policy: ReductionPolicy) -> int:
    return one.layer.state_dim if one.analysis is None else choose_order(one.analysis, policy)


def _event(one: Examination, attempt: Attempt) -> LayerEvent:
    layer = one.layer
    return LayerEvent(
        layer=layer.name,
        family=layer.family.name,
        action="skip" if attempt.plan is None else "reduce",
        old_state_dim=layer.state_dim,
        new_state_dim=attempt.order,
        energy_kept=attempt.energy_kept,
        error_bound=attempt.error_bound,
        output_error=attempt.output_error,
        seconds=one.seconds + attempt.seconds,
        reason=attempt.note,
        balance=attempt.balance,
        horizon=attempt.horizon,
    )


def _tensor_ids(layer: SSMLayer) -> frozenset[int]:
    tensors = dict(layer.module.named_parameters()) | dict(layer.module.named_buffers())
    return frozenset(id(tensors[name]) for name in layer.family.state_axes(layer.module))


def _split_aliases(
    layers: Mapping[str, SSMLayer],
) -> tuple[list[SSMLayer], dict[frozenset[int], list[SSMLayer]]]:
    """Layers with tensors of their own, and for each its twins that share all of them."""
    first: dict[frozenset[int], SSMLayer] = {}
    aliases: dict[frozenset[int], list[SSMLayer]] = defaultdict(list)
    for layer in layers.values():
        key = _tensor_ids(layer)
        if key in first:
            aliases[key].append(layer)
        else:
            first[key] = layer
    return list(first.values()), aliases


def _alias_plans(
    layer: SSMLayer, aliases: Mapping[frozenset[int], list[SSMLayer]], order: int
) -> Iterator[SurgeryPlan]:
    for alias in aliases.get(_tensor_ids(layer), ()):
        attributes = alias.family.attributes(alias.module, order)
        yield SurgeryPlan({}, attributes).prefixed(alias.path)
