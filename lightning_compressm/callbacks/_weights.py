"""Which weights a run is about."""

from __future__ import annotations

from torch import nn

from lightning_compressm.callbacks import _lightning as pl

__all__ = ["Fingerprint", "fingerprint", "trained"]

Fingerprint = tuple[tuple[int, int], ...]


def trained(trainer: pl.Trainer) -> set[int]:
    """Ids of the parameters that optimizers hold and that get gradients."""
    groups = (group for optimizer in trainer.optimizers for group in optimizer.param_groups)
    return {id(p) for group in groups for p in group["params"] if p.requires_grad}


def fingerprint(module: nn.Module) -> Fingerprint:
    """Which tensors a model has, and how often they were changed in place."""
    tensors = (*module.parameters(), *module.buffers())
    return tuple((id(t), -1 if t.is_inference() else t._version) for t in tensors)
