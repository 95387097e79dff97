"""Averaged models that other callbacks keep: weight averaging, EMA, stochastic weight averaging."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_compressm.callbacks import _lightning as pl
from lightning_compressm.families import named_layers
from lightning_compressm.model.copies import ModelCopy, find_copies
from lightning_compressm.model.resizing import install_resize_hooks

__all__ = ["align_averages", "average_to_current", "averages_of", "install_hooks_on_averages"]

_AVERAGING = (pl.WeightAveraging, pl.StochasticWeightAveraging)


def averages_of(trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[nn.Module]:
    """Every average of the model or of a part of it that a callback holds.

    Any other copy may be a network of its own, such as a teacher.
    """
    held = _held_copies(trainer, pl_module)
    return [copy.root for callback, copy in held if _is_average(callback, copy)]


def _held_copies(
    trainer: pl.Trainer, pl_module: pl.LightningModule
) -> Iterator[tuple[pl.Callback, ModelCopy]]:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        held = [value for value in vars(callback).values() if isinstance(value, nn.Module)]
        for copy in find_copies(pl_module, held):
            yield callback, copy


def _is_average(callback: pl.Callback, copy: ModelCopy) -> bool:
    return isinstance(callback, _AVERAGING) or isinstance(copy.root, AveragedModel)


def install_hooks_on_averages(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Let averages load checkpoints of reduced models, those that are already there."""
    for average in averages_of(trainer, pl_module):
        install_resize_hooks(average)


def align_averages(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """An average of other state dimensions than the model's starts from the model's weights.

    It is left over where a reduced checkpoint was resumed that had been written without it. Copies
    that are no averages stay as they are, with a warning where one may have been meant as one.
    """
    for callback, copy in _held_copies(trainer, pl_module):
        average, same = _is_average(callback, copy), _same_dims(pl_module, copy)
        if average and not same:
            install_resize_hooks(copy.mirror)
            original = pl_module.get_submodule(copy.path)
            copy.mirror.load_state_dict(original.state_dict())
        elif same and not average:
            pl.rank_zero_warn(
                f"CompreSSMCallback leaves the {type(copy.mirror).__name__} that "
                f"{type(callback).__name__} holds as it is. If it is an average of the weights, "
                "make it a torch.optim.swa_utils.AveragedModel, and it is reduced along."
            )


def average_to_current(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """At the end of training, give the model the averaged weights, as its callback has done."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, pl.WeightAveraging):
            callback.on_train_end(trainer, pl_module)


def _same_dims(pl_module: nn.Module, copy: ModelCopy) -> bool:
    """Whether a copy has as many states as what it is a copy of."""
    return _state_dims(pl_module.get_submodule(copy.path)) == _state_dims(copy.mirror)


def _state_dims(module: nn.Module) -> dict[str, int]:
    return {path: family.state_dim(layer) for path, layer, family in named_layers(module)}
