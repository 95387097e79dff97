"""Analyse SSM layers: their Hankel singular values, and how many states each one needs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_compressm.control import (
    DiagonalLTI,
    constrain_order,
    hankel_singular_values,
    order_for_energy,
    order_for_fraction,
    per_state_energy,
)
from lightning_compressm.discovery import SSMLayer, select_layers
from lightning_compressm.errors import CompreSSMError
from lightning_compressm.policy import Balance, BalanceChoice, HorizonChoice, ReductionPolicy

__all__ = ["LayerAnalysis", "analyse_layer", "choose_orders", "measure_spectra", "naming"]


@dataclass(frozen=True, eq=False)
class LayerAnalysis:
    """One layer's system and spectrum.

    Attributes:
        layer: the layer.
        system: what it computes.
        balance: the balancing used, never ``"auto"``.
        horizon: steps of the Gramians, ``None`` for infinite.
        sigma: HSVs, one for each state, descending: (N,) or (systems, N).
        seconds: time taken.
    """

    layer: SSMLayer
    system: DiagonalLTI
    balance: Balance
    horizon: int | None
    sigma: Tensor
    seconds: float


def measure_spectra(
    model: nn.Module, policy: ReductionPolicy, lengths: Mapping[str, int]
) -> dict[str, Tensor]:
    """The spectra that a reduction would be decided on.

    Args:
        model: any module with SSM layers.
        policy: which layers, balance and horizon.
        lengths: layer name -> length of the sequences it processes.

    Returns:
        Layer name -> HSVs of each state, descending, on the layer's device.

    Raises:
        UnsupportedLayerError: if the model has no SSM layer.
        CompreSSMError: for unstable or non-finite layers.

    Example:
        >>> from lightning_compressm.nn import LRU
        >>> measure_spectra(LRU(1, 16), ReductionPolicy(), {"": 50})[""].shape
        torch.Size([16])
    """
    layers = select_layers(model, policy.layers, policy.ignore)
    return {name: analyse_layer(layer, policy, lengths).sigma for name, layer in layers.items()}


def analyse_layer(
    layer: SSMLayer, policy: ReductionPolicy, lengths: Mapping[str, int]
) -> LayerAnalysis:
    """Read a layer's system and compute its HSVs.

    Raises:
        NonFiniteError: if its parameters hold NaN or infinity.
        UnstableSystemError: if an eigenvalue lies outside the open unit disc.
    """
    start = time.perf_counter()
    with torch.no_grad(), naming(layer):
        system = layer.family.system(layer.module)
        system.check()
        balance = _resolve_balance(policy.balance, system)
        horizon = _resolve_horizon(policy.horizon, lengths.get(layer.name))
        sigma = hankel_singular_values(system, balance=balance, horizon=horizon)
        energy = per_state_energy(sigma, balance)
    return LayerAnalysis(layer, system, balance, horizon, energy, time.perf_counter() - start)


def _resolve_balance(balance: BalanceChoice, system: DiagonalLTI) -> Balance:
    if balance == "auto":
        return "real" if system.real_output else "complex"
    return balance


def _resolve_horizon(horizon: HorizonChoice, length: int | None) -> int | None:
    if isinstance(horizon, str):
        return length if length is not None and length > 1 else None
    return horizon


def choose_orders(analyses: Sequence[LayerAnalysis], policy: ReductionPolicy) -> list[int]:
    """The state dimension that each layer keeps under ``policy``, at most its current one."""
    orders = []
    for analysis in analyses:
        n = analysis.layer.state_dim
        if policy.state_dim is not None:
            order = min(policy.state_dim, n)
        elif policy.fraction is not None:
            order = order_for_fraction(n, policy.fraction)
        else:
            assert policy.tolerance is not None
            with naming(analysis.layer):
                order = order_for_energy(analysis.sigma, policy.tolerance)
        orders.append(
            constrain_order(order, n, min_state_dim=policy.min_state_dim, round_to=policy.round_to)
        )
    return orders


@contextmanager
def naming(layer: SSMLayer) -> Iterator[None]:
    """Errors of the analysis say which layer they are about."""
    try:
        yield
    except CompreSSMError as error:
        raise type(error)(f"layer '{layer.name}' ({layer.family.name}): {error}") from error
