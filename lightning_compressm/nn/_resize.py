"""Layers that take the number of states of a checkpoint, just before its weights are copied."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_compressm._tensors import new_like, replaceable, tell_of_hooks
from lightning_compressm.errors import CheckpointError, SurgeryError

__all__ = ["ResizableLayer", "lost_parts", "resize_to_checkpoint", "saved_tensors", "tensors_in"]


class ResizableLayer(nn.Module):
    """A layer that a checkpoint with another number of states resizes when it is loaded.

    It gets new parameters then, so make optimizers after loading. What is missing in the checkpoint
    or does not fit together is left for torch to report, and the layer as it is.

    Attributes:
        state_axes: names of the tensors that have a state dimension -> which one it is. A subclass
            with more of them adds its own.
        d_state: the number of states.
    """

    state_axes: ClassVar[Mapping[str, int]]
    d_state: int

    def __init__(self) -> None:
        super().__init__()
        # Public from torch 2.5 only, where it does the same.
        self._register_load_state_dict_pre_hook(resize_to_checkpoint, with_module=True)  # type: ignore[no-untyped-call]


def resize_to_checkpoint(
    layer: ResizableLayer, state_dict: Mapping[str, Any], prefix: str, *others: Any
) -> None:
    """The ``load_state_dict`` pre-hook of a :class:`ResizableLayer`.

    Args:
        layer: the layer.
        state_dict: what is being loaded, with the whole model's names.
        prefix: where ``layer`` lives in it.
        others: what else torch gives to such hooks; the last is its list of error messages.

    Raises:
        CheckpointError: a key of ``state_dict`` is no text.
        NonFiniteError, SurgeryError, UnsupportedLayerError: a tensor of the layer can't be
            replaced. Nothing was changed.
    """
    current = _state_tensors(layer)
    if not current:
        return
    saved = saved_tensors(state_dict, prefix)
    states = _states_to_take(layer, current, saved)
    if states is not None:
        _resize(layer, current, states)
    if others:
        others[-1].extend(lost_parts(layer, saved, prefix))


def _state_tensors(layer: ResizableLayer) -> dict[str, Tensor]:
    """The tensors of the table; empty where one is gone or parametrized, or they do not agree."""
    own = {**layer._buffers, **layer._parameters}
    tensors: dict[str, Tensor] = {}
    sizes = set()
    for name, axis in layer.state_axes.items():
        tensor = own.get(name)
        if tensor is None or tensor.ndim <= axis:
            return {}
        tensors[name] = tensor
        sizes.add(tensor.shape[axis])
    return tensors if len(sizes) == 1 else {}


def _states_to_take(
    layer: ResizableLayer, current: Mapping[str, Tensor], saved: Mapping[str, Tensor]
) -> int | None:
    """The checkpoint's number of states, if the layer has another one and all of it would fit."""
    same_ndim = (n for n, t in current.items() if n in saved and saved[n].ndim == t.ndim)
    name = next(same_ndim, None)
    if name is None:
        return None
    axis = layer.state_axes[name]
    states = saved[name].shape[axis]
    if states in (0, current[name].shape[axis]):
        return None
    for name, tensor in tensors_in(layer.state_dict()):
        shape = list(tensor.shape)
        if name in current:
            shape[layer.state_axes[name]] = states
        # Other tensors may be missing, and then keep what they hold.
        if list(saved[name].shape) != shape if name in saved else name in current:
            return None
    return states


@torch.inference_mode(False)  # its tensors could not be trained
def _resize(layer: ResizableLayer, current: Mapping[str, Tensor], states: int) -> None:
    """Check and build all new tensors, then put them in place of the old ones wherever these are.

    Leading states are kept and new ones repeat the last: the checkpoint overwrites them.
    """
    replacements: dict[int, Tensor] = {}
    for name, old in current.items():
        new = _with_states(replaceable(layer, name), layer.state_axes[name], states)
        new = new_like(name, old, new)
        if replacements.setdefault(id(old), new).shape != new.shape:
            raise SurgeryError(
                f"'{name}' shares its tensor with another one that has its states along another "
                f"axis, so the layer can't take {states} states. Untie the two."
            )
    tell_of_hooks((name, replacements[id(old)]) for name, old in current.items())
    name = next(iter(current))
    if layer.d_state == current[name].shape[layer.state_axes[name]]:
        layer.d_state = states
    for module in layer.modules():
        stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for store in stores:
            store.update(
                (k, replacements[id(t)]) for k, t in store.items() if id(t) in replacements
            )


def _with_states(old: Tensor, axis: int, states: int) -> Tensor:
    index = torch.arange(states, device=old.device).clamp_(max=old.shape[axis] - 1)
    return old.detach().index_select(axis, index)


def lost_parts(module: nn.Module, saved: Mapping[str, Any], prefix: str) -> Iterator[str]:
    """Saved complex tensors that are real here; torch would drop imaginary parts, and only warn."""
    for name, tensor in tensors_in(module.state_dict()):
        value = saved.get(name)
        if not isinstance(value, Tensor) or tensor.is_complex() or not value.is_complex():
            continue
        if not value.is_meta and bool(value.imag.any()):
            yield (
                f"'{prefix}{name}': expected a real tensor, got {value.dtype}. The checkpoint is "
                "of another kind of layer."
            )


def tensors_in(state_dict: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Tensors that have a shape: lazy ones take any."""
    return (
        (name, tensor)
        for name, tensor in state_dict.items()
        if isinstance(tensor, Tensor) and not is_lazy(tensor)
    )


def saved_tensors(state_dict: Mapping[str, Any], prefix: str) -> dict[str, Tensor]:
    """The saved tensors of one module, by the module's own names."""
    for key in state_dict:
        if not isinstance(key, str):
            raise CheckpointError(f"expected names of tensors as keys, got {key!r}.")
    return {
        key.removeprefix(prefix): value
        for key, value in state_dict.items()
        if key.startswith(prefix) and isinstance(value, Tensor)
    }
