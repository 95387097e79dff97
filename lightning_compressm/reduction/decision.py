"""One decided reduction of a whole model: what is broadcast, kept until its time, and saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from lightning_compressm import _plain
from lightning_compressm.families import model_attributes
from lightning_compressm.model.layers import SSMLayer
from lightning_compressm.reduction.analysis import Cut
from lightning_compressm.reduction.events import LayerEvent
from lightning_compressm.surgery.plan import SurgeryPlan

__all__ = ["Decision", "Twins"]

Twins = Mapping[SSMLayer, Sequence[SSMLayer]]
"""Layers with tensors of their own, and for each the others that share all of them."""


@dataclass(frozen=True, eq=False)
class Decision:
    """A decided but not yet executed reduction of a model.

    Attributes:
        plan: the change, relative to the model; empty if nothing is to be done.
        events: one event for each layer that was looked at.
        spectra: layer name -> HSVs of each state, descending, on the CPU.

    Example:
        >>> bool(Decision().plan)
        False
    """

    plan: SurgeryPlan = field(default_factory=SurgeryPlan)
    events: Sequence[LayerEvent] = ()
    spectra: Mapping[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def of(
        model: nn.Module, twins: Twins, cuts: Sequence[Cut], spectra: Mapping[str, Tensor]
    ) -> Decision:
        """What cuts of the layers come to, with all that follows them elsewhere in the model."""
        plans: list[tuple[str, SurgeryPlan]] = []
        orders: dict[str, int] = {}
        for (layer, others), cut in zip(twins.items(), cuts, strict=True):
            orders[layer.path] = order = cut.event.new_state_dim
            if cut.plan:
                plans.append((layer.path, cut.plan))
                plans += ((other.path, _twin_plan(other, order)) for other in others)
        if plans:
            plans.append(("", SurgeryPlan({}, model_attributes(model, orders))))
        return Decision(SurgeryPlan.merge(plans), [cut.event for cut in cuts], spectra)

    def at(self, step: int, epoch: int) -> Decision:
        """The same decision, its events dated."""
        return replace(self, events=[replace(e, step=step, epoch=epoch) for e in self.events])

    def took(self, seconds: float) -> Decision:
        """The same decision, so much more time shared by the layers that are reduced, or by all."""
        reduced = [event for event in self.events if event.action == "reduce"]
        sharing = reduced or self.events
        events = [
            replace(e, seconds=e.seconds + seconds / len(sharing)) if e in sharing else e
            for e in self.events
        ]
        return replace(self, events=events)

    def skipped(self, reason: str) -> Decision:
        """What is left of a decision that was not carried out."""
        return Decision(events=[event.skipped(reason) for event in self.events])

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, strings, numbers and CPU tensors (loads with ``weights_only=True``)."""
        return {
            "plan": self.plan.to_dict(),
            "events": [event.to_dict() for event in self.events],
            "spectra": {name: sigma.detach().cpu() for name, sigma in self.spectra.items()},
        }

    @staticmethod
    def from_dict(data: object) -> Decision:
        """The inverse of :meth:`to_dict`.

        Raises:
            TypeError: or ``KeyError`` or ``ValueError``, if the data is damaged.
        """
        saved = _plain.mapping(data)
        events = [LayerEvent.from_dict(event) for event in _plain.items(saved["events"])]
        if not events:
            raise ValueError("expected a decision with events, got none")
        spectra = _plain.tensors(saved["spectra"])
        return Decision(SurgeryPlan.from_dict(saved["plan"]), events, spectra)


def _twin_plan(layer: SSMLayer, order: int) -> SurgeryPlan:
    """What is left to do for a layer whose tensors are another one's."""
    return SurgeryPlan({}, layer.family.attributes(layer.module, order))
