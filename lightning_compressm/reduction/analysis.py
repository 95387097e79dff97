"""The contract of a kind of layer: what a look at one finds, and how it is cut.

A kind is a file of its own that registers a function by :func:`analyses`; families of that class of
families are then looked at by it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor

from lightning_compressm.control.task_aware import TaskGramians
from lightning_compressm.errors import UnsupportedLayerError
from lightning_compressm.model.layers import SSMLayer
from lightning_compressm.reduction.events import LayerEvent
from lightning_compressm.reduction.order import Order
from lightning_compressm.reduction.output_weights import OutputWeights
from lightning_compressm.reduction.policy import ReductionPolicy
from lightning_compressm.reduction.processes import Processes
from lightning_compressm.reduction.recorder import Seen
from lightning_compressm.surgery.plan import SurgeryPlan

__all__ = ["Analyser", "Analysis", "Cut", "Task", "analyse", "analyses"]


Task = TaskGramians | OutputWeights
"""What the loss asks of a layer: of its states, or of its outputs."""


@dataclass(frozen=True, eq=False)
class Cut:
    """A reduction of one layer that could be carried out, or why the layer stays as it is.

    Attributes:
        event: what comes of it.
        plan: the change, relative to the layer; empty if it stays.
    """

    event: LayerEvent
    plan: SurgeryPlan = field(default_factory=SurgeryPlan)


@dataclass(frozen=True, eq=False)
class Analysis(ABC):
    """One layer's spectrum, and how to cut the layer.

    Attributes:
        layer: the layer.
        sigma: HSVs, one for each state, descending: (N,) or (systems, N).
    """

    layer: SSMLayer
    sigma: Tensor = field(repr=False)

    @abstractmethod
    def cut(self, order: Order, policy: ReductionPolicy, seed: int) -> Cut:
        """Cut the layer to ``order.wanted`` states, or to more that ``order`` allows."""

    def task_cuts(self, order: Order, policy: ReductionPolicy, task: Task) -> list[Cut]:
        """Other cuts to ``order.wanted`` states, by what the loss asks of the layer, if any."""
        return []


Analyser = Callable[[SSMLayer, ReductionPolicy, Seen, Processes, bool], Analysis]
"""Looks at a layer: with the data seen and the processes that take part; the last argument says
that no cut will follow, so that nothing is computed for one."""

AnalyserT = TypeVar("AnalyserT", bound=Analyser)

_analysers: dict[type, Analyser] = {}


def analyses(kind: type) -> Callable[[AnalyserT], AnalyserT]:
    """Decorator: layers whose family is a ``kind`` are looked at by this function.

    Args:
        kind: a class of families; of several that fit a family, the closest counts.

    Example:
        >>> from lightning_compressm.families import Family
        >>> from lightning_compressm.reduction import decide
        >>> _analysers[Family].__name__
        'analyse_linear'
    """

    def register(analyser: AnalyserT) -> AnalyserT:
        _analysers[kind] = analyser
        return analyser

    return register


def analyse(
    layer: SSMLayer,
    policy: ReductionPolicy,
    seen: Seen,
    processes: Processes,
    *,
    spectrum_only: bool = False,
) -> Analysis:
    """Look at one layer as its kind asks for.

    Args:
        layer: it is not changed.
        policy: how.
        seen: what is known of the data.
        processes: those that hold other parts of the data.
        spectrum_only: no cut will follow, so nothing is computed for one.

    Raises:
        UnsupportedLayerError: if the layer's family is of no known kind.
        CompreSSMError: if the layer can't be analysed.
    """
    for kind in type(layer.family).__mro__:
        if kind in _analysers:
            return _analysers[kind](layer, policy, seen, processes, spectrum_only)
    raise UnsupportedLayerError(
        f"'{layer.name}': expected a family of one of the kinds "
        f"{', '.join(sorted(k.__name__ for k in _analysers))}, got {type(layer.family).__name__}."
    )
