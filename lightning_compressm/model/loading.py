"""Loading checkpoints of reduced models into models of another size.

A ``load_state_dict`` pre-hook on every SSM layer gives the layer the checkpoint's state dimension
just before its weights are copied. So ``Trainer.fit(ckpt_path=...)``, ``load_state_dict`` and
:func:`load_compressed` work with a model built at full size.

What does not fit is left for torch to name. Torch copies what fits before it raises; so that no
model is left with some layers of the one size and some of the other, the hook on the whole model
takes everything back where shapes or types disagree. It can't know ``strict``, so missing and
unexpected keys are torch's business alone; :func:`load_compressed` is all or nothing.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from os import PathLike
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_compressm.errors import CheckpointError
from lightning_compressm.model.picture import ModelPicture
from lightning_compressm.nn._resize import resize_to_checkpoint
from lightning_compressm.surgery.apply import AppliedSurgery, Replacement, apply_plan
from lightning_compressm.surgery.optimizer import checked_optimizers, rebind_optimizers
from lightning_compressm.surgery.plan import SurgeryPlan, TensorEdit

if TYPE_CHECKING:
    from lightning_compressm.families import FamilyBase

__all__ = [
    "install_resize_hooks",
    "lacks_resize_hooks",
    "load_compressed",
    "resize_all_plan",
    "resize_on_load",
]

ModuleT = TypeVar("ModuleT", bound=nn.Module)


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
    from lightning_compressm.families import find_family

    family = find_family(module)
    if family is None:
        return
    saved = _saved(state_dict, prefix)
    plan = _resize_plan(module, family, saved)[0]
    if plan:
        apply_plan(module, plan)
    if others:
        others[-1].extend(_lost_parts(module, saved, prefix))


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
        model.register_load_state_dict_pre_hook(hooks)  # type: ignore[no-untyped-call]
        model.register_load_state_dict_post_hook(hooks.after)  # type: ignore[no-untyped-call]
    from lightning_compressm.families import named_layers

    for _, module, _ in named_layers(model):
        if not _resizes_itself(module):
            module.register_load_state_dict_pre_hook(resize_on_load)  # type: ignore[no-untyped-call]


def lacks_resize_hooks(model: nn.Module) -> list[str]:
    """Names of the SSM layers that can't load a checkpoint of another state dimension.

    Example:
        >>> from lightning_compressm.nn import LRU
        >>> lacks_resize_hooks(LRU(4, 8))  # ours bring theirs along
        []
    """
    from lightning_compressm.families import named_layers

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
        self.picture: ModelPicture | None = None
        self.errors: list[str] = []
        self.known = 0

    def __call__(
        self, model: nn.Module, state_dict: Mapping[str, Any], prefix: str, *others: Any
    ) -> None:
        """Before anything is copied."""
        plan = resize_all_plan(model, state_dict, prefix)
        applied = apply_plan(model, plan)
        # Most loads succeed; only what is about to fail is worth a copy of all weights.
        if others and not _fits(model, state_dict, prefix):
            self.errors, self.known = others[-1], len(others[-1])
            self.picture = ModelPicture(model, applied)

    def after(self, model: nn.Module, incompatible: object) -> None:
        """After everything was copied."""
        picture, self.picture = self.picture, None
        if picture is not None and len(self.errors) > self.known:
            picture.restore()
        self.errors = []


def load_compressed(
    model: ModuleT,
    checkpoint: str | PathLike[str] | Mapping[str, Any],
    *,
    optimizers: Iterable[Optimizer] | Optimizer = (),
) -> ModuleT:
    """Load a checkpoint of a reduced model into a model of any size, strictly.

    Args:
        model: built as for training; its SSM layers take the checkpoint's state dimensions.
        checkpoint: a file (Lightning checkpoint or plain state dict, read with
            ``weights_only=True``) or the mapping that such a file holds.
        optimizers: those that were already made for ``model``: they go on with the new parameters
            of the layers that take another size, whose state starts anew. Load a saved state of an
            optimizer after this. One that is left out would go on with the old parameters.

    Returns:
        The same model.

    Raises:
        CheckpointError: if the file can't be read, holds no state dict, or does not fit. The
            model is as it was before.
        UnsupportedOptimizerError: for an optimizer that can't be carried along.

    Example:
        >>> from lightning_compressm.nn import LRU
        >>> load_compressed(LRU(4, 8), LRU(4, 3).state_dict()).d_state
        3
    """
    optimizers = checked_optimizers(optimizers)
    state_dict = _state_dict_of(checkpoint)
    install_resize_hooks(model)
    picture, before = ModelPicture(model), dict(model.named_parameters())
    # Copying into tensors without storage would silently leave the model empty.
    assign = any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    try:
        picture.applied = apply_plan(model, resize_all_plan(model, state_dict, ""))
        if lost := list(_lost_parts(model, state_dict, "")):
            raise CheckpointError("; ".join(lost))
        model.load_state_dict(state_dict, assign=assign)
        rebind_optimizers(optimizers, _replaced(model, before), "reset")
    except Exception as error:
        picture.restore()
        raise CheckpointError(
            f"the checkpoint does not fit the model, which is left as it was: {error}"
        ) from error
    return model


def _replaced(model: nn.Module, before: Mapping[str, Tensor]) -> AppliedSurgery:
    """Which parameters are other objects than before, whether by a resize or by assignment."""
    return AppliedSurgery(
        {
            name: Replacement(before[name], now, TensorEdit(now))
            for name, now in model.named_parameters()
            if now is not before[name]
        }
    )


def _state_dict_of(checkpoint: str | PathLike[str] | Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(checkpoint, int):  # open() would take it for a file descriptor, and close it
        raise CheckpointError(f"expected a path or a mapping of tensors, got {checkpoint!r}.")
    if not isinstance(checkpoint, Mapping):
        try:
            _check_sums(checkpoint)
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


def _check_sums(path: str | PathLike[str]) -> None:
    """Compare the check sums that torch.save writes, which torch.load does not look at."""
    if not zipfile.is_zipfile(path):
        return  # the format of before torch 1.6 has none
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        damaged = [name for name in names if not _is_whole(archive, name)]
    # All differ where torch.serialization.set_crc32_options(False) left them out.
    if damaged and len(damaged) < len(names):
        raise zipfile.BadZipFile(f"the file is damaged: wrong check sum of '{damaged[0]}'")


def _is_whole(archive: zipfile.ZipFile, name: str) -> bool:
    try:
        with archive.open(name) as record:
            while record.read(1 << 20):
                pass
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError, RuntimeError):
        return False
    return True


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
    shapes = {name: tensor.shape for name, tensor in _tensors_in(module.state_dict())}
    shapes |= {name: edit.value.shape for name, edit in plan.edits.items() if name in shapes}
    fits = all(
        saved[name].shape == shape if name in saved else name not in plan.edits
        for name, shape in shapes.items()
    )
    return (plan, state_dim) if fits else _NOTHING


def _fits(model: nn.Module, state_dict: Mapping[str, Any], prefix: str) -> bool:
    """Whether all that is there, of what the model has, can be copied or assigned to it."""
    for name, tensor in _tensors_in(model.state_dict()):
        key = f"{prefix}{name}"
        if key not in state_dict:
            continue
        value = state_dict[key]
        if getattr(value, "shape", None) != tensor.shape:
            return False
        # Whole numbers can be copied into a parameter, but not take its place (`assign=True`).
        if isinstance(value, Tensor) and _trainable(tensor) and not _trainable(value):
            return False
    return not any(_lost_parts(model, _saved(state_dict, prefix), prefix))


def _trainable(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _lost_parts(module: nn.Module, saved: Mapping[str, Any], prefix: str) -> Iterator[str]:
    """Saved complex tensors that are real here; torch would drop imaginary parts, and only warn."""
    for name, tensor in _tensors_in(module.state_dict()):
        value = saved.get(name)
        if not isinstance(value, Tensor) or tensor.is_complex() or not value.is_complex():
            continue
        if not value.is_meta and bool(value.imag.any()):
            yield (
                f"'{prefix}{name}': expected a real tensor, got {value.dtype}. The checkpoint is "
                "of another kind of layer."
            )


def _tensors_in(state_dict: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Tensors that have a shape: lazy ones take any."""
    return (
        (name, tensor)
        for name, tensor in state_dict.items()
        if isinstance(tensor, Tensor) and not is_lazy(tensor)
    )


def _saved(state_dict: Mapping[str, Any], prefix: str) -> dict[str, Tensor]:
    """The saved tensors of one module, by the module's own names."""
    for key in state_dict:
        if not isinstance(key, str):
            raise CheckpointError(f"expected names of tensors as keys, got {key!r}.")
    return {
        key.removeprefix(prefix): value
        for key, value in state_dict.items()
        if key.startswith(prefix) and isinstance(value, Tensor)
    }
