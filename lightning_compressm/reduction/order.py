"""How many states stay: the one place that decides it, for all layers together."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from lightning_compressm.control import constrain_order, order_for_energy, order_for_fraction
from lightning_compressm.model.layers import SSMLayer
from lightning_compressm.reduction.policy import ReductionPolicy

__all__ = ["Order", "choose_orders", "level_orders", "smaller_cut"]

_NO_ENERGY = (
    "it has zero Hankel energy, since its inputs never reach its outputs (B or C is zero); give "
    "`state_dim` or `fraction` to reduce it all the same"
)


@dataclass(frozen=True)
class Order:
    """How many states a layer is to keep.

    Attributes:
        present: states that it has.
        wanted: states to keep.
        most: states that may be kept, where a cut needs more, for it to be worth while.
        step: kept numbers differ by multiples of this.
        refused: why the layer can't be cut at all; empty if it can.
        floor: states below which it is never cut.

    Example:
        >>> Order(present=64, wanted=62, most=60).needed()
        '62 or more of 64 states are needed'
    """

    present: int
    wanted: int
    most: int
    step: int = 1
    refused: str = ""
    floor: int = 0

    def needed(self) -> str:
        """Why a layer that needs so many states stays as it is."""
        if self.present <= self.floor:
            return f"it has not more than its least number of states, {self.floor}"
        needed = min(self.wanted, self.present)
        return f"{needed} or more of {self.present} states are needed"


def choose_orders(
    layers: Sequence[SSMLayer],
    spectra: Sequence[Tensor | None],
    policy: ReductionPolicy,
    floors: Mapping[str, int] | None = None,
) -> list[Order]:
    """How many states each layer is to keep under ``policy``, at most its present ones.

    Args:
        layers: all layers that are decided on together.
        spectra: their HSVs; ``None`` for a layer that could not be analysed.
        policy: energy, share or dimension; lower limit, multiple, and one for all of a family.
        floors: layer name -> least states under a ``loss_budget``; the policy's share of the
            present ones where left out.

    Returns:
        One order for each layer.

    Example:
        >>> import torch
        >>> from lightning_compressm.model.layers import find_ssm_layers
        >>> from lightning_compressm.nn import LRU
        >>> layers = list(find_ssm_layers(LRU(4, 8)).values())
        >>> policy = ReductionPolicy(state_dim=3, round_to=2)
        >>> choose_orders(layers, [torch.ones(8)], policy)[0].wanted
        4
    """
    pairs = zip(layers, spectra, strict=True)
    orders = [_order(layer, sigma, policy, _floor(layer, policy, floors)) for layer, sigma in pairs]
    if not policy.share_state_dim:
        return orders
    return level_orders(layers, orders, [order.wanted for order in orders])


def level_orders(
    layers: Sequence[SSMLayer], orders: Sequence[Order], reached: Sequence[int]
) -> list[Order]:
    """The same orders, raised to the largest that a layer of the same family reached.

    A layer keeps at most what it has.

    Args:
        layers: all layers.
        orders: theirs.
        reached: states that each of them needs.
    """
    largest: dict[str, int] = defaultdict(int)
    for layer, needed in zip(layers, reached, strict=True):
        largest[layer.family.name] = max(largest[layer.family.name], needed)
    return [
        replace(order, wanted=min(largest[layer.family.name], order.present))
        for layer, order in zip(layers, orders, strict=True)
    ]


def smaller_cut(order: Order) -> Order:
    """Half as large a cut, for a layer that can't do without all of the states of the first one.

    Example:
        >>> smaller_cut(Order(present=64, wanted=32, most=60)).wanted
        48
    """
    wanted = math.ceil((order.present + order.wanted) / 2)
    return replace(order, wanted=-(-wanted // order.step) * order.step)


def _floor(layer: SSMLayer, policy: ReductionPolicy, floors: Mapping[str, int] | None) -> int:
    if policy.loss_budget is None:
        return policy.min_state_dim
    least = (floors or {}).get(layer.name, math.ceil(layer.state_dim * policy.floor))
    return max(policy.min_state_dim, least)


def _order(layer: SSMLayer, sigma: Tensor | None, policy: ReductionPolicy, floor: int) -> Order:
    n = layer.state_dim
    most = min(n - 1, math.floor(n * (1 - policy.min_reduction) + 1e-9))
    order = Order(n, n, most, policy.round_to, floor=floor)
    if sigma is None:
        return order
    if policy.tolerance is not None and not bool(sigma.any()):
        return replace(order, refused=_NO_ENERGY)
    wanted = constrain_order(
        _wanted(n, sigma, policy), n, min_state_dim=floor, round_to=policy.round_to
    )
    return replace(order, wanted=wanted)


def _wanted(n: int, sigma: Tensor, policy: ReductionPolicy) -> int:
    if policy.state_dim is not None:
        return min(policy.state_dim, n)
    if policy.fraction is not None:
        return order_for_fraction(n, policy.fraction)
    if policy.loss_budget is not None:
        return math.ceil(n / 2)
    assert policy.tolerance is not None
    return order_for_energy(sigma, policy.tolerance)
