"""The empirical criterion that GHOST uses."""

from __future__ import annotations

import lightning as L

from benchmarks.arms._base import AfterTraining, cut_by_compress
from benchmarks.compare.bench import Bench


class Ghost(AfterTraining):
    name = "ghost"
    label = "GHOST-like criterion"
    about = (
        "The trained full model keeps the states with the largest product of empirical "
        "controllability and observability on calibration batches (as in arXiv 2602.11408). "
        "Selective layers only."
    )
    place = 12
    kinds = ("selective",)

    def cut(self, bench: Bench, module: L.LightningModule, size: int) -> None:
        cut_by_compress(bench, module, size, criterion="empirical", refit=False)
