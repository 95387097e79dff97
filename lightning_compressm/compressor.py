"""Reduce the SSM layers of any module: discover, analyse, plan, apply, report. No Trainer."""

from __future__ import annotations

import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_compressm.analysis import (
    LayerAnalysis,
    analyse_layer,
    choose_orders,
    measure_spectra,
    naming,
)
from lightning_compressm.control import Reduction, balanced_truncation
from lightning_compressm.discovery import LengthRecorder, SSMLayer, select_layers
from lightning_compressm.errors import IllConditionedError
from lightning_compressm.policy import BalanceChoice, HorizonChoice, ReductionPolicy, Selection
from lightning_compressm.report import CompressionReport, LayerEvent
from lightning_compressm.surgery.apply import apply_plan
from lightning_compressm.surgery.loading import install_resize_hooks
from lightning_compressm.surgery.optimizer import (
    OptimizerStatePolicy,
    carry_gradients,
    rebind_optimizers,
)
from lightning_compressm.surgery.plan import SurgeryPlan

__all__ = ["Proposal", "apply_proposal", "compress", "hankel_spectra", "propose"]


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
    orders = choose_orders(analyses, policy)
    plans: list[SurgeryPlan] = []
    events: list[LayerEvent] = []
    for analysis, order in zip(analyses, orders, strict=True):
        plan, event = _plan_layer(analysis, order, policy, seed)
        events.append(event)
        plans.append(plan.prefixed(analysis.layer.path))
        if plan:
            plans += _alias_plans(analysis.layer, aliases, order)
    spectra = {a.layer.name: a.sigma.cpu() for a in analyses}
    return Proposal(SurgeryPlan.merge(plans), events, spectra)


def apply_proposal(
    model: nn.Module,
    plan: SurgeryPlan,
    optimizers: Iterable[Optimizer] = (),
    policy: OptimizerStatePolicy = "transport",
    *,
    pending_gradients: bool = False,
) -> Callable[[], None]:
    """Change the model and its optimizers, or leave both untouched.

    Args:
        model: the module that the plan was made for.
        plan: from :func:`propose`.
        optimizers: every optimizer that holds parameters of the model.
        policy: what becomes of optimizer state.
        pending_gradients: carry ``.grad`` over too, where a step with it is still to come.

    Returns:
        A function that takes everything back.

    Raises:
        CompreSSMError: if the plan does not fit; nothing was changed then.

    Example:
        >>> from lightning_compressm.nn import LRU
        >>> layer = LRU(1, 16)
        >>> undo = apply_proposal(layer, propose(layer, ReductionPolicy(state_dim=4)).plan)
        >>> layer.d_state
        4
        >>> undo()
        ... layer.d_state
        16
    """
    applied = apply_plan(model, plan)
    try:
        if pending_gradients:
            carry_gradients(applied)
        undo_optimizers = rebind_optimizers(optimizers, applied, policy)
    except BaseException:
        applied.undo()
        raise

    def undo() -> None:
        undo_optimizers()
        applied.undo()

    return undo


def compress(
    model: nn.Module,
    tolerance: float | None = None,
    *,
    fraction: float | None = None,
    state_dim: int | None = None,
    sample: Any = None,
    horizon: HorizonChoice = "auto",
    balance: BalanceChoice = "auto",
    criterion: str = "auto",
    selection: Selection = "largest",
    layers: Sequence[str] | None = None,
    ignore: Sequence[str] | None = None,
    round_to: int = 1,
    min_state_dim: int = 1,
    share_state_dim: bool = False,
    optimizers: Iterable[Optimizer] = (),
) -> CompressionReport:
    """Remove states from the SSM layers of a model, in place. Needs no Trainer.

    Args:
        model: any module with SSM layers.
        tolerance: share of each layer's Hankel energy that may go, in [0, 1). Default 0.05.
        fraction: instead, share of the states to drop, in (0, 1).
        state_dim: instead, the dimension to go down to.
        sample: one batch to run the model on (a tensor, a tuple of positional arguments, or a dict
            of keyword arguments): gives ``horizon="auto"`` the length of the sequences.
        horizon: steps of time-limited Gramians, ``None`` for infinite, ``"auto"`` for the length
            seen in ``sample`` (infinite without one).
        balance: ``"auto"``, ``"real"``, ``"folded"`` or ``"complex"`` (as published).
        criterion: only ``"auto"`` so far.
        selection: ``"largest"``, or the ablations ``"smallest"`` and ``"random"``.
        layers: glob patterns of module names to reduce; ``None`` for all.
        ignore: glob patterns of module names to leave alone.
        round_to: round the kept dimension up to a multiple.
        min_state_dim: never go below.
        share_state_dim: one dimension for all layers of a family.
        optimizers: optimizers that hold the model's parameters; they are carried along.

    Returns:
        A report with ``.events``, ``.table()``, ``.to_dict()`` and ``.plot()``.

    Raises:
        ValueError: for contradictory or out-of-range arguments, unknown layer patterns.
        UnsupportedLayerError: if the model has no SSM layer.
        CompreSSMError: if a layer can't be reduced safely. The model is untouched then.

    Source:
        CompreSSM, arXiv 2510.02823, algorithm 1, applied to a finished model.

    Example:
        >>> import torch
        >>> from lightning_compressm.nn import LRU
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(1, 4), LRU(4, 32))
        >>> report = compress(model, state_dim=8, sample=torch.randn(2, 50, 1))
        >>> model[1].d_state, report.events[0].horizon
        (8, 50)
    """
    policy = ReductionPolicy(
        tolerance=tolerance,
        fraction=fraction,
        state_dim=state_dim,
        horizon=horizon,
        balance=balance,
        criterion=criterion,
        selection=selection,
        layers=layers,
        ignore=ignore,
        round_to=round_to,
        min_state_dim=min_state_dim,
        share_state_dim=share_state_dim,
    )
    lengths = _measure_lengths(model, select_layers(model, layers, ignore), sample)
    proposal = propose(model, policy, lengths)
    apply_proposal(model, proposal.plan, optimizers)
    install_resize_hooks(model)
    return CompressionReport(proposal.events, proposal.spectra)


def hankel_spectra(
    model: nn.Module,
    *,
    sample: Any = None,
    horizon: HorizonChoice = None,
    balance: BalanceChoice = "auto",
) -> dict[str, Tensor]:
    """Hankel singular values of every SSM layer, one value for each state, descending.

    Args:
        model: any module with SSM layers.
        sample: one batch; with ``horizon="auto"`` it gives the length of the sequences.
        horizon: steps of time-limited Gramians, ``None`` for infinite.
        balance: as for :func:`compress`. For ``"real"`` the two HSVs of a conjugate pair add up to
            the value of their one complex state.

    Returns:
        Layer name -> float64 tensor, shape (N,), or (systems, N) for a bank of SISO systems.

    Raises:
        UnsupportedLayerError: if the model has no SSM layer.
        CompreSSMError: for unstable or non-finite layers.

    Example:
        >>> from lightning_compressm.nn import LRU
        >>> hankel_spectra(LRU(1, 16))[""].shape
        torch.Size([16])
    """
    policy = ReductionPolicy(horizon=horizon, balance=balance)
    return measure_spectra(model, policy, _measure_lengths(model, select_layers(model), sample))


def _plan_layer(
    analysis: LayerAnalysis, order: int, policy: ReductionPolicy, seed: int
) -> tuple[SurgeryPlan, LayerEvent]:
    layer, old = analysis.layer, analysis.layer.state_dim
    skipped = LayerEvent(
        layer=layer.name,
        family=layer.family.name,
        action="skip",
        old_state_dim=old,
        new_state_dim=old,
        seconds=analysis.seconds,
        balance=analysis.balance,
        horizon=analysis.horizon,
    )
    if order >= old or old - order < policy.min_reduction * old:
        reason = f"{order} of {old} states are needed"
        return SurgeryPlan(), replace(skipped, reason=reason)
    start = time.perf_counter()
    try:
        with torch.no_grad(), naming(layer):
            reduction = _reduce(analysis, order, policy, seed)
            plan = layer.family.reduction_plan(layer.module, reduction)
    except IllConditionedError as error:
        warnings.warn(f"layer left as it is: {error}", stacklevel=2)
        return SurgeryPlan(), replace(skipped, reason=str(error))
    bound = None if reduction.bound is None else float(reduction.bound.max())
    return plan, replace(
        skipped,
        action="reduce",
        new_state_dim=order,
        energy_kept=float(reduction.energy_kept.mean()),
        error_bound=bound,
        seconds=analysis.seconds + time.perf_counter() - start,
        horizon=reduction.horizon,
    )


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


def _measure_lengths(
    model: nn.Module, layers: Mapping[str, SSMLayer], sample: Any
) -> dict[str, int]:
    if sample is None:
        return {}
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad(), LengthRecorder(layers) as recorder:
            model.eval()
            _call(model, sample)
    finally:
        for module, training in modes.items():
            module.training = training
    return recorder.lengths


def _call(model: nn.Module, sample: Any) -> None:
    if isinstance(sample, Mapping):
        model(**sample)
    elif isinstance(sample, tuple):
        model(*sample)
    else:
        model(sample)
