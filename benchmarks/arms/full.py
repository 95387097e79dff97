"""Nothing is reduced."""

from __future__ import annotations

import lightning as L

from benchmarks.arms._base import Arm
from benchmarks.compare.bench import Bench
from benchmarks.compare.subspace import SubspaceWatch


class Full(Arm):
    name = "full"
    label = "full"
    about = "All states all the time."
    place = 0
    own_size = True

    def train(self, bench: Bench, size: int | None) -> L.LightningModule:
        module = bench.fresh()
        watch = SubspaceWatch(bench)
        bench.fit(module, [watch])
        bench.measured.curves = watch.curves()
        return module
