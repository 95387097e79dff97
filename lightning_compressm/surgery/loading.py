"""Loading checkpoints of reduced models into models of another size.

A ``load_state_dict`` pre-hook on every SSM layer gives the layer the checkpoint's state dimension
just before its weights are copied. So ``Trainer.fit(ckpt_path=...)``, ``load_state_dict`` and
:func:`load_compressed` work with a model built at full size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from os import PathLike
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_compressm.errors import CheckpointError
from lightning_compressm.surgery.apply import AppliedSurgery, apply_plan
from lightning_compressm.surgery.plan import SurgeryPlan

if TYPE_CHECKING:
    from lightning_compressm.families import FamilyBase

__all__ = ["install_resize_hooks", "lacks_resize_hooks", "load_compressed", "resize_on_load"]

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def resize_on_load(
    module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: object
) -> None:
    """A ``load_state_dict`` pre-hook: give an SSM layer the state dimension of its checkpoint.

    Does nothing where the checkpoint's tensors are missing or don't fit together, so that torch's
    own strict loading reports what is wrong.

    Args:
        module: an SSM layer of a registered family.
        state_dict: what is being loaded, with the whole model's names.
        prefix: where ``module`` lives in it.

    Example:
        >>> from lightning_compressm.nn import LRU
        >>> big, small = LRU(4, 8), LRU(4, 3)
        >>> big.load_state_dict(small.state_dict())
        <All keys matched successfully>
        >>> big.d_state
        3
    """
    from lightning_compressm.families import find_family

    family = find_family(module)
    if family is None:
        return
    plan = _resize_plan(module, family, _saved(state_dict, prefix))[0]
    if plan:
        apply_plan(module, plan)


def install_resize_hooks(model: nn.Module) -> None:
    """Let ``model`` and each of its SSM layers load checkpoints of another state dimension.

    The hook on the model itself also reaches layers that are built later (Lightning's
    ``configure_model``). Calling it again does nothing.

    Example:
        >>> from torch import nn
        >>> install_resize_hooks(nn.Linear(2, 2))  # no SSM layer: nothing to do
    """
    _install(model, _resize_layers_on_load)
    from lightning_compressm.families import named_layers

    for _, module, _ in named_layers(model):
        _install(module, resize_on_load)


def lacks_resize_hooks(model: nn.Module) -> list[str]:
    """Names of the SSM layers that can't load a checkpoint of another state dimension.

    Example:
        >>> from lightning_compressm.nn import LRU
        >>> lacks_resize_hooks(LRU(4, 8))  # ours bring theirs along
        []
    """
    from lightning_compressm.families import named_layers

    if _has(model, _resize_layers_on_load):
        return []
    return [name for name, module, _ in named_layers(model) if not _has(module, resize_on_load)]


def _has(module: nn.Module, hook: Callable[..., None]) -> bool:
    present = module._load_state_dict_pre_hooks.values()
    return any(getattr(other, "hook", other) is hook for other in present)


def _install(module: nn.Module, hook: Callable[..., None]) -> None:
    if not _has(module, hook):
        module.register_load_state_dict_pre_hook(hook)  # type: ignore[no-untyped-call]


def _resize_layers_on_load(
    model: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: object
) -> None:
    plan = _resize_all_plan(model, state_dict, prefix)
    if plan:
        apply_plan(model, plan)


def load_compressed(model: ModuleT, checkpoint: str | PathLike[str] | Mapping[str, Any]) -> ModuleT:
    """Load a checkpoint of a reduced model into a model of any size, strictly.

    Args:
        model: built as for training; its SSM layers take the checkpoint's state dimensions.
        checkpoint: a file (Lightning checkpoint or plain state dict, read with
            ``weights_only=True``) or the mapping that such a file holds.

    Returns:
        The same model.

    Raises:
        CheckpointError: if the file can't be read, holds no state dict, or does not fit. The
            model is as it was before.

    Example:
        >>> from lightning_compressm.nn import LRU
        >>> load_compressed(LRU(4, 8), LRU(4, 3).state_dict()).d_state
        3
    """
    state_dict = _state_dict_of(checkpoint)
    install_resize_hooks(model)
    applied = AppliedSurgery()
    before = deepcopy(model.state_dict())
    # Copying into tensors without storage would silently leave the model empty.
    assign = any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    try:
        applied = apply_plan(model, _resize_all_plan(model, state_dict, ""))
        model.load_state_dict(state_dict, assign=assign)
    except Exception as error:
        applied.undo()
        model.load_state_dict(before, assign=assign)
        raise CheckpointError(
            f"the checkpoint does not fit the model, which is left as it was: {error}"
        ) from error
    return model


def _state_dict_of(checkpoint: str | PathLike[str] | Mapping[str, Any]) -> Mapping[str, Any]:
    if not isinstance(checkpoint, Mapping):
        try:
            checkpoint = torch.load(checkpoint, map_location="cpu", weights_only=True)
        except Exception as error:
            raise CheckpointError(
                f"can't read '{checkpoint}' with weights_only=True: {error}. Expected a Lightning "
                "checkpoint or a file written by torch.save(model.state_dict(), path)."
            ) from error
    content: Any = checkpoint
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
        raise CheckpointError(
            f"expected a state dict (a mapping of names to tensors), got {type(content).__name__}."
        )
    return content


def _resize_all_plan(model: nn.Module, state_dict: Mapping[str, Any], prefix: str) -> SurgeryPlan:
    """One plan for all layers, so that tensors which they share stay shared."""
    from lightning_compressm.families import model_attributes, named_layers

    plans, state_dims = [], {}
    for name, module, family in named_layers(model):
        inner = f"{prefix}{name}." if name else prefix
        plan, state_dim = _resize_plan(module, family, _saved(state_dict, inner))
        if plan:
            plans.append(plan.prefixed(name))
            state_dims[name] = state_dim
    if not plans:
        return SurgeryPlan()
    return SurgeryPlan.merge([*plans, SurgeryPlan({}, model_attributes(model, state_dims))])


_NOTHING: tuple[SurgeryPlan, int] = (SurgeryPlan(), 0)


def _resize_plan(
    module: nn.Module, family: FamilyBase, saved: Mapping[str, Tensor]
) -> tuple[SurgeryPlan, int]:
    """The plan that gives a layer the state dimension of its checkpoint, and that dimension."""
    state_dim = family.state_dim_in(module, saved)
    if state_dim is None or state_dim < 1 or state_dim == family.state_dim(module):
        return _NOTHING
    plan = family.resize_plan(module, state_dim)
    # Buffers that are not saved follow without being asked.
    own = module.state_dict().keys()
    shapes = {n: e.value.shape for n, e in plan.edits.items() if n in own}
    fits = all(n in saved and saved[n].shape == shape for n, shape in shapes.items())
    return (plan, state_dim) if fits else _NOTHING


def _saved(state_dict: Mapping[str, Any], prefix: str) -> dict[str, Tensor]:
    """The saved tensors of one module, by the module's own names."""
    return {
        key.removeprefix(prefix): value
        for key, value in state_dict.items()
        if key.startswith(prefix) and isinstance(value, Tensor)
    }
