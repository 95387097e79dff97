"""The callback without arguments, what its parts do for it, and others at the size it chooses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import lightning as L

from benchmarks.arms._base import Arm
from benchmarks.arms.published import Published
from benchmarks.compare.bench import Bench, TimedCompreSSM
from benchmarks.train.trainer import AfterEveryStep
from lightning_compressm.callbacks.schedule import BY_LOSS


class Bare(Arm):
    name = "bare"
    label = "CompreSSMCallback()"
    about = "No argument: cuts are tried on the loss, at three looks, and the size follows."
    place = 3
    own_size = True
    options: ClassVar[dict[str, Any]] = {}
    callback: ClassVar[type[TimedCompreSSM]] = TimedCompreSSM

    def train(self, bench: Bench, size: int | None) -> L.LightningModule:
        module = bench.fresh()
        compressm = self.callback(verbose=False, **self.options)
        bench.fit(module, [compressm, _AfterLastLook(bench, self.name)])
        return module


class _AfterLastLook(AfterEveryStep):
    """Arms that wait for the size need not wait longer: so they take turns with the others."""

    def __init__(self, bench: Bench, arm: str) -> None:
        self.bench, self.arm = bench, arm

    def after_step(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.global_step > BY_LOSS[1] * trainer.max_steps:
            self.bench.hand_on(self.arm, module)


class WithoutSpeed(Bare):
    name = "bare-steps-as-they-are"
    label = "the same, steps as they are"
    about = "The same with `learning_speed=False`."
    place = 80
    choice = True
    options: ClassVar[dict[str, Any]] = {"learning_speed": False}


class OwnGramians(TimedCompreSSM):
    """Tries cuts by the systems' own Gramians only."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        prepare = self._run.trials.prepare

        def without_task(*args: Any) -> Any:
            trial = prepare(*args)
            return None if trial is None else replace(trial, task={})

        vars(self._run.trials)["prepare"] = without_task


class WithoutTask(Bare):
    name = "bare-own-gramians"
    label = "the same, own Gramians only"
    about = "The same without task-aware candidates: only time-limited cuts are tried."
    place = 81
    choice = True
    callback = OwnGramians


class SmallAsBare(Arm):
    name = "small-as-bare"
    label = "small from scratch, as many states"
    about = "From scratch with as many states as the callback without arguments leaves."
    place = 82
    own_size = True
    needs = "bare"
    choice = True

    def train(self, bench: Bench, size: int | None) -> L.LightningModule:
        module = bench.fresh(bench.states_of("bare"))
        bench.fit(module)
        return module


class PublishedAsBare(Published):
    name = "published-as-bare"
    label = "CompreSSM as published, as many states"
    about = "The published reduction to as many states as the callback without arguments leaves."
    place = 83
    own_size = True
    needs = "bare"
    choice = True

    def train(self, bench: Bench, size: int | None) -> L.LightningModule:
        return super().train(bench, bench.states_of("bare"))
