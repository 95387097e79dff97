"""What the layers see: lengths of sequences, and inputs for the layers that need data."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_compressm.model.layers import SSMLayer

__all__ = ["Attached", "CallRecorder", "Kept", "Seen", "silent"]

RecorderT = TypeVar("RecorderT", bound="Attached")


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

    @staticmethod
    def in_batches(recorders: Iterable[CallRecorder]) -> Seen:
        """All that was recorded in several batches."""
        lengths: dict[str, int] = {}
        inputs: dict[str, list[Tensor]] = defaultdict(list)
        for recorder in recorders:
            for name, length in recorder.lengths.items():
                lengths[name] = max(length, lengths.get(name, 0))
            for name, calls in recorder.inputs.items():
                inputs[name] += (kept.tensor for kept in calls)
        return Seen(lengths, inputs)

    def on_cpu(self, name: str) -> Seen:
        """The same for one layer, its inputs on the CPU."""
        return Seen(self.lengths, {name: [x.cpu() for x in self.inputs.get(name, ())]})


class Kept:
    """The input of one call, and whether it still is what the layer was given.

    A model may go on to change it in place, or fill the same memory with the next batch.

    Args:
        inputs: of the call.
        copy: keep a copy, which nobody changes.
    """

    def __init__(self, inputs: Tensor, *, copy: bool) -> None:
        # An inference tensor counts no changes, and can't be used where gradients are wanted.
        safe = copy or inputs.is_inference()
        self.tensor = inputs.detach().clone() if safe else inputs.detach()
        self._version = None if self.tensor.is_inference() else self.tensor._version

    @property
    def intact(self) -> bool:
        """Whether nothing has changed the tensor since."""
        return self._version is None or self.tensor._version == self._version


class Attached:
    """Hooks that listen, from the construction on to the end of a ``with`` block.

    Example:
        >>> with Attached() as nothing:
        ...     nothing.handles
        []
    """

    def __init__(self) -> None:
        self.handles: list[RemovableHandle] = []

    def await_gradient(self, output: Tensor, hook: Callable[[Tensor], None]) -> None:
        """Call the hook when the gradient of an output is there, as long as this is attached."""
        handle: RemovableHandle = output.register_hook(hook)  # type: ignore[no-untyped-call]
        self.handles.append(handle)

    def close(self) -> None:
        """Remove all hooks; safe to call at any time."""
        while self.handles:
            self.handles.pop().remove()

    def __enter__(self: RecorderT) -> RecorderT:
        """The object itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Remove all hooks."""
        self.close()


class CallRecorder(Attached):
    """Records how layers are called in one batch, while it is attached to them.

    Args:
        layers: to listen to.
        copied: names of layers whose inputs have to be copied, since the model changes them.

    Attributes:
        lengths: layer name -> longest sequence in steps.
        inputs: name of a layer that needs data -> the inputs of all its calls.

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

    def __init__(self, layers: Mapping[str, SSMLayer], copied: Collection[str] = ()) -> None:
        super().__init__()
        self.lengths: dict[str, int] = {}
        self.inputs: dict[str, list[Kept]] = defaultdict(list)
        self._copied = copied
        self.handles += [
            layer.module.register_forward_pre_hook(_Hook(self, layer), with_kwargs=True)
            for layer in layers.values()
        ]

    @property
    def changed(self) -> set[str]:
        """Names of layers whose kept inputs were changed in place."""
        return {n for n, calls in self.inputs.items() if not all(kept.intact for kept in calls)}

    @property
    def seen(self) -> Seen:
        """All that was recorded."""
        return Seen.in_batches([self])

    def record(self, layer: SSMLayer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take note of a call."""
        length = layer.family.sequence_length(args, kwargs)
        if length is not None:
            self.lengths[layer.name] = max(length, self.lengths.get(layer.name, 0))
        inputs = layer.family.inputs(args, kwargs) if layer.family.needs_data else None
        if inputs is not None:
            self.inputs[layer.name].append(Kept(inputs, copy=layer.name in self._copied))


class _Hook:
    """Tells a recorder of calls; in a copy or a file of the module it does nothing."""

    def __init__(self, recorder: CallRecorder, layer: SSMLayer) -> None:
        self._recorder, self._layer = recorder, layer

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._recorder.record(self._layer, args, kwargs)

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return silent, ()


def silent() -> Callable[..., None]:
    """What a hook becomes in a copy or a file of a module."""
    return _ignore


def _ignore(*_: object) -> None:
    """The hook that is left in a copy."""
