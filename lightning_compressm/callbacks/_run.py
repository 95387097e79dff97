"""What one run of a Trainer goes through: looks, decisions, changes, and ways back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_compressm.callbacks._checkpoint import CallbackState
from lightning_compressm.callbacks._limits import fitting, is_last_step, total_steps
from lightning_compressm.callbacks._rollback import RollbackGuard
from lightning_compressm.callbacks._strategy import decide_together, swap
from lightning_compressm.callbacks._watch import TrainingWatch
from lightning_compressm.callbacks.schedule import Looks, Schedule
from lightning_compressm.model.layers import SSMLayer, select_layers
from lightning_compressm.reduction.decision import Decision, decide
from lightning_compressm.reduction.events import format_table
from lightning_compressm.reduction.failures import TroubleError
from lightning_compressm.reduction.policy import ReductionPolicy
from lightning_compressm.reduction.processes import Processes
from lightning_compressm.surgery.optimizer import OptimizerStatePolicy

__all__ = ["ReductionRun"]


class ReductionRun:
    """Looks at a Trainer's model when it is time, and reduces it.

    Args:
        policy: how much to remove.
        schedule: when to look.
        batches: how many batches' inputs to keep for calibration.
        optimizer_state: what becomes of optimizer state.
        guard: judges reductions by a validation metric.
        verbose: log a table of every event on rank 0.

    Attributes:
        history: one dict for each event, in the order in which they happened.
        looks: the looks of this run.
        watch: what the layers see.
        pending: what was decided and not carried out yet.
        layers: name -> layer, as of the latest look.
    """

    def __init__(
        self,
        policy: ReductionPolicy,
        schedule: Schedule,
        batches: int,
        optimizer_state: OptimizerStatePolicy,
        guard: RollbackGuard,
        verbose: bool,
    ) -> None:
        self.policy = policy
        self.optimizer_state: OptimizerStatePolicy = optimizer_state
        self.guard = guard
        self.verbose = verbose
        self.looks = Looks(schedule)
        self.watch = TrainingWatch(policy, batches)
        self.history: list[dict[str, Any]] = []
        self.pending: Decision | None = None
        self.layers: Mapping[str, SSMLayer] = {}

    @property
    def state_dims(self) -> dict[str, int]:
        """Layer name -> current state dimension; empty before training starts."""
        return {name: layer.state_dim for name, layer in self.layers.items()}

    def begin(self, trainer: pl.Trainer, layers: Mapping[str, SSMLayer]) -> None:
        """Start or go on with the Trainer's model, and tie the window to this run."""
        self.layers = layers
        self.watch.start(layers)
        self.looks.schedule = fitting(self.looks.schedule, trainer)
        self.looks.begin(trainer.global_step, lambda: total_steps(trainer))
        if self.looks.too_short:
            rank_zero_warn("CompreSSMCallback: the run is too short for a reduction.")

    def listen(self) -> None:
        """Watch the layers in the next batch, as long as something is to be learnt of the data."""
        self.watch.attach(looking=self.looks.to_come and self.guard.allows_reduction)

    def after_batch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Act right after an optimizer step, where the schedule says so."""
        self.watch.detach()
        if not self.looks.advance(trainer.global_step):  # gradients are still being accumulated
            return
        self.roll_back(trainer, pl_module)
        ending = trainer.current_epoch if trainer.is_last_batch else None
        if not self.guard.allows_reduction or not self.looks.due_after_step(ending):
            return
        if not is_last_step(trainer):
            self._look(trainer, pl_module, trainer.current_epoch)
            self.execute(trainer, pl_module)

    def after_epoch(self, trainer: pl.Trainer, pl_module: pl.LightningModule, epoch: int) -> None:
        """Look and decide if it is time; what is decided waits for :meth:`execute`."""
        if not self.guard.allows_reduction or not self.looks.due_after_epoch(epoch):
            return
        if self.watch.ready:
            self._look(trainer, pl_module, epoch)
        else:  # right after a resume: the first batch will tell
            self.looks.overdue = True

    def _look(self, trainer: pl.Trainer, pl_module: pl.LightningModule, epoch: int) -> None:
        """Decide, unless ``monitor`` has to be validated for the first time before."""
        if self.guard.waits:
            self.looks.overdue = True
            return
        step = trainer.global_step
        self.layers = layers = select_layers(pl_module, self.policy.layers, self.policy.ignore)

        def work(processes: Processes) -> dict[str, Any]:
            seen = self.watch.seen
            decision = decide(pl_module, layers, self.policy, seen, processes, seed=step)
            return decision.at(step, epoch).to_dict()

        # Every rank holds the decision of rank 0 afterwards.
        self.pending = Decision.from_dict(decide_together(trainer.strategy, work))
        self.looks.done()

    def execute(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Carry out what was decided, if anything was."""
        if self.pending is None:
            return
        decision = self.pending
        try:
            if decision.plan:
                swap(trainer, pl_module, decision.plan, self.optimizer_state, self.guard.keep)
        except TroubleError as trouble:
            rank_zero_warn(f"CompreSSMCallback: no reduction, the swap failed: {trouble.reason}")
            decision = decision.skipped(f"the swap failed: {trouble.reason}")
        self.pending = None
        self._record(decision)

    def roll_back(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
        """Go back if the latest validation wants it; whether it did."""
        if not self.guard.verdict:
            return False
        decision = self.guard.restore(trainer, pl_module, self.layers)
        self.pending = None
        self._record(decision)
        return True

    def _record(self, decision: Decision) -> None:
        self.history += [event.to_dict() for event in decision.events]
        if self.verbose and decision.events:
            step, table = decision.events[0].step, format_table(decision.events)
            rank_zero_info(f"CompreSSM after step {step}:\n{table}")

    def state_dict(self) -> dict[str, Any]:
        """Window, history and what was decided and not carried out; plain types and tensors."""
        return {
            **self.looks.state_dict(),
            "history": [dict(event) for event in self.history],
            "sequences": self.watch.state_dict(),
            "rollback": self.guard.state_dict(),
            "pending": None if self.pending is None else self.pending.to_dict(),
        }

    def load_state_dict(self, saved: CallbackState) -> None:
        """Go on from a checkpoint; the window stays what it was."""
        self.looks.window, self.looks.count = saved.window, saved.looks
        self.looks.at_step = saved.looked_at_step
        self.history, self.pending = saved.history, saved.pending
        self.watch.load_state_dict(saved.sequences)
        self.guard.load_state_dict(saved.rollback)
