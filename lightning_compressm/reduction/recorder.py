"""What is seen of the data: lengths of sequences, inputs of selective layers, other processes."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_compressm.families import SelectiveFamily
from lightning_compressm.model.layers import SSMLayer
from lightning_compressm.reduction.failures import Reach, TroubleError, describe, reach_of

__all__ = ["CallRecorder", "Context", "Processes"]

T = TypeVar("T")


class Processes:
    """The processes that decide together; this one stands for a process on its own.

    Attributes:
        rank: number of this process.
        size: how many there are.

    Example:
        >>> Processes().agree(3)
        3
    """

    rank: int = 0
    size: int = 1

    def add_up(self, total: Tensor) -> Tensor:
        """The sum of a tensor over all processes."""
        return total

    def agree(self, value: T) -> T:
        """The value that the first process has."""
        return self.give(value, 0)

    def give(self, value: T, owner: int) -> T:
        """The value that the process number ``owner`` has."""
        return value

    def together(self, work: Callable[[], T]) -> T:
        """Do something on all processes: it succeeds on all of them, or on none.

        Args:
            work: may exchange, and may contain further work of this kind.

        Raises:
            TroubleError: on all processes, if one met trouble that concerns one layer only.
            Exception: whatever else ``work`` raised; other processes raise as well.
        """
        try:
            return work()
        except Exception as error:
            reach = reach_of(error)
            if reach is Reach.RUN:
                raise
            raise TroubleError(reach, describe(error)) from error


@dataclass(frozen=True)
class Context:
    """What an analysis may know of the data.

    Attributes:
        lengths: layer name -> longest sequence that it processes, in steps.
        inputs: name of a selective layer -> its inputs in the calibration batches.
        processes: those that hold other parts of the calibration data.

    Example:
        >>> Context(lengths={"lru": 64}).lengths["lru"]
        64
    """

    lengths: Mapping[str, int] = field(default_factory=dict)
    inputs: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)
    processes: Processes = field(default_factory=Processes)


class CallRecorder:
    """Records how layers are called while it is attached to them.

    Args:
        layers: to listen to.
        batches: how many calls of each selective layer to keep the inputs of; the latest ones.

    Attributes:
        lengths: layer name -> longest sequence in steps.
        inputs: name of a selective layer -> its latest inputs, detached.

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
            if isinstance(layer.family, SelectiveFamily):
                inputs = layer.family.inputs(args, kwargs)
                if inputs is not None:
                    self.inputs[layer.name].append(inputs.detach())

        return record
