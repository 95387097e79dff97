"""What a checkpoint says of its layers, with the model's class and without."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compressm.control import order_for_energy
from lightning_compressm.errors import CompreSSMError
from lightning_compressm.families import Family
from lightning_compressm.model.files import Checkpoint
from lightning_compressm.model.layers import SSMLayer, find_ssm_layers
from lightning_compressm.reduction.decide import measure_spectra
from lightning_compressm.reduction.policy import ReductionPolicy

__all__ = ["LayerFacts", "bare_model", "facts_of", "history_of"]


@dataclass(frozen=True)
class LayerFacts:
    """One layer.

    Attributes:
        name: in the model.
        family: its architecture.
        state_dim: its states.
        spectrum: its Hankel singular values, descending, (N,) or (systems, N); None if unknown.
        unknown: why they are.
    """

    name: str
    family: str
    state_dim: int
    spectrum: Tensor | None = field(default=None, repr=False)
    unknown: str = ""

    def states_for(self, tolerance: float) -> int | None:
        """States that are left if a share of the energy may go; None if nobody knows."""
        if self.spectrum is None or not bool(self.spectrum.any()):
            return None
        return order_for_energy(self.spectrum, tolerance)

    def to_dict(self, tolerances: Sequence[float]) -> dict[str, Any]:
        """Plain types."""
        return {
            "layer": self.name,
            "family": self.family,
            "state_dim": self.state_dim,
            "states_for_tolerance": {f"{t:g}": self.states_for(t) for t in tolerances},
            "hankel_singular_values": None if self.spectrum is None else self.spectrum.tolist(),
            "note": self.unknown,
        }


def bare_model(state_dict: Mapping[str, Any]) -> nn.Module:
    """Modules that hold the tensors of a state dict under their names, and do nothing else.

    Example:
        >>> bare_model({"net.lru.D": torch.ones(3)}).net.lru.D.shape
        torch.Size([3])
    """
    root = nn.Module()
    for name, value in state_dict.items():
        if not torch.is_tensor(value):
            continue
        *path, last = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            child = module._modules[part]
            assert child is not None
            module = child
        if last.isidentifier() and not hasattr(module, last):
            differentiable = value.is_floating_point() or value.is_complex()
            if differentiable:
                module.register_parameter(last, nn.Parameter(value, requires_grad=False))
            else:
                module.register_buffer(last, value)
    return root


def facts_of(model: nn.Module, *, bare: bool) -> list[LayerFacts]:
    """What is known of every layer.

    Args:
        model: built by its own code, or made of a state dict (``bare``): then only what follows
            from tensors is known, and layers that need more to be recognised are missing.
        bare: which of the two.
    """
    found = []
    for name, layer in find_ssm_layers(model).items():
        spectrum, unknown = _spectrum(layer, bare)
        found.append(LayerFacts(name, layer.family.name, layer.state_dim, spectrum, unknown))
    return found


def _spectrum(layer: SSMLayer, bare: bool) -> tuple[Tensor | None, str]:
    if not isinstance(layer.family, Family):
        return None, "depends on the data: compress --sample tells"
    try:
        (spectrum,) = measure_spectra({layer.name: layer}, ReductionPolicy()).values()
    except CompreSSMError as error:
        return None, "give --model" if bare else str(error).splitlines()[0]
    return spectrum.detach().cpu(), ""


def history_of(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Events of all callbacks, and of `compressm compress`, that a checkpoint knows of."""
    callbacks = checkpoint.rest.get("callbacks")
    states = list(callbacks.values()) if isinstance(callbacks, Mapping) else []
    events = sorted((e for state in states for e in _events(state)), key=lambda e: e["step"])
    return [*events, *_events(checkpoint.rest.get("compressm"))]


def _events(state: object) -> list[dict[str, Any]]:
    history = state.get("history") if isinstance(state, Mapping) else None
    if not isinstance(history, list):
        return []
    return [dict(event) for event in history if _is_event(event)]


def _is_event(event: object) -> bool:
    keys = {"layer", "action", "old_state_dim", "new_state_dim", "step"}
    return isinstance(event, Mapping) and keys <= event.keys()
