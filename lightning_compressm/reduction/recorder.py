"""What the layers see: lengths of sequences, and inputs for the layers that need data."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_compressm.model.layers import SSMLayer

__all__ = ["CallRecorder", "Seen"]


@dataclass(frozen=True)
class Seen:
    """What is known of the data that goes through the layers.

    Attributes:
        lengths: layer name -> longest sequence that it processes, in steps.
        inputs: name of a layer that needs data -> its inputs in the calibration batches.

    Example:
        >>> Seen(lengths={"lru": 64}).lengths["lru"]
        64
    """

    lengths: Mapping[str, int] = field(default_factory=dict)
    inputs: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)

    def on_cpu(self, name: str) -> Seen:
        """The same for one layer, its inputs on the CPU."""
        return Seen(self.lengths, {name: [x.cpu() for x in self.inputs.get(name, ())]})


class CallRecorder:
    """Records how layers are called while it is attached to them.

    Args:
        layers: to listen to.
        batches: how many calls of each layer that needs data to keep the inputs of; the latest.

    Attributes:
        lengths: layer name -> longest sequence in steps.
        inputs: name of a layer that needs data -> its latest inputs, detached.

    Example:
        >>> import torch
        >>> from lightning_compressm.model.layers import find_ssm_layers
        >>> from lightning_compressm.nn import LRU
        >>> layer = LRU(4, 8)
        >>> with CallRecorder(find_ssm_layers(layer)) as recorder:
        ...     _ = layer(torch.zeros(1, 20, 4))
        >>> recorder.lengths
        {'': 20}
    """

    def __init__(self, layers: Mapping[str, SSMLayer], batches: int = 1) -> None:
        self.lengths: dict[str, int] = {}
        self.inputs: dict[str, deque[Tensor]] = defaultdict(lambda: deque(maxlen=batches))
        self._handles: list[RemovableHandle] = [
            layer.module.register_forward_pre_hook(self._hook(layer), with_kwargs=True)
            for layer in layers.values()
        ]

    @property
    def seen(self) -> Seen:
        """All that was recorded."""
        return Seen(self.lengths, self.inputs)

    def close(self) -> None:
        """Detach from all layers."""
        while self._handles:
            self._handles.pop().remove()

    def __enter__(self) -> CallRecorder:
        """The recorder itself; it is attached from its construction on."""
        return self

    def __exit__(self, *_: object) -> None:
        """Detach."""
        self.close()

    def _hook(self, layer: SSMLayer) -> Any:
        def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            length = layer.family.sequence_length(args, kwargs)
            if length is not None:
                self.lengths[layer.name] = max(length, self.lengths.get(layer.name, 0))
            inputs = layer.family.inputs(args, kwargs) if layer.family.needs_data else None
            if inputs is not None:
                self.inputs[layer.name].append(inputs.detach())

        return record
