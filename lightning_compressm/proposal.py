"""Decide which states of which layers go; nothing is changed here."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from lightning_compressm.analysis import Attempt, LayerAnalysis, choose_orders
from lightning_compressm.discovery import SSMLayer, select_layers
from lightning_compressm.families import Family, SelectiveFamily, model_attributes
from lightning_compressm.linear import analyse_linear
from lightning_compressm.policy import ReductionPolicy
from lightning_compressm.recording import Context
from lightning_compressm.report import LayerEvent
from lightning_compressm.selective import analyse_selective
from lightning_compressm.surgery.plan import SurgeryPlan

__all__ = ["Proposal", "analyse_layer", "measure_spectra", "propose"]


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

    Args:
        model: any module with SSM layers.
        policy: how much to remove.
        context: what is known of the data: lengths for ``horizon="auto"``, calibration data.
        seed: for random selections.

    Returns:
        The plan and one event for each layer.

    Raises:
        UnsupportedLayerError: if there is no SSM layer to look at.
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
    layers, aliases = _split_aliases(select_layers(model, policy.layers, policy.ignore))
    analyses = [analyse_layer(layer, policy, context) for layer in layers]
    attempts = _reduce_layers(analyses, policy, seed)
    plans: list[SurgeryPlan] = []
    events: list[LayerEvent] = []
    for analysis, attempt in zip(analyses, attempts, strict=True):
        events.append(_event(analysis, attempt))
        if attempt.plan is not None:
            plans.append(attempt.plan.prefixed(analysis.layer.path))
            plans += _alias_plans(analysis.layer, aliases, attempt.order)
    plan = SurgeryPlan.merge([*plans, _shared_plan(model, analyses, attempts)])
    spectra = {a.layer.name: a.sigma.cpu() for a in analyses}
    return Proposal(plan, events, spectra)


def measure_spectra(
    model: nn.Module, policy: ReductionPolicy, context: Context | None = None
) -> dict[str, Tensor]:
    """The spectra that a reduction would be decided on.

    Args:
        model: any module with SSM layers.
        policy: which layers, balance and horizon.
        context: what is known of the data.

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
    layers = select_layers(model, policy.layers, policy.ignore)
    return {n: analyse_layer(layer, policy, context).sigma for n, layer in layers.items()}


def analyse_layer(layer: SSMLayer, policy: ReductionPolicy, context: Context) -> LayerAnalysis:
    """Analyse one layer as its family asks for."""
    if isinstance(layer.family, Family):
        return analyse_linear(layer, layer.family, policy, context.lengths)
    assert isinstance(layer.family, SelectiveFamily)
    return analyse_selective(layer, layer.family, policy, context)


def _reduce_layers(
    analyses: Sequence[LayerAnalysis], policy: ReductionPolicy, seed: int
) -> list[Attempt]:
    orders = choose_orders(analyses, policy)
    attempts = [a.attempt(n, policy, seed) for a, n in zip(analyses, orders, strict=True)]
    if not policy.share_state_dim:
        return attempts
    # An attempt may need more states than asked for; then its whole family gets them, as far as a
    # layer has so many. Dimensions only rise, so there is an end.
    present = [analysis.layer.state_dim for analysis in analyses]
    for _ in range(sum(present) + 1):
        needed: dict[str, int] = defaultdict(int)
        for analysis, attempt in zip(analyses, attempts, strict=True):
            name = analysis.layer.family.name
            needed[name] = max(needed[name], attempt.order)
        wanted = [
            min(needed[a.layer.family.name], n) for a, n in zip(analyses, present, strict=True)
        ]
        if all(attempt.order == n for attempt, n in zip(attempts, wanted, strict=True)):
            return attempts
        attempts = [
            attempt if attempt.order == n else analysis.attempt(n, policy, seed)
            for analysis, attempt, n in zip(analyses, attempts, wanted, strict=True)
        ]
    raise AssertionError("raising dimensions must end at the present ones")


def _event(analysis: LayerAnalysis, attempt: Attempt) -> LayerEvent:
    layer = analysis.layer
    return LayerEvent(
        layer=layer.name,
        family=layer.family.name,
        action="skip" if attempt.plan is None else "reduce",
        old_state_dim=layer.state_dim,
        new_state_dim=attempt.order,
        energy_kept=attempt.energy_kept,
        error_bound=attempt.error_bound,
        output_error=attempt.output_error,
        seconds=analysis.seconds + attempt.seconds,
        reason=attempt.note,
        balance=attempt.balance,
        horizon=attempt.horizon,
    )


def _shared_plan(
    model: nn.Module, analyses: Sequence[LayerAnalysis], attempts: Sequence[Attempt]
) -> SurgeryPlan:
    """Attributes of the model itself, such as a config's, that follow its layers."""
    orders = {a.layer.path: t.order for a, t in zip(analyses, attempts, strict=True)}
    if all(attempt.plan is None for attempt in attempts):
        return SurgeryPlan()
    return SurgeryPlan({}, model_attributes(model, orders))


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
