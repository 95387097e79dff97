"""What an analysis of an SSM layer gives, whatever its kind, and how many states are kept."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from lightning_compressm.control import constrain_order, order_for_energy, order_for_fraction
from lightning_compressm.errors import CompreSSMError
from lightning_compressm.model.layers import SSMLayer
from lightning_compressm.reduction.policy import ReductionPolicy
from lightning_compressm.surgery.plan import SurgeryPlan

__all__ = ["Attempt", "LayerAnalysis", "choose_order", "naming"]


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """A reduction of one layer that could be carried out, or why there is none.

    Attributes:
        plan: the change, relative to the layer; ``None`` if the layer has to stay as it is.
        order: states that are left.
        energy_kept: share of the Hankel energy kept, in [0, 1].
        error_bound: bound on the H-infinity norm of the error, ``None`` where no theorem holds.
        output_error: measured error of the layer's output relative to its size, ``None`` if it was
            not measured.
        note: why the layer stays as it is, or what is special about the reduction.
        balance: the balancing that was used, or the criterion in a selective layer.
        horizon: the horizon that was used, ``None`` for infinite.
        seconds: time taken.

    Example:
        >>> Attempt(plan=None, order=8, note="all states are needed").order
        8
    """

    plan: SurgeryPlan | None
    order: int
    energy_kept: float = 1.0
    error_bound: float | None = None
    output_error: float | None = None
    note: str = ""
    balance: str = ""
    horizon: int | None = None
    seconds: float = 0.0


@dataclass(frozen=True, eq=False)
class LayerAnalysis(ABC):
    """One layer's spectrum, and how to reduce the layer.

    Attributes:
        layer: the layer.
        sigma: HSVs, one for each state, descending: (N,) or (systems, N).
        seconds: time taken by the analysis.
    """

    layer: SSMLayer
    sigma: Tensor = field(repr=False)
    seconds: float

    @abstractmethod
    def attempt(self, order: int, policy: ReductionPolicy, seed: int) -> Attempt:
        """Reduce to ``order`` states, or to the next higher number that keeps the promise."""

    def largest_order(self, policy: ReductionPolicy) -> int:
        """The most states that may be left for a reduction to be worth while."""
        n = self.layer.state_dim
        return min(n - 1, math.floor(n * (1 - policy.min_reduction) + 1e-9))

    def needed(self, order: int) -> str:
        """Why a layer that needs ``order`` states stays as it is."""
        n = self.layer.state_dim
        return f"{min(order, n)} or more of {n} states are needed"


def choose_order(analysis: LayerAnalysis, policy: ReductionPolicy) -> int:
    """The state dimension that a layer keeps under ``policy``, at most its current one.

    Example:
        >>> from lightning_compressm.model.layers import find_ssm_layers
        >>> from lightning_compressm.reduction.examination import analyse_layer
        >>> from lightning_compressm.nn import LRU
        >>> from lightning_compressm.reduction.recorder import Context
        >>> policy = ReductionPolicy(state_dim=3, round_to=2)
        >>> layer = find_ssm_layers(LRU(4, 8))[""]
        >>> choose_order(analyse_layer(layer, policy, Context()), policy)
        4
    """
    n = analysis.layer.state_dim
    if policy.state_dim is not None:
        order = min(policy.state_dim, n)
    elif policy.fraction is not None:
        order = order_for_fraction(n, policy.fraction)
    else:
        assert policy.tolerance is not None
        with naming(analysis.layer):
            order = order_for_energy(analysis.sigma, policy.tolerance)
    return constrain_order(order, n, min_state_dim=policy.min_state_dim, round_to=policy.round_to)


@contextmanager
def naming(layer: SSMLayer) -> Iterator[None]:
    """Errors of the analysis say which layer they are about."""
    try:
        yield
    except (CompreSSMError, ValueError) as error:
        raise type(error)(f"layer '{layer.name}' ({layer.family.name}): {error}") from error
