"""Linear warm-up, then a cosine."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import torch


def warmup_cosine(step: int, total: int, warmup: float) -> float:
    """Factor of the learning rate: linear up over the first share `warmup`, then cosine to zero."""
    rise = max(1, round(warmup * total))
    if step < rise:
        return (step + 1) / rise
    progress = min(1.0, (step - rise) / max(1, total - rise))
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def planned_steps(trainer: L.Trainer) -> int:
    """Optimizer steps of the whole run, which a cosine needs to know."""
    total = trainer.estimated_stepping_batches
    if not math.isfinite(total) or total < 1:
        raise ValueError(
            f"a cosine needs the number of steps, got {total}: give the Trainer max_steps or "
            "max_epochs"
        )
    return int(total)


def with_warmup_cosine(
    optimizer: torch.optim.Optimizer, total: int, warmup: float
) -> dict[str, Any]:
    """What `configure_optimizers` returns for a schedule that moves with every step."""
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warmup_cosine(step, total, warmup)
    )
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
