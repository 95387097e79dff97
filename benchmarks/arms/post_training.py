"""Balanced truncation of the finished model."""

from __future__ import annotations

import lightning as L

from benchmarks.arms._base import AfterTraining
from benchmarks.comparison.bench import Bench
from lightning_compressm import compress


class PostTraining(AfterTraining):
    name = "post-training"
    label = "post-training truncation"
    about = "`compress()` of the trained full model; no training after it (cf. arXiv 2402.15993)."
    place = 10

    def cut(self, bench: Bench, module: L.LightningModule, size: int) -> None:
        compress(module, state_dim=size, sample=bench.sample(), max_output_error=None)
