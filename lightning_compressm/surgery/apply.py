"""Carry out a :class:`~lightning_compressm.surgery.plan.SurgeryPlan`: all of it or nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compressm._tensors import new_like, replaceable, tell_of_hooks
from lightning_compressm._undo import all_or_nothing
from lightning_compressm.errors import SurgeryError
from lightning_compressm.surgery._configs import separate_configs
from lightning_compressm.surgery.plan import SurgeryPlan, TensorEdit

__all__ = ["Replacement", "apply_plan"]


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
    tell_of_hooks((name, one.new) for name, one in replacements.items())
    for name in plan.attributes:
        _resolve_attribute(model, name)
    with all_or_nothing(undo) as steps:
        for replacement in replacements.values():
            for owner, key in _owners(model, replacement.old):
                _set_tensor(owner, key, replacement.new)
                steps.callback(_set_tensor, owner, key, replacement.old)
        separate_configs(model, plan.attributes, steps)
        for name, value in plan.attributes.items():
            owner, key = _resolve_attribute(model, name)
            steps.callback(_attribute_restorer(owner, key))
            setattr(owner, key, value)
    return replacements


def _prepare(model: nn.Module, plan: SurgeryPlan) -> dict[str, Replacement]:
    """Check every edit and build every new tensor before the first assignment."""
    replacements: dict[str, Replacement] = {}
    by_old: dict[int, Replacement] = {}
    for name, edit in plan.edits.items():
        old = replaceable(model, name)
        twin = by_old.get(id(old))
        if twin is not None and not _equal(twin.edit.value, edit.value):
            raise SurgeryError(
                f"'{name}' shares its tensor with another edited name, but the plan gives the two "
                "different values. Untie the layers, or keep one of them out with `ignore`."
            )
        replacement = twin or Replacement(old, _new_tensor(name, old, edit.value), edit)
        replacements[name] = by_old[id(old)] = replacement
    return replacements


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and (a.is_meta or torch.equal(a, b))


def _new_tensor(name: str, old: Tensor, value: Tensor) -> Tensor:
    if old.ndim != value.ndim or old.is_complex() != value.is_complex():
        raise SurgeryError(
            f"'{name}': expected a value like shape {tuple(old.shape)} and dtype {old.dtype}, got "
            f"{tuple(value.shape)} and {value.dtype}. The layer's family wrote a wrong plan."
        )
    return new_like(name, old, value)


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
