"""The empirical criterion that GHOST uses."""

from __future__ import annotations

import lightning as L

from benchmarks.arms._base import AfterTraining
from benchmarks.comparison.bench import Bench
from benchmarks.comparison.tasks import CompareTask
from lightning_compressm import compress


class Ghost(AfterTraining):
    name = "ghost"
    label = "GHOST-like criterion"
    about = (
        "The trained full model keeps the states with the largest product of empirical "
        "controllability and observability on calibration batches (as in arXiv 2602.11408). "
        "Selective layers only."
    )
    place = 12

    def suits(self, task: CompareTask) -> bool:
        return task.kind == "selective"

    def cut(self, bench: Bench, module: L.LightningModule, size: int) -> None:
        compress(
            module,
            state_dim=size,
            sample=bench.sample(),
            criterion="empirical",
            refit=False,
            max_output_error=None,
        )
