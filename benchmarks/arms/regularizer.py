"""A penalty on Hankel energy through all of training, and a cut at its end."""

from __future__ import annotations

from typing import ClassVar

import lightning as L

from benchmarks.arms._base import Arm, change_loss, cut_by_compress
from benchmarks.arms.choices import Choice
from benchmarks.compare.bench import Bench
from benchmarks.compare.tasks import CompareTask
from lightning_compressm import HankelRegularizer

# The best of 0.01, 0.1, 1 and 10 on seeds of their own; docs/defaults.md has the figures.
_BEST = {"digits": 1.0, "delay": 0.01, "pathfinder": 1.0, "listops": 1.0}


def best_start(task: CompareTask) -> float:
    """The penalty that training starts with, in units of the cross-entropy."""
    return _BEST.get(task.name, 0.1)


def penalty_of(module: L.LightningModule, start: float) -> HankelRegularizer:
    """A penalty that is `start` for the network as it is, in units of the cross-entropy."""
    unit = float(HankelRegularizer(1.0, balance="complex")(module).detach())
    return HankelRegularizer(start / unit, balance="complex")


class Regularized(Arm):
    name = "regularizer"
    label = "HSV regularisation"
    about = (
        "The sum of all Hankel singular values (complex, infinite horizon) is a penalty in every "
        "step, scaled at the start to 0.01, 0.1, 1 or 10, whichever was best on two other seeds; "
        "the trained model is cut by `compress()` (cf. arXiv 2510.22951). Linear layers only."
    )
    place = 21
    kinds = ("linear",)
    one_training = True

    def penalty_at_start(self, task: CompareTask) -> float:
        """In units of the cross-entropy."""
        return best_start(task)

    def train(self, bench: Bench, size: int | None) -> L.LightningModule:
        module = bench.fresh()
        penalty = penalty_of(module, self.penalty_at_start(bench.task))
        undo = change_loss(module, lambda loss, batch: loss + penalty(module))
        bench.fit(module)
        undo()
        return module

    def cut(self, bench: Bench, module: L.LightningModule, size: int) -> None:
        cut_by_compress(bench, module, size)


class Weighted(Regularized):
    """With one weight for all tasks."""

    choice = True
    start: ClassVar[float]

    def penalty_at_start(self, task: CompareTask) -> float:
        return self.start


class Weak(Weighted):
    name = "regularizer-weak"
    label = "HSV regularisation, 0.01"
    about = "The penalty starts at 0.01."
    place = 90
    start = 0.01


class Middle(Weighted):
    name = "regularizer-middle"
    label = "HSV regularisation, 0.1"
    about = "The penalty starts at 0.1."
    place = 91
    start = 0.1


class Strong(Weighted):
    name = "regularizer-strong"
    label = "HSV regularisation, 1"
    about = "The penalty starts at 1."
    place = 92
    start = 1.0


class Strongest(Weighted):
    name = "regularizer-strongest"
    label = "HSV regularisation, 10"
    about = "The penalty starts at 10."
    place = 93
    start = 10.0


class Penalized(Choice):
    name = "ours-penalized"
    label = "penalty up to the cut"
    about = "As ours, with the penalty of HSV regularisation in the steps before the cut."
    place = 86

    def prepare(self, bench: Bench, module: L.LightningModule) -> None:
        penalty = penalty_of(module, best_start(bench.task))
        end = bench.task.step_at(self.share)
        change_loss(
            module,
            lambda loss, batch: loss + penalty(module) if module.global_step < end else loss,
        )


class PenalizedLate(Penalized):
    name = "ours-late-penalized"
    label = "penalty up to a cut after 40%"
    about = "The same, cut after two fifths of the training."
    place = 87
    share = 0.4
