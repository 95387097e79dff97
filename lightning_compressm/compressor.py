"""Reduce the SSM layers of any module: select, look, decide, change, report. No Trainer."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_compressm.errors import CalibrationError
from lightning_compressm.model.change import change
from lightning_compressm.model.frozen import choose_layers
from lightning_compressm.model.layers import SSMLayer, select_layers
from lightning_compressm.model.resizing import install_resize_hooks
from lightning_compressm.reduction.decide import decide, measure_spectra
from lightning_compressm.reduction.events import CompressionReport
from lightning_compressm.reduction.policy import (
    DEFAULT_OUTPUT_ERROR,
    BalanceChoice,
    HorizonChoice,
    ReductionPolicy,
    Selection,
)
from lightning_compressm.reduction.recorder import CallRecorder, Seen
from lightning_compressm.surgery.optimizer import checked_optimizers

__all__ = ["compress", "hankel_spectra"]


@torch.inference_mode(False)
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
    refit: bool = True,
    max_output_error: float | None = DEFAULT_OUTPUT_ERROR,
    layers: Sequence[str] | None = None,
    ignore: Sequence[str] | None = None,
    averages: Sequence[str] | None = None,
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
            of keyword arguments), or a list of several: gives ``horizon="auto"`` the length of the
            sequences, and is the calibration data that selective layers need.
        horizon: steps of time-limited Gramians, ``None`` for infinite, ``"auto"`` for the length
            seen in ``sample`` (infinite without one).
        balance: ``"auto"``, ``"real"``, ``"folded"`` or ``"complex"`` (as published).
        criterion: which states of selective layers stay: ``"averaged_lti"``, ``"empirical"``,
            ``"greedy"``, or the ablations ``"smallest"`` and ``"random"``; ``"auto"`` is the
            package's choice.
        selection: ``"largest"``, or the ablations ``"smallest"`` and ``"random"``.
        refit: let the rest of a selective layer make up for the states that go.
        max_output_error: refuse a cut of a selective layer that changes its output on the sample
            by more than this share (root mean squares); before that, try with more states.
            ``None`` for no limit.
        layers: glob patterns of module names to reduce; ``None`` for all.
        ignore: glob patterns of module names to leave alone.
        averages: glob patterns of layers that hold averages of others (EMA, target networks); they
            get the same projection as what they average.
        round_to: round the kept dimension up to a multiple.
        min_state_dim: never go below.
        share_state_dim: one dimension for all layers of a family.
        optimizers: optimizers that hold the model's parameters; they are carried along.

    Returns:
        A report with ``.events``, ``.table()``, ``.to_dict()`` and ``.plot()``.

    Raises:
        ValueError: for contradictory or out-of-range arguments, unknown layer patterns.
        UnsupportedLayerError: if the model has no SSM layer, one that can't be reduced, or a frozen
            copy of a trained one that neither ``averages`` nor ``ignore`` names.
        CalibrationError: if a selective layer was given no ``sample``, or the model fails on it.
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
        refit=refit,
        max_output_error=max_output_error,
        layers=layers,
        ignore=ignore,
        averages=averages,
        round_to=round_to,
        min_state_dim=min_state_dim,
        share_state_dim=share_state_dim,
    )
    optimizers = checked_optimizers(optimizers)
    chosen = choose_layers(model, layers, ignore, averages)
    decision = decide(model, chosen.layers, policy, _run_sample(model, chosen.layers, sample))
    change(model, decision.plan, optimizers, twins=chosen.twins)
    install_resize_hooks(model)
    return CompressionReport(list(decision.events), decision.spectra)


@torch.inference_mode(False)
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
        sample: one batch, or a list of several: gives ``horizon="auto"`` the length of the
            sequences, and is the calibration data that selective layers need.
        horizon: steps of time-limited Gramians, ``None`` for infinite.
        balance: as for :func:`compress`. For ``"real"`` the two HSVs of a conjugate pair add up to
            the value of their one complex state.

    Returns:
        Layer name -> float64 tensor, shape (N,), or (systems, N) for a bank of SISO systems. For
        selective layers, shape (N,), the values of the time-invariant systems that the layer is on
        average over the sample.

    Raises:
        UnsupportedLayerError: if the model has no SSM layer.
        CalibrationError: if a selective layer was given no ``sample``.
        CompreSSMError: for unstable or non-finite layers.

    Example:
        >>> from lightning_compressm.nn import LRU
        >>> hankel_spectra(LRU(1, 16))[""].shape
        torch.Size([16])
    """
    policy = ReductionPolicy(horizon=horizon, balance=balance)
    layers = select_layers(model)
    return measure_spectra(layers, policy, _run_sample(model, layers, sample))


def _run_sample(model: nn.Module, layers: Mapping[str, SSMLayer], sample: Any) -> Seen:
    if sample is None:
        return Seen()
    batches = sample if isinstance(sample, list) else [sample]
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        recorders = _record(model, layers, batches)
        changed = {name for recorder in recorders for name in recorder.changed}
        if changed:  # in place, by the model; so copies are kept
            recorders = _record(model, layers, batches, changed)
    finally:
        for module, training in modes.items():
            module.training = training
    return Seen.in_batches(recorders)


@torch.no_grad()
def _record(
    model: nn.Module,
    layers: Mapping[str, SSMLayer],
    batches: Sequence[Any],
    copied: Collection[str] = (),
) -> list[CallRecorder]:
    recorders = []
    for batch in batches:
        with CallRecorder(layers, copied) as recorder:
            _call(model, batch)
        recorders.append(recorder)
    return recorders


def _call(model: nn.Module, sample: Any) -> None:
    try:
        if isinstance(sample, Mapping):
            model(**sample)
        elif isinstance(sample, tuple):
            model(*sample)
        else:
            model(sample)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise CalibrationError(
            f"sample: {type(model).__name__} can't be run on it ({type(error).__name__}: {error}). "
            "Expected what the model is called with: a tensor, a tuple of positional arguments, a "
            "dict of keyword arguments, or a list of several of these."
        ) from error
