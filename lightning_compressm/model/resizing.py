"""Layers take the state dimension of a checkpoint just before it is loaded.

A ``load_state_dict`` pre-hook on every SSM layer gives the layer the checkpoint's state dimension
just before its weights are copied. So ``Trainer.fit(ckpt_path=...)``, ``load_state_dict`` and
:func:`load_compressed` work with a model built at full size.

What does not fit is left for torch to name. Torch copies what fits before it raises; so that no
model is left with some layers of the one size and some of the other, the hook on the whole model
takes everything back where shapes or types disagree. It can't know ``strict``, so missing and
unexpected keys are torch's business alone; :func:`load_compressed` is all or nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from lightning_compressm.families import FamilyBase, find_family, model_attributes, named_layers
from lightning_compressm.model.picture import ModelPicture
from lightning_compressm.nn._resize import (
    lost_parts,
    resize_to_checkpoint,
    saved_tensors,
    tensors_in,
)
from lightning_compressm.surgery.apply import apply_plan
from lightning_compressm.surgery.plan import SurgeryPlan

__all__ = [
    "install_resize_hooks",
    "lacks_resize_hooks",
    "resize_all_plan",
    "resize_on_load",
]


def resize_on_load(
    module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *others: Any
) -> None:
    """A ``load_state_dict`` pre-hook: give an SSM layer the state dimension of its checkpoint.

    Does nothing where the checkpoint's tensors are missing or don't fit together, so that torch's
    own loading reports what is wrong.

    Args:
        module: an SSM layer of a registered family.
        state_dict: what is being loaded, with the whole model's names.
        prefix: where ``module`` lives in it.
        others: what else torch gives to such hooks; the last is its list of error messages.

    Example:
        >>> from lightning_compressm.nn import LRU
        >>> big, small = LRU(4, 8), LRU(4, 3)
        >>> big.load_state_dict(small.state_dict())
        <All keys matched successfully>
        >>> big.d_state
        3
    """
    family = find_family(module)
    if family is None:
        return
    saved = saved_tensors(state_dict, prefix)
    plan = _resize_plan(module, family, saved)[0]
    if plan:
        apply_plan(module, plan)
    if others:
        others[-1].extend(lost_parts(module, saved, prefix))


def install_resize_hooks(model: nn.Module) -> None:
    """Let ``model`` and each of its SSM layers load checkpoints of another state dimension.

    The hooks on the model itself also reach layers that are built later (Lightning's
    ``configure_model``), and leave it untouched where shapes disagree. Calling it again does
    nothing. ``load_from_checkpoint`` runs no callbacks: there, layers that have no hooks of their
    own (ours have) need this call at the end of the LightningModule's ``__init__``.

    A layer that takes another size gets new parameters: call ``load_state_dict`` before you make an
    optimizer, or :func:`load_compressed`, which takes optimizers along.

    Example:
        >>> from torch import nn
        >>> install_resize_hooks(nn.Linear(2, 2))  # no SSM layer: nothing to do
    """
    if not any(isinstance(h, _ModelHooks) for h in _hooks(model)):
        hooks = _ModelHooks()
        model._register_load_state_dict_pre_hook(hooks, with_module=True)  # type: ignore[no-untyped-call]
        model.register_load_state_dict_post_hook(hooks.after)  # type: ignore[no-untyped-call]
    for _, module, _ in named_layers(model):
        if not _resizes_itself(module):
            module._register_load_state_dict_pre_hook(resize_on_load, with_module=True)  # type: ignore[no-untyped-call]


def lacks_resize_hooks(model: nn.Module) -> list[str]:
    """Names of the SSM layers that can't load a checkpoint of another state dimension.

    Example:
        >>> from lightning_compressm.nn import LRU
        >>> lacks_resize_hooks(LRU(4, 8))  # ours bring theirs along
        []
    """
    if any(isinstance(hook, _ModelHooks) for hook in _hooks(model)):
        return []
    layers = named_layers(model)
    return [name for name, module, _ in layers if not _resizes_itself(module)]


def _resizes_itself(layer: nn.Module) -> bool:
    """Whether it has a hook, from :func:`install_resize_hooks` or, as ours, its own."""
    return any(hook in (resize_on_load, resize_to_checkpoint) for hook in _hooks(layer))


def _hooks(module: nn.Module) -> list[Callable[..., None]]:
    return [getattr(h, "hook", h) for h in module._load_state_dict_pre_hooks.values()]


class _ModelHooks:
    """Resizes all layers of a model before it is loaded; takes it back if torch then complains."""

    def __init__(self) -> None:
        self.undo: ExitStack | None = None
        self.errors: list[str] = []
        self.known = 0

    def __call__(
        self, model: nn.Module, state_dict: Mapping[str, Any], prefix: str, *others: Any
    ) -> None:
        """Before anything is copied."""
        undo = ExitStack()
        apply_plan(model, resize_all_plan(model, state_dict, prefix), undo)
        # Most loads succeed; only what is about to fail is worth a copy of all weights.
        if others and not _fits(model, state_dict, prefix):
            self.errors, self.known = others[-1], len(others[-1])
            undo.callback(ModelPicture(model).restore)
            self.undo = undo

    def after(self, model: nn.Module, incompatible: object) -> None:
        """After everything was copied."""
        undo, self.undo = self.undo, None
        if undo is not None and len(self.errors) > self.known:
            undo.close()
        self.errors = []


def resize_all_plan(model: nn.Module, state_dict: Mapping[str, Any], prefix: str) -> SurgeryPlan:
    """The plan that gives all layers of a model the state dimensions of saved tensors.

    It is one plan for all, so that tensors which they share stay shared. Its values mean nothing.

    Args:
        model: any module.
        state_dict: name -> saved tensor.
        prefix: where ``model`` lives in it.

    Example:
        >>> from lightning_compressm.nn import LRU
        >>> resize_all_plan(LRU(4, 8), LRU(4, 3).state_dict(), "").attributes
        {'d_state': 3}
    """
    plans, state_dims = [], {}
    for name, module, family in named_layers(model):
        inner = f"{prefix}{name}." if name else prefix
        plan, state_dim = _resize_plan(module, family, saved_tensors(state_dict, inner))
        if plan:
            plans.append((name, plan))
            state_dims[name] = state_dim
    if not plans:
        return SurgeryPlan()
    return SurgeryPlan.merge([*plans, ("", SurgeryPlan({}, model_attributes(model, state_dims)))])


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
    shapes = {name: tensor.shape for name, tensor in tensors_in(module.state_dict())}
    shapes |= {name: edit.value.shape for name, edit in plan.edits.items() if name in shapes}
    fits = all(
        saved[name].shape == shape if name in saved else name not in plan.edits
        for name, shape in shapes.items()
    )
    return (plan, state_dim) if fits else _NOTHING


def _fits(model: nn.Module, state_dict: Mapping[str, Any], prefix: str) -> bool:
    """Whether all that is there, of what the model has, can be copied or assigned to it."""
    for name, tensor in tensors_in(model.state_dict()):
        key = f"{prefix}{name}"
        if key not in state_dict:
            continue
        value = state_dict[key]
        if getattr(value, "shape", None) != tensor.shape:
            return False
        # Whole numbers can be copied into a parameter, but not take its place (`assign=True`).
        if isinstance(value, Tensor) and _trainable(tensor) and not _trainable(value):
            return False
    return not any(lost_parts(model, saved_tensors(state_dict, prefix), prefix))


def _trainable(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()
