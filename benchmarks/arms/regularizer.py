"""A penalty on Hankel energy through all of training, and a cut at its end."""

from __future__ import annotations

import lightning as L

from benchmarks.arms._base import Arm, change_loss, cut_by_compress
from benchmarks.comparison.bench import Bench
from lightning_compressm import HankelRegularizer

# The penalty that training starts with, in units of the cross-entropy.
_SHARE = 0.1


class Regularized(Arm):
    name = "regularizer"
    label = "HSV regularisation"
    about = (
        f"The sum of all Hankel singular values (complex, infinite horizon) is a penalty in every "
        f"step, scaled to {_SHARE:g} at the start; the trained model is cut by `compress()` "
        "(cf. arXiv 2510.22951). Linear layers only."
    )
    place = 21
    kinds = ("linear",)
    one_training = True

    def train(self, bench: Bench, size: int | None) -> L.LightningModule:
        module = bench.fresh()
        unit = float(HankelRegularizer(1.0, balance="complex")(module).detach())
        penalty = HankelRegularizer(_SHARE / unit, balance="complex")
        undo = change_loss(module, lambda loss, batch: loss + penalty(module))
        bench.fit(module)
        undo()
        return module

    def cut(self, bench: Bench, module: L.LightningModule, size: int) -> None:
        cut_by_compress(bench, module, size)
