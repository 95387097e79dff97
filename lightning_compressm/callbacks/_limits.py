"""How long a Trainer trains, as far as its limits say."""

from __future__ import annotations

from dataclasses import replace

from lightning_compressm.callbacks import _lightning as pl
from lightning_compressm.callbacks.schedule import Schedule

__all__ = ["accumulation_changes", "fitting", "is_last_step", "total_steps"]


def accumulation_changes(trainer: pl.Trainer) -> bool:
    """Whether a scheduler will accumulate gradients over several batches."""
    return any(
        isinstance(callback, pl.GradientAccumulationScheduler)
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


def fitting(schedule: Schedule, trainer: pl.Trainer) -> Schedule:
    """The schedule itself; of a ``fast_dev_run`` one that fits into its few steps."""
    if trainer.fast_dev_run and not schedule.is_share:  # type: ignore[attr-defined]
        # A few steps to see that all works must not fail for want of steps.
        return replace(schedule, window=(0.0, 1.0))
    return schedule
