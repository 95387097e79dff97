"""How long a Trainer trains, as far as its limits say."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.callbacks import GradientAccumulationScheduler

__all__ = ["accumulation_changes", "is_last_step", "total_steps"]


def accumulation_changes(trainer: pl.Trainer) -> bool:
    """Whether a scheduler will accumulate gradients over several batches."""
    return any(
        isinstance(callback, GradientAccumulationScheduler)
        and callback.going_to_accumulate_grad_batches()
        for callback in trainer.callbacks  # type: ignore[attr-defined]
    )


def total_steps(trainer: pl.Trainer) -> float | None:
    """Optimizer steps of this run, ``None`` where Lightning can't know them."""
    if accumulation_changes(trainer):
        return None
    return float(trainer.estimated_stepping_batches)


def is_last_step(trainer: pl.Trainer) -> bool:
    """Whether nothing will be trained after this step, as far as the Trainer's limits say."""
    total = total_steps(trainer)
    return trainer.should_stop or (total is not None and 0 < total <= trainer.global_step)
