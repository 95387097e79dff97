"""The small size from the start."""

from __future__ import annotations

import lightning as L

from benchmarks.arms._base import Arm
from benchmarks.compare.bench import Bench


class Small(Arm):
    name = "small"
    label = "small from scratch"
    about = "Initialised and trained with the final number of states."
    place = 1

    def train(self, bench: Bench, size: int | None) -> L.LightningModule:
        module = bench.fresh(size)
        bench.fit(module)
        return module
