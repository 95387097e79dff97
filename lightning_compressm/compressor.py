"""Reduce the SSM layers of any module: discover, analyse, plan, apply, report. No Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_compressm.analysis import measure_spectra
from lightning_compressm.discovery import LengthRecorder, SSMLayer, select_layers
from lightning_compressm.policy import BalanceChoice, HorizonChoice, ReductionPolicy, Selection
from lightning_compressm.proposal import propose
from lightning_compressm.report import CompressionReport
from lightning_compressm.surgery.apply import apply_plan
from lightning_compressm.surgery.loading import install_resize_hooks
from lightning_compressm.surgery.optimizer import (
    OptimizerStatePolicy,
    carry_gradients,
    rebind_optimizers,
)
from lightning_compressm.surgery.plan import SurgeryPlan

__all__ = ["apply_proposal", "compress", "hankel_spectra"]


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
        >>> from lightning_compressm.policy import ReductionPolicy
        >>> from lightning_compressm.proposal import propose
        >>> layer = LRU(1, 16)
        >>> undo = apply_proposal(layer, propose(layer, ReductionPolicy(state_dim=4)).plan)
        >>> layer.d_state
        4
        >>> undo()
        >>> layer.d_state
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
