"""Tensors of modules: which of them may be replaced by others, and how those are made."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_compressm.errors import NonFiniteError, SurgeryError, UnsupportedLayerError

__all__ = ["module_and_key", "new_like", "refuse_parametrized", "replaceable", "tell_of_hooks"]


def module_and_key(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds the last part of a dotted name, and that part.

    Raises:
        SurgeryError: if there is no such module.
    """
    path, _, key = name.rpartition(".")
    try:
        return model.get_submodule(path), key
    except AttributeError as error:
        raise SurgeryError(f"'{name}': the model has no module '{path}'.") from error


def replaceable(model: nn.Module, name: str) -> Tensor:
    """The parameter or buffer of a name, if another one could take its place.

    Raises:
        SurgeryError: if there is none.
        UnsupportedLayerError: for parametrizations, tensors of special types, and hooks after
            accumulation of gradients or on the node that accumulates them.

    Example:
        >>> replaceable(nn.Linear(2, 3), "weight").shape
        torch.Size([3, 2])
    """
    owner, key = module_and_key(model, name)
    refuse_parametrized(owner, key)
    stores: dict[str, Tensor | None] = {**owner._buffers, **owner._parameters}
    tensor = stores.get(key)
    if tensor is None:
        raise SurgeryError(
            f"'{name}' is neither a parameter nor a buffer of the model. If an adapter (LoRA) "
            "wraps it, merge that first, or ignore this layer."
        )
    found = _refused(tensor)
    if found:
        raise UnsupportedLayerError(
            f"'{name}' has {found}; expected a plain nn.Parameter without, since they can't be "
            "moved to a new one. Remove them first, or ignore this layer."
        )
    return tensor


def _refused(tensor: Tensor) -> str:
    """What a new tensor would silently lose; empty if nothing."""
    if type(tensor) not in (nn.Parameter, Tensor):
        return f"type {type(tensor).__name__}"
    if getattr(tensor, "_post_accumulate_grad_hooks", None):
        return "hooks after accumulation"
    if _accumulation_hooks(tensor):
        return "hooks on the node that accumulates its gradient (AccumulateGrad)"
    return ""


def _accumulation_hooks(tensor: Tensor) -> list[Callable[..., Any]]:
    """Hooks on the node that writes a parameter's ``grad``.

    Torch does not list them, but those of one node share a dictionary, which a new one's handle
    knows. The node lives as long as somebody holds it; otherwise this is a new one without any.
    """
    if not (tensor.requires_grad and tensor.is_leaf) or tensor.is_inference():
        return []
    with torch.enable_grad():
        function: Any = tensor.expand_as(tensor).grad_fn
    node, found = function.next_functions[0][0], []
    for register in (node.register_hook, node.register_prehook):
        handle = register(lambda *gradients: None)
        found += [hook for key, hook in handle.hooks_dict_ref().items() if key != handle.id]
        handle.remove()
    return found


def refuse_parametrized(owner: nn.Module, key: str) -> None:
    """Raise :class:`UnsupportedLayerError` if a tensor is computed from others.

    Example:
        >>> refuse_parametrized(nn.Linear(2, 2), "weight")
    """
    if parametrize.is_parametrized(owner, key):
        raise UnsupportedLayerError(
            f"'{key}' of {type(owner).__name__} is parametrized; expected a plain parameter. "
            "Remove the parametrization (torch.nn.utils.parametrize.remove_parametrizations) or "
            "ignore this layer."
        )


def new_like(name: str, old: Tensor, value: Tensor) -> Tensor:
    """A tensor with another value, and else like the old one: type, device, attributes, hooks.

    Raises:
        NonFiniteError: if the value holds NaN or infinity.

    Example:
        >>> new_like("weight", nn.Parameter(torch.zeros(4)), torch.ones(2))
        Parameter containing:
        tensor([1., 1.], requires_grad=True)
    """
    new = value.detach().to(dtype=old.dtype, device=old.device, copy=True).contiguous()
    if not new.is_meta and not torch.isfinite(new).all():
        raise NonFiniteError(f"'{name}': the new value holds NaN or infinity; nothing was changed.")
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
        new.__dict__.update(old.__dict__)
        if old._backward_hooks:
            # The same dictionary, by whose handles the user may still remove them.
            new._backward_hooks = old._backward_hooks
    return new


def tell_of_hooks(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Warn of gradient hooks that were set on tensors of other shapes."""
    hooked = [name for name, tensor in tensors if tensor._backward_hooks]
    if hooked:
        warnings.warn(
            f"gradient hooks on {', '.join(map(repr, hooked))} go on with gradients of the new "
            "shape; hooks that keep sizes have to be set again",
            stacklevel=4,
        )
