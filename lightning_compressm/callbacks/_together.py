"""Several :class:`CompreSSMCallback` in one Trainer, each for layers of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import lightning.pytorch as pl

from lightning_compressm.reduction.events import dimension_metrics

if TYPE_CHECKING:
    from lightning_compressm.callbacks.compressm import CompreSSMCallback

__all__ = ["all_together", "log_dimensions"]


def all_together(trainer: pl.Trainer) -> list[CompreSSMCallback]:
    """All that reduce the Trainer's model, in its order of callbacks."""
    from lightning_compressm.callbacks.compressm import CompreSSMCallback

    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, CompreSSMCallback)]


def log_dimensions(
    callback: CompreSSMCallback, trainer: pl.Trainer, pl_module: pl.LightningModule
) -> None:
    """Log the state dimensions; the first callback does it for all, as there is one sum of them."""
    together = all_together(trainer)
    if together[0] is not callback:
        return
    state_dims = {name: dim for c in together for name, dim in c.state_dims.items()}
    history = sorted((e for c in together for e in c.history), key=lambda e: e["step"])
    metrics = dimension_metrics(state_dims, history)
    pl_module.log_dict(metrics, sync_dist=trainer.world_size > 1)
