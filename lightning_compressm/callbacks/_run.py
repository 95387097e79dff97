"""What one run of a Trainer goes through: looks, decisions, changes, and ways back."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_compressm.callbacks import _lightning as pl
from lightning_compressm.callbacks._checkpoint import CallbackState
from lightning_compressm.callbacks._limits import fitting, is_last_step, total_steps
from lightning_compressm.callbacks._losses import LossWatch
from lightning_compressm.callbacks._pictures import ReductionPictures
from lightning_compressm.callbacks._ranks import decide_together
from lightning_compressm.callbacks._rollback import RollbackGuard
from lightning_compressm.callbacks._show import StepClock, count_parameters, show_events
from lightning_compressm.callbacks._speed import SpeedKeeper
from lightning_compressm.callbacks._strategy import swap
from lightning_compressm.callbacks._trial import Batch, LossTrials
from lightning_compressm.callbacks._watch import TrainingWatch
from lightning_compressm.callbacks._weights import Fingerprint, fingerprint, trained
from lightning_compressm.callbacks.schedule import Looks, Schedule
from lightning_compressm.errors import NonFiniteError, add_note
from lightning_compressm.model.frozen import ChosenLayers, choose_layers
from lightning_compressm.model.layers import SSMLayer, select_layers
from lightning_compressm.reduction.decide import decide
from lightning_compressm.reduction.decision import Decision
from lightning_compressm.reduction.failures import TroubleError
from lightning_compressm.reduction.policy import DEFAULT_TOLERANCE, ReductionPolicy
from lightning_compressm.reduction.processes import Processes
from lightning_compressm.surgery.optimizer import OptimizerStatePolicy, check_optimizer

__all__ = ["ReductionRun"]


class ReductionRun:
    """Looks at a Trainer's model when it is time, and reduces it.

    Args:
        policy: how much to remove.
        schedule: when to look.
        batches: how many batches' inputs to keep for calibration.
        optimizer_state: what becomes of optimizer state.
        new_guard: makes what judges reductions by a validation metric.
        verbose: log a table of every event on rank 0.
        learning_speed: whether steps get longer when a layer has lost states.

    Attributes:
        history: one dict for each event, in the order in which they happened.
        looks: the looks of this run.
        watch: what the layers see.
        trials: what reductions would cost.
        speed: of learning after cuts.
        pending: what was decided and not carried out yet.
        layers: name -> layer, as of the latest look.
        state_dims: layer name -> current state dimension; empty before training starts.
        clock: how long batches take.
        pictures: what loggers are shown, in a fit.
    """

    model: weakref.ReferenceType[nn.Module] | None = None
    """The one model that all of this is about; nothing of it may reach another one."""

    def __init__(
        self,
        policy: ReductionPolicy,
        schedule: Schedule,
        batches: int,
        optimizer_state: OptimizerStatePolicy,
        new_guard: Callable[[], RollbackGuard],
        verbose: bool,
        learning_speed: bool = False,
    ) -> None:
        self.policy = policy
        self.optimizer_state: OptimizerStatePolicy = optimizer_state
        self.guard = new_guard()
        self.verbose = verbose
        self.speed = SpeedKeeper(learning_speed)
        self.looks = Looks(schedule)
        self.watch = TrainingWatch(policy, batches)
        self.trials = LossTrials()
        self.history: list[dict[str, Any]] = []
        self.pending: Decision | None = None
        self.chosen = ChosenLayers({})
        self.layers: Mapping[str, SSMLayer] = {}
        self.state_dims: dict[str, int] = {}
        self.clock = StepClock()
        self.pictures: ReductionPictures | None = None
        self._left: Fingerprint = ()  # the model as the latest fit left it
        self._first_step = 0
        self._losses = LossWatch()

    def goes_on(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
        """Whether a new fit goes on with this run: the same Trainer's, on weights as it left them.

        Says so where something that was decided or kept for a verdict falls by the wayside.
        """
        if trainer.global_step == 0 or self.model is None:
            return False
        same = self.model() is pl_module and self._left == fingerprint(pl_module)
        if not same and (self.pending is not None or self.guard.keeps):
            pl.rank_zero_warn(
                "CompreSSMCallback drops a reduction that was decided, or waited for its verdict, "
                "in an earlier fit: the model or its weights are others now."
            )
        return same

    def leave(self, pl_module: pl.LightningModule) -> None:
        """Remember the weights at the end of a fit, however it came."""
        self.watch.detach()
        self.speed.detach()
        self._left = fingerprint(pl_module)

    def __getstate__(self) -> dict[str, Any]:
        """Another process, or a copy, finds layers of its own when it begins."""
        return vars(self) | {"model": None, "layers": {}, "chosen": ChosenLayers({})}

    def take(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Belong to this model from now on, and tell its layers apart."""
        policy = self.policy
        self.chosen = choose_layers(
            pl_module, policy.layers, policy.ignore, policy.averages, trained=trained(trainer)
        )
        if self.chosen.frozen:
            pl.rank_zero_warn(
                "CompreSSMCallback leaves frozen layers as they are: "
                f"{', '.join(map(repr, self.chosen.frozen))}. Name them in `layers` to reduce them."
            )
        self.model = weakref.ref(pl_module)
        self.layers = self.chosen.layers
        self.watch.start(self.layers)
        self.clock = StepClock(count_parameters(pl_module))
        self._refresh_state_dims()
        self.trials.begin(self.state_dims)

    def begin(self, trainer: pl.Trainer) -> None:
        """Tie the window to this run; when training starts, the data is there to count."""
        self.looks.schedule = fitting(self.looks.schedule, trainer)
        self.looks.begin(trainer.global_step, lambda: total_steps(trainer), trainer.current_epoch)
        self._first_step = trainer.global_step
        self.speed.attach(trainer)
        if self.looks.too_short:
            pl.rank_zero_warn("CompreSSMCallback: the run is too short for a reduction.")

    def listen(self) -> None:
        """Watch the layers in the next batch, as long as something is to be learnt of the data."""
        self.watch.attach(looking=self.looks.to_come and self.guard.allows_reduction)

    def before_step(self, optimizer: Optimizer) -> None:
        """Before the first steps, see that layers get data, and what the optimizer has made."""
        steps = self.looks.step - self._first_step
        if steps == 0 and self.looks.to_come:
            self.watch.check_calls()
        if steps == 1:  # many fill their buffers only in their first step
            check_optimizer(optimizer)

    def after_batch(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch
    ) -> None:
        """Act right after an optimizer step, where the schedule says so."""
        self.watch.detach()
        if not self.looks.to_come and not self.guard.verdict:
            return
        step = trainer.global_step
        self._note_loss(outputs, step)
        if not self.looks.advance(step):  # gradients are still being accumulated
            return
        if self.guard.verdict:
            self.roll_back(trainer, pl_module)
        if not self.looks.due_after_step() or not self.guard.allows_reduction:
            return
        if trainer.is_last_batch and self.looks.due_after_epoch(trainer.current_epoch):
            return  # the look comes at its end
        if not is_last_step(trainer):
            self._look(trainer, pl_module, trainer.current_epoch, batch)
            self.execute(trainer, pl_module)

    def after_epoch(self, trainer: pl.Trainer, pl_module: pl.LightningModule, epoch: int) -> None:
        """Look and decide if it is time; what is decided waits for :meth:`execute`."""
        due = self.looks.end_epoch(epoch)
        if due and self.guard.allows_reduction:
            self._look(trainer, pl_module, epoch)

    def _look(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        epoch: int,
        batch: Batch | None = None,
    ) -> None:
        """Decide, unless a first validation of ``monitor``, or data, has to come before."""
        lacks_batch = batch is None and self.policy.loss_budget is not None
        if self.guard.waits or not self.watch.ready or lacks_batch:
            self.looks.overdue = True
            return
        step = trainer.global_step
        policy, excluded = self.policy, self.chosen.excluded
        layers = select_layers(pl_module, policy.layers, policy.ignore, without=excluded)
        self.layers = layers

        def work(processes: Processes) -> dict[str, Any]:
            start, seen, rule, trial = time.perf_counter(), self.watch.seen, policy, None
            if batch is not None and policy.loss_budget is not None:
                dims = {name: layer.state_dim for name, layer in layers.items()}
                trial = self.trials.prepare(trainer, pl_module, batch, policy, dims, processes)
                if trial is None:
                    rule = replace(policy, loss_budget=None, tolerance=DEFAULT_TOLERANCE)
            decision = decide(pl_module, layers, rule, seen, processes, seed=step, trial=trial)
            told = sum(event.seconds for event in decision.events)
            more = max(0.0, time.perf_counter() - start - told)  # trials, and what layers share
            return decision.at(step, epoch).took(more).to_dict()

        # Every rank holds the decision of rank 0 afterwards.
        try:
            self.pending = Decision.from_dict(decide_together(trainer.strategy, work))
        except NonFiniteError as error:
            if (bad := self._losses.first_bad_step()) is not None:
                add_note(error, f"the loss was not finite for the first time at step {bad}")
            raise
        self.looks.done()

    def _note_loss(self, outputs: Any, step: int) -> None:
        told = type(outputs) is dict or isinstance(outputs, Mapping)  # the second takes longer
        loss = outputs.get("loss") if told else outputs
        if isinstance(loss, Tensor):
            self._losses.note(loss, step)
            if self.policy.loss_budget is not None and loss.numel() == 1:
                self.trials.note(loss)

    def execute(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Carry out what was decided, if anything was."""
        if self.pending is None:
            return
        decision, start = self.pending, time.perf_counter()
        cuts = self.speed.cuts(pl_module, decision, self.layers)
        try:
            if decision.plan:
                how, keep, twins = self.optimizer_state, self.guard.keep, self.chosen.twins
                swap(trainer, pl_module, decision.plan, how, keep, twins)
                self.speed.follow(cuts)
                decision = decision.took(time.perf_counter() - start)
        except TroubleError as trouble:
            pl.rank_zero_warn(f"CompreSSMCallback: no reduction, the swap failed: {trouble.reason}")
            decision = decision.skipped(f"the swap failed: {trouble.reason}")
        self.pending = None
        self._record(trainer, decision)

    def roll_back(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
        """Go back if the latest validation wants it; whether it did."""
        if not self.guard.verdict:
            return False
        decision = self.guard.restore(trainer, pl_module, self.layers)
        self.speed.go_back(decision, self.layers)
        self.pending = None
        self._record(trainer, decision)
        return True

    def _refresh_state_dims(self) -> None:
        self.state_dims = {name: layer.state_dim for name, layer in self.layers.items()}

    def _record(self, trainer: pl.Trainer, decision: Decision) -> None:
        self.history += [event.to_dict() for event in decision.events]
        self._refresh_state_dims()
        if any(event.action != "skip" for event in decision.events):
            self.clock.cut()
        if self.verbose and decision.events:
            show_events(trainer, decision.events)
        if self.pictures is not None:
            self.pictures.show(trainer, decision, self.history)

    def state_dict(self) -> dict[str, Any]:
        """Window, history and what was decided and not carried out; plain types and tensors."""
        return {
            **self.looks.state_dict(),
            "history": [dict(event) for event in self.history],
            "sequences": self.watch.state_dict(),
            "trial": self.trials.state_dict(),
            "rollback": self.guard.state_dict(),
            "speed": self.speed.state_dict(),
            "pending": None if self.pending is None else self.pending.to_dict(),
        }

    def load_state_dict(self, saved: CallbackState) -> None:
        """Go on from a checkpoint; the window stays what it was."""
        self.looks.window, self.looks.count = saved.window, saved.looks
        self.looks.at_step, self.looks.epoch = saved.looked_at_step, saved.epoch
        self.history, self.pending = saved.history, saved.pending
        self.watch.load_state_dict(saved.sequences)
        self.trials.load_state_dict(saved.trial)
        self.guard.load_state_dict(saved.rollback)
        self.speed.load_state_dict(saved.speed)
