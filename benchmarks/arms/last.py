"""Scores of single states, as LAST has them."""

from __future__ import annotations

import lightning as L
from torch import Tensor, nn

from benchmarks.arms._base import AfterTraining, keep_states
from benchmarks.compare.bench import Bench
from lightning_compressm.families import Family


class Last(AfterTraining):
    name = "last"
    label = "LAST-like scores"
    about = (
        "The trained full model keeps, as they are, the states with the largest H-infinity norm, "
        "norm of b times norm of c over 1 minus the radius (as in LAST, NeurIPS 2024; one size for "
        "all layers, so nothing is normalised between them). Linear layers only."
    )
    place = 11
    kinds = ("linear",)

    def cut(self, bench: Bench, module: L.LightningModule, size: int) -> None:
        keep_states(module, infinity_norms, size)


def infinity_norms(family: Family, layer: nn.Module) -> Tensor:
    """Largest gain of every state by itself over all frequencies, (N,)."""
    system = family.system(layer)
    gains = system.B.norm(dim=-1) * system.C.norm(dim=-2) / (1 - system.eigenvalues.abs())
    scores: Tensor = gains.detach()
    return scores
