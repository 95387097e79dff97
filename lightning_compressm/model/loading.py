"""Loading checkpoints of reduced models into models of another size, strictly: all or nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_compressm._undo import all_or_nothing
from lightning_compressm.errors import CheckpointError
from lightning_compressm.model.files import read_checkpoint
from lightning_compressm.model.picture import ModelPicture
from lightning_compressm.model.resizing import install_resize_hooks, resize_all_plan
from lightning_compressm.nn._resize import lost_parts
from lightning_compressm.surgery.apply import Replacement, apply_plan
from lightning_compressm.surgery.optimizer import checked_optimizers, rebind_optimizers
from lightning_compressm.surgery.plan import TensorEdit

__all__ = ["load_compressed"]

ModuleT = TypeVar("ModuleT", bound=nn.Module)


@torch.inference_mode(False)
def load_compressed(
    model: ModuleT,
    checkpoint: str | PathLike[str] | Mapping[str, Any],
    *,
    optimizers: Iterable[Optimizer] | Optimizer = (),
) -> ModuleT:
    """Load a checkpoint of a reduced model into a model of any size, strictly.

    Args:
        model: built as for training; its SSM layers take the checkpoint's state dimensions.
        checkpoint: a file or folder (a Lightning checkpoint or plain state dict, read with
            ``weights_only=True``; safetensors; what transformers' ``save_pretrained`` or
            ``torch.distributed.checkpoint`` wrote), or the mapping that such a file holds.
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
    before = dict(model.named_parameters())
    # Copying into tensors without storage would silently leave the model empty.
    assign = any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    try:
        with all_or_nothing() as steps:
            steps.callback(ModelPicture(model).restore)
            apply_plan(model, resize_all_plan(model, state_dict, ""), steps)
            if lost := list(lost_parts(model, state_dict, "")):
                raise CheckpointError("; ".join(lost))
            model.load_state_dict(state_dict, assign=assign)
            rebind_optimizers(optimizers, _replaced(model, before), "reset")
    except Exception as error:
        raise CheckpointError(
            f"the checkpoint does not fit the model, which is left as it was: {error}"
        ) from error
    return model


def _replaced(model: nn.Module, before: Mapping[str, Tensor]) -> dict[str, Replacement]:
    """Which parameters are other objects than before, whether by a resize or by assignment."""
    return {
        name: Replacement(before[name], now, TensorEdit(now))
        for name, now in model.named_parameters()
        if now is not before[name]
    }


def _state_dict_of(checkpoint: str | PathLike[str] | Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(checkpoint, Mapping):
        nested = checkpoint.get("state_dict")
        content: Mapping[Any, Any] = nested if isinstance(nested, Mapping) else checkpoint
    elif isinstance(checkpoint, str | PathLike):
        content = read_checkpoint(Path(checkpoint)).state_dict
    else:  # open() would take a number for a file descriptor, and close it
        raise CheckpointError(f"expected a path or a mapping of tensors, got {checkpoint!r}.")
    if not all(isinstance(key, str) for key in content):
        raise CheckpointError("expected a state dict (a mapping of names to tensors), got others.")
    return content
