"""Carry out a :class:`~lightning_compressm.surgery.plan.SurgeryPlan`: all of it or nothing."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_compressm.errors import NonFiniteError, SurgeryError, UnsupportedLayerError
from lightning_compressm.surgery.plan import SurgeryPlan, TensorEdit
from lightning_compressm.surgery.undo import all_or_nothing

__all__ = ["Replacement", "apply_plan", "check_replaceable"]


@dataclass(frozen=True, eq=False)
class Replacement:
    """One tensor that was replaced: the old object, the new one, and the edit that did it.

    Example:
        >>> import torch
        >>> old, new = torch.zeros(4), torch.zeros(2)
        >>> Replacement(old, new, TensorEdit(new)).new.shape
        torch.Size([2])
    """

    old: Tensor
    new: Tensor
    edit: TensorEdit


@torch.inference_mode(False)  # its tensors could not be trained
def apply_plan(
    model: nn.Module, plan: SurgeryPlan, undo: ExitStack | None = None
) -> dict[str, Replacement]:
    """Replace tensors and attributes of ``model`` in place as ``plan`` says.

    New parameters are new objects with the dtype, device, ``requires_grad`` and custom attributes
    of the old ones, set in every module that owns the old object (tied weights stay tied).
    ``param.data = smaller`` would not do: autograd and fused optimizers keep the old shape.

    Args:
        model: any module; names in the plan are relative to it.
        plan: what to change.
        undo: is given what puts every old object back (the same objects, so that optimizers find
            them again); closing it takes the change back.

    Returns:
        Tensor name -> :class:`Replacement`, with which optimizers are rebound.

    Raises:
        SurgeryError: if a name is missing, or ranks or tied values disagree. Nothing was changed.
        UnsupportedLayerError: for parametrizations, and hooks after accumulation of gradients.
        NonFiniteError: if a new value holds NaN or infinity.

    Example:
        >>> layer, undo = nn.Linear(3, 4, bias=False), ExitStack()
        >>> plan = SurgeryPlan({"weight": TensorEdit(torch.zeros(2, 3))}, {"out_features": 2})
        >>> replaced = apply_plan(layer, plan, undo)
        >>> layer.weight.shape, layer.out_features
        (torch.Size([2, 3]), 2)
        >>> undo.close()
        >>> layer.weight.shape
        torch.Size([4, 3])
    """
    replacements = _prepare(model, plan)
    _tell_of_hooks(replacements)
    homes = {name: _resolve_attribute(model, name) for name in plan.attributes}
    with all_or_nothing(undo) as steps:
        for replacement in replacements.values():
            for owner, key in _owners(model, replacement.old):
                _set_tensor(owner, key, replacement.new)
                steps.callback(_set_tensor, owner, key, replacement.old)
        for name, value in plan.attributes.items():
            owner, key = homes[name]
            steps.callback(_attribute_restorer(owner, key))
            setattr(owner, key, value)
    return replacements


def check_replaceable(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse tensors that could not be replaced, before any time is spent on new values.

    Args:
        model: any module.
        names: of parameters and buffers.

    Raises:
        SurgeryError: if a name is missing.
        UnsupportedLayerError: for parametrizations, and hooks after accumulation of gradients.

    Example:
        >>> check_replaceable(nn.Linear(2, 2), ["weight"])
    """
    for name in names:
        _find_tensor(model, name)


def _prepare(model: nn.Module, plan: SurgeryPlan) -> dict[str, Replacement]:
    """Check every edit and build every new tensor before the first assignment."""
    replacements: dict[str, Replacement] = {}
    by_old: dict[int, Replacement] = {}
    for name, edit in plan.edits.items():
        old = _find_tensor(model, name)
        twin = by_old.get(id(old))
        if twin is not None and not _equal(twin.edit.value, edit.value):
            raise SurgeryError(
                f"'{name}' shares its tensor with another edited name, but the plan gives the two "
                "different values. Untie the layers, or keep one of them out with `ignore`."
            )
        replacement = twin or Replacement(old, _new_tensor(name, old, edit.value), edit)
        replacements[name] = by_old[id(old)] = replacement
    return replacements


def _tell_of_hooks(replacements: Mapping[str, Replacement]) -> None:
    hooked = [name for name, one in replacements.items() if one.new._backward_hooks]
    if hooked:
        warnings.warn(
            f"gradient hooks on {', '.join(map(repr, hooked))} go on with gradients of the new "
            "shape; hooks that keep sizes have to be set again",
            stacklevel=3,
        )


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and (a.is_meta or torch.equal(a, b))


def _new_tensor(name: str, old: Tensor, value: Tensor) -> Tensor:
    if old.ndim != value.ndim or old.is_complex() != value.is_complex():
        raise SurgeryError(
            f"'{name}': expected a value like shape {tuple(old.shape)} and dtype {old.dtype}, got "
            f"{tuple(value.shape)} and {value.dtype}. The layer's family wrote a wrong plan."
        )
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


def _find_tensor(model: nn.Module, name: str) -> Tensor:
    owner, key = _resolve(model, name)
    refuse_parametrized(owner, key)
    stores: dict[str, Tensor | None] = {**owner._buffers, **owner._parameters}
    tensor = stores.get(key)
    if tensor is None:
        raise SurgeryError(
            f"'{name}' is neither a parameter nor a buffer of the model. If an adapter (LoRA) "
            "wraps it, merge that first, or ignore this layer."
        )
    plain = type(tensor) in (nn.Parameter, Tensor, nn.Buffer)
    hooked = getattr(tensor, "_post_accumulate_grad_hooks", None)
    if not plain or hooked:
        what = "hooks after accumulation" if plain else f"type {type(tensor).__name__}"
        raise UnsupportedLayerError(
            f"'{name}' has {what}; expected a plain nn.Parameter without, since they can't be "
            "moved to a new one. Remove them or ignore this layer."
        )
    return tensor


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


def _resolve(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds the last part of a dotted name, and that part."""
    path, _, key = name.rpartition(".")
    try:
        return model.get_submodule(path), key
    except AttributeError as error:
        raise SurgeryError(f"'{name}': the model has no module '{path}'.") from error


def _resolve_attribute(model: nn.Module, name: str) -> tuple[Any, str]:
    """The object that holds the last part of a dotted name, also where it is no module."""
    path, _, key = name.rpartition(".")
    owner: Any = model
    for part in filter(None, path.split(".")):
        if not hasattr(owner, part):
            raise SurgeryError(f"'{name}': the model has no attribute '{path}'.")
        owner = getattr(owner, part)
    return owner, key


def _owners(model: nn.Module, tensor: Tensor) -> Iterator[tuple[nn.Module, str]]:
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for key, value in list(store.items()):
                if value is tensor:
                    yield module, key


def _set_tensor(owner: nn.Module, key: str, tensor: Tensor) -> None:
    store: dict[str, Any] = owner._parameters if key in owner._parameters else owner._buffers
    store[key] = tensor


def _attribute_restorer(owner: Any, key: str) -> Callable[[], None]:
    if not isinstance(owner, nn.Module) and hasattr(owner, "__dict__"):
        # Configs have properties that can't be set to what they give.
        return _content_restorer(vars(owner))
    if not hasattr(owner, key):
        return lambda: delattr(owner, key)
    old = getattr(owner, key)
    return lambda: setattr(owner, key, old)


def _content_restorer(content: dict[str, Any]) -> Callable[[], None]:
    before = dict(content)

    def restore() -> None:
        content.clear()
        content.update(before)

    return restore
