"""Decide which states of which layers go; nothing is changed here."""

from __future__ import annotations

import math
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lightning_compressm.analysis import LayerAnalysis, analyse_layer, choose_orders, naming
from lightning_compressm.control import Reduction, balanced_truncation
from lightning_compressm.discovery import SSMLayer, select_layers
from lightning_compressm.errors import IllConditionedError
from lightning_compressm.policy import ReductionPolicy
from lightning_compressm.report import LayerEvent
from lightning_compressm.surgery.plan import SurgeryPlan

__all__ = ["Proposal", "propose"]


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
    lengths: Mapping[str, int] | None = None,
    *,
    seed: int = 0,
) -> Proposal:
    """Decide what to remove from which layer; changes nothing.

    Args:
        model: any module with SSM layers.
        policy: how much to remove.
        lengths: layer name -> length of the sequences it processes, for ``horizon="auto"``.
        seed: for ``selection="random"``.

    Returns:
        The plan and one event for each layer.

    Raises:
        UnsupportedLayerError: if there is no SSM layer to look at.
        NonFiniteError: if a layer's parameters hold NaN or infinity.
        UnstableSystemError: if a layer has an eigenvalue outside the open unit disc.

    Example:
        >>> import torch
        >>> from lightning_compressm.nn import LRU
        >>> _ = torch.manual_seed(0)
        >>> proposal = propose(LRU(1, 16), ReductionPolicy(state_dim=4))
        >>> proposal.events[0].new_state_dim
        4
    """
    layers, aliases = _split_aliases(select_layers(model, policy.layers, policy.ignore))
    analyses = [analyse_layer(layer, policy, lengths or {}) for layer in layers]
    attempts = _reduce_layers(analyses, policy, seed)
    plans: list[SurgeryPlan] = []
    events: list[LayerEvent] = []
    for analysis, attempt in zip(analyses, attempts, strict=True):
        plan, event = _plan_layer(analysis, attempt)
        events.append(event)
        plans.append(plan.prefixed(analysis.layer.path))
        if plan:
            plans += _alias_plans(analysis.layer, aliases, event.new_state_dim)
    spectra = {a.layer.name: a.sigma.cpu() for a in analyses}
    return Proposal(SurgeryPlan.merge(plans), events, spectra)


@dataclass(frozen=True, eq=False)
class _Attempt:
    """A reduction, or why there is none."""

    reduction: Reduction | None
    reason: str = ""
    seconds: float = 0.0


def _reduce_layers(
    analyses: Sequence[LayerAnalysis], policy: ReductionPolicy, seed: int
) -> list[_Attempt]:
    orders = choose_orders(analyses, policy)
    attempts = [_attempt(a, n, policy, seed) for a, n in zip(analyses, orders, strict=True)]
    if not policy.share_state_dim:
        return attempts
    needed: dict[str, int] = defaultdict(int)
    for analysis, attempt in zip(analyses, attempts, strict=True):
        order = attempt.reduction.order if attempt.reduction else analysis.layer.state_dim
        name = analysis.layer.family.name
        needed[name] = max(needed[name], order)
    return [
        attempt
        if attempt.reduction and attempt.reduction.order == needed[analysis.layer.family.name]
        else _attempt(analysis, needed[analysis.layer.family.name], policy, seed)
        for analysis, attempt in zip(analyses, attempts, strict=True)
    ]


def _attempt(analysis: LayerAnalysis, order: int, policy: ReductionPolicy, seed: int) -> _Attempt:
    start = time.perf_counter()
    try:
        with torch.no_grad(), naming(analysis.layer):
            reduction = _reduce_within(analysis, order, policy, seed)
    except IllConditionedError as error:
        warnings.warn(f"layer left as it is: {error}", stacklevel=2)
        return _Attempt(None, str(error))
    if reduction is None:
        old = analysis.layer.state_dim
        return _Attempt(None, f"{min(order, old)} or more of {old} states are needed")
    return _Attempt(reduction, seconds=time.perf_counter() - start)


def _reduce_within(
    analysis: LayerAnalysis, order: int, policy: ReductionPolicy, seed: int
) -> Reduction | None:
    """The reduction to ``order``, or to the next higher one that keeps the promised energy.

    A complex state holds two real ones only if its poles come as a conjugate pair, so a system
    with real poles may need more states than its spectrum says. ``None`` if too few states go.
    """
    n = analysis.layer.state_dim
    largest = min(n - 1, math.floor(n * (1 - policy.min_reduction) + 1e-9))
    promised = 0.0 if policy.tolerance is None else 1 - policy.tolerance
    for candidate in range(order, largest + 1, policy.round_to):
        reduction = _reduce(analysis, candidate, policy, seed)
        enough = float(reduction.energy_kept.mean()) >= promised - 1e-9
        # A spectrum of another horizon, and the ablations, promise nothing.
        comparable = reduction.horizon == analysis.horizon and policy.selection == "largest"
        if enough or not comparable:
            return reduction
    return None


def _reduce(analysis: LayerAnalysis, order: int, policy: ReductionPolicy, seed: int) -> Reduction:
    generator = torch.Generator().manual_seed(seed) if policy.selection == "random" else None
    return balanced_truncation(
        analysis.system,
        order,
        balance=analysis.balance,
        horizon=analysis.horizon,
        selection=policy.selection,
        generator=generator,
    )


def _plan_layer(analysis: LayerAnalysis, attempt: _Attempt) -> tuple[SurgeryPlan, LayerEvent]:
    layer, reduction = analysis.layer, attempt.reduction
    skipped = LayerEvent(
        layer=layer.name,
        family=layer.family.name,
        action="skip",
        old_state_dim=layer.state_dim,
        new_state_dim=layer.state_dim,
        seconds=analysis.seconds + attempt.seconds,
        reason=attempt.reason,
        balance=analysis.balance,
        horizon=analysis.horizon,
    )
    if reduction is None:
        return SurgeryPlan(), skipped
    with torch.no_grad(), naming(layer):
        plan = layer.family.reduction_plan(layer.module, reduction)
    return plan, replace(
        skipped,
        action="reduce",
        new_state_dim=reduction.order,
        energy_kept=float(reduction.energy_kept.mean()),
        error_bound=None if reduction.bound is None else float(reduction.bound.max()),
        horizon=reduction.horizon,
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
