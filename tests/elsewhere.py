"""Tensors that claim to lie on another device, and refuse to be mixed with those of the CPU.

They hold their data on the CPU, so that everything is computed; what they claim is torch's "meta",
the one device besides the CPU that every installation of torch knows. Whatever of the package takes
a tensor on the CPU and one of the model's in one operation fails here as on an accelerator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

from lightning_compressm import _tensors
from lightning_compressm.control import hankel
from lightning_compressm.model import layers

ELSEWHERE = torch.device("meta")
_aten = torch.ops.aten
# What may have tensors of both devices: copies, and indices on the CPU.
_CROSSING = {
    _aten.copy_.default,
    _aten._to_copy.default,
    _aten.index.Tensor,
    _aten.index_put.default,
    _aten.index_put_.default,
    _aten._index_put_impl_.default,
}
_held = WeakIdKeyDictionary()


class Claiming(Tensor):
    """A tensor on the CPU that says it is elsewhere."""

    @staticmethod
    def __new__(cls, held: Tensor) -> Claiming:
        held = held.resolve_conj().resolve_neg()
        made: Claiming = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=ELSEWHERE,
        )
        # Not an attribute: what takes a parameter's place gets all of these.
        _held[made] = held
        return made

    @classmethod
    def __torch_dispatch__(
        cls, operation: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        return _run(operation, arguments, options or {})


def here(tensor: Tensor) -> Tensor:
    """The same on the CPU."""
    tensor = tensor.detach()
    return _held[tensor] if isinstance(tensor, Claiming) else tensor


class Watching(TorchDispatchMode):
    """Sees operations without any such tensor too: those that make one."""

    def __torch_dispatch__(
        self, operation: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        return _run(operation, arguments, options or {})


def _run(operation: Any, arguments: Any, options: Any) -> Any:
    tensors = [t for t in tree_leaves((arguments, options)) if isinstance(t, Tensor)]
    claiming = any(isinstance(t, Claiming) for t in tensors)
    others = [t for t in tensors if not isinstance(t, Claiming) and t.ndim > 0]
    if claiming and others and operation not in _CROSSING:
        raise RuntimeError(f"{operation}: expected all tensors on the same device")
    device = options.get("device")
    goes_there = device is not None and torch.device(device) == ELSEWHERE
    inside = tree_map(lambda t: _held[t] if isinstance(t, Claiming) else t, options)
    if goes_there:
        inside["device"] = torch.device("cpu")
    result = operation(
        *tree_map(lambda t: _held[t] if isinstance(t, Claiming) else t, arguments), **inside
    )
    if operation is _aten.copy_.default:
        return arguments[0]
    if not goes_there and (device is not None or not claiming):
        return result
    if operation is _aten.index.Tensor and not isinstance(arguments[0], Claiming):
        raise RuntimeError("an index elsewhere can't be used on the CPU")
    written = {id(_held[t]): t for t in _written(operation, arguments, options)}
    return tree_map(lambda t: _claim(t, written), result)


def _written(operation: Any, arguments: Any, options: Any) -> list[Claiming]:
    """What is overwritten, and comes back as the same tensor."""
    given = dict(zip((a.name for a in operation._schema.arguments), arguments, strict=False))
    given |= options
    names = [a.name for a in operation._schema.arguments if a.alias_info and a.alias_info.is_write]
    return [given[name] for name in names if isinstance(given.get(name), Claiming)]


def _claim(value: Any, written: dict[int, Claiming]) -> Any:
    if not isinstance(value, Tensor) or isinstance(value, Claiming):
        return value
    return written[id(value)] if id(value) in written else Claiming(value)


def pretend(patch: pytest.MonkeyPatch) -> None:
    """Let torch and the package take such tensors for what they claim to be."""
    make, new, get, to_list = (
        torch.tensor, Tensor.new_tensor, Tensor.__getitem__, Tensor.tolist,
    )  # fmt: skip

    def tensor(data: Any, *, device: Any = None, **options: Any) -> Tensor:
        there = device is not None and torch.device(device) == ELSEWHERE
        made = make(data, device="cpu" if there else device, **options)
        return made.to(ELSEWHERE) if there else made

    def new_tensor(self: Tensor, data: Any, **options: Any) -> Tensor:
        if not isinstance(self, Claiming):
            return new(self, data, **options)
        return tensor(data, **{"dtype": self.dtype, "device": ELSEWHERE} | options)

    def getitem(self: Tensor, index: Any) -> Tensor:
        return get(self, make(index) if isinstance(index, list) else index)

    refused: Callable[[Tensor], str] = _tensors._refused
    patch.setattr(torch, "tensor", tensor)
    patch.setattr(Tensor, "new_tensor", new_tensor)
    patch.setattr(Tensor, "__getitem__", getitem)
    patch.setattr(Tensor, "tolist", lambda self: to_list(here(self)))
    # They are of a class of their own, on a device where otherwise no values are.
    patch.setattr(_tensors, "_refused", lambda t: "" if isinstance(t, Claiming) else refused(t))
    patch.setattr(layers, "_check_tensors", lambda layer: None)
    # What fails elsewhere is done again on the CPU, which would hide all of it.
    patch.setattr(hankel, "with_cpu_fallback", lambda compute, device: compute(device))
