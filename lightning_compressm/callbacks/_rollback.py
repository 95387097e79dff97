"""The safety net: judge reductions by a validation metric, and go back where it got worse."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import torch

from lightning_compressm._rules import AMOUNT, TEXT, one_of, optional
from lightning_compressm.callbacks import _lightning as pl
from lightning_compressm.callbacks._averages import averages_of
from lightning_compressm.callbacks._strategy import carry_out
from lightning_compressm.errors import CheckpointError, SurgeryError
from lightning_compressm.model.layers import SSMLayer
from lightning_compressm.model.snapshot import Snapshot
from lightning_compressm.reduction.decision import Decision
from lightning_compressm.reduction.events import LayerEvent
from lightning_compressm.reduction.failures import TroubleError

__all__ = ["RollbackGuard"]


class RollbackGuard:
    """Keeps the state of before the reductions that no validation has judged yet.

    Args:
        monitor: name of the logged metric, ``None`` to judge nothing.
        mode: whether the metric is better when lower ("min") or higher ("max").
        max_degradation: how much worse it may get, in the metric's own unit.
        directory: where to keep the state; ``None`` for host memory, and for checkpoints with it.

    Raises:
        ValueError: for values out of range.

    Attributes:
        reference: the metric at the latest validation whose weights were accepted.
        verdict: why the latest reductions are to be taken back; empty if they are not.
        stopped: whether something was taken back, so that nothing may be reduced any more.
    """

    def __init__(
        self,
        monitor: str | None,
        mode: Literal["min", "max"],
        max_degradation: float,
        directory: str | None,
    ) -> None:
        optional(TEXT).check("monitor", monitor)
        one_of("min", "max").check("mode", mode)
        AMOUNT.check("max_degradation", max_degradation)
        optional(TEXT).check("rollback_dir", directory)
        self.monitor, self.mode, self.max_degradation = monitor, mode, max_degradation
        self.directory = directory
        self.reference: float | None = None
        self.verdict = ""
        self.stopped = False
        self._snapshot: Snapshot | None = None
        self._file: str | None = None
        self._run = ""  # tells the files of this run from those of others in the same folder

    @property
    def allows_reduction(self) -> bool:
        """Whether a reduction may be decided on now."""
        return not self.stopped and not self.verdict

    @property
    def waits(self) -> bool:
        """Whether there is no metric yet that a reduction could be judged against."""
        return self.monitor is not None and self.reference is None

    @property
    def keeps(self) -> bool:
        """Whether a kept state waits for its verdict."""
        return self._snapshot is not None or self._file is not None

    def check(self, trainer: pl.Trainer, callbacks: int) -> None:
        """Refuse a run without validation, or with another callback; to be called on all ranks.

        Args:
            trainer: of the run.
            callbacks: how many reduce its model.

        Raises:
            ValueError: if nothing would ever be judged, or if two would undo each other's work.
        """
        if self.monitor is None:
            return
        if callbacks > 1:
            raise ValueError(
                f"monitor={self.monitor!r}: expected one CompreSSMCallback in the Trainer, got "
                f"{callbacks}; a rollback brings the whole model back, and with it what another "
                "one had reduced. Reduce all layers by one callback, or leave `monitor` out."
            )
        self._run = trainer.strategy.broadcast(uuid4().hex[:8])
        if not trainer.enable_validation:
            raise ValueError(
                f"monitor={self.monitor!r}: expected a run with validation, got none; the next "
                "validation decides whether a reduction stays. Give the Trainer a validation "
                "loader and the module a validation_step, or leave `monitor` out."
            )

    def keep(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Callable[[], None]:
        """Keep the present state, unless an older one still waits for its verdict.

        Returns:
            A function that drops what was kept now, for a reduction that did not happen: nothing
            must be judged then.
        """
        if self.monitor is None or self.keeps:
            return lambda: None
        averages = averages_of(trainer, pl_module)
        snapshot = Snapshot.take(pl_module, trainer.optimizers, averages)
        if self.directory is None:
            self._snapshot = snapshot
        else:
            self._file = str(self._write(snapshot, trainer))
        return lambda: self.forget(trainer)

    def judge(self, trainer: pl.Trainer) -> None:
        """Compare the metric of a validation with the one of before the latest reductions.

        Raises:
            ValueError: if the metric was not logged.
        """
        if self.monitor is None or self.verdict:
            return
        metrics = trainer.callback_metrics
        if self.monitor not in metrics:
            raise ValueError(
                f"monitor={self.monitor!r} was not logged by the validation; got: "
                f"{', '.join(map(repr, sorted(metrics)))}. Log it in validation_step."
            )
        value: float = trainer.strategy.broadcast(float(metrics[self.monitor]))
        if self.keeps and self._is_worse(value):
            self.verdict = (
                f"{self.monitor} went from {self.reference:.6g} to {value:.6g}, by more than "
                f"{self.max_degradation:g}"
            )
            return
        self.reference = value
        self.forget(trainer)

    def _is_worse(self, value: float) -> bool:
        if self.reference is None or math.isnan(self.reference):
            return False
        change = value - self.reference
        return not (change if self.mode == "min" else -change) <= self.max_degradation

    def restore(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        layers: Mapping[str, SSMLayer],
    ) -> Decision:
        """Bring back the kept state on every rank, or on none, and stop reducing.

        Returns:
            An event for each of the layers whose state dimension changed.

        Raises:
            SurgeryError: or :class:`CheckpointError`, on every rank, if it can't be done on one.
        """
        before = {name: layer.state_dim for name, layer in layers.items()}
        averages = averages_of(trainer, pl_module)

        def work(undo: ExitStack) -> None:
            kept = self._read(trainer.global_rank) if self._snapshot is None else self._snapshot
            kept.restore(pl_module, trainer.optimizers, averages, undo)

        try:
            carry_out(trainer.strategy, work)
        except TroubleError as trouble:
            raise SurgeryError(
                f"the reduction was to be rolled back ({self.verdict}), but that failed: "
                f"{trouble.reason}. The model is as it was; resume from an earlier checkpoint."
            ) from trouble
        events = [
            LayerEvent(
                layer=name,
                family=layer.family.name,
                action="rollback",
                old_state_dim=before[name],
                new_state_dim=layer.state_dim,
                reason=self.verdict,
            )
            for name, layer in layers.items()
            if layer.state_dim != before[name]
        ]
        reason, self.verdict, self.stopped = self.verdict, "", True
        self.forget(trainer)
        pl.rank_zero_warn(f"CompreSSMCallback took the last reduction back: {reason}.")
        return Decision(events=events).at(trainer.global_step, trainer.current_epoch)

    def forget(self, trainer: pl.Trainer) -> None:
        """Drop the kept state."""
        if self._file is not None:
            self._own_file(trainer.global_rank).unlink(missing_ok=True)
        self._snapshot, self._file = None, None

    def _own_file(self, rank: int) -> Path:
        """A checkpoint names the file of the rank that wrote it."""
        assert self._file is not None
        saved = Path(self._file)
        return saved.with_name(re.sub(r"rank\d+\.pt$", f"rank{rank}.pt", saved.name))

    def _write(self, snapshot: Snapshot, trainer: pl.Trainer) -> Path:
        assert self.directory is not None
        # The step too: a checkpoint of before the last verdict must not find a later state.
        name = f"{self._run}.step{trainer.global_step}.rank{trainer.global_rank}"
        path = Path(self.directory).absolute() / f"before_reduction.{name}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".part")
        torch.save(snapshot.to_dict(), unfinished)
        return unfinished.replace(path)

    def _read(self, rank: int) -> Snapshot:
        assert self._file is not None
        # A resumed run may have more ranks than the one that wrote; they all hold the same.
        own = self._own_file(rank)
        path = own if own.exists() else Path(self._file)
        try:
            return Snapshot.from_dict(torch.load(path, map_location="cpu", weights_only=True))
        except Exception as error:
            raise CheckpointError(
                f"the reduction was to be rolled back ({self.verdict}), but '{path}' can't be "
                f"read: {error}. The model is as it was; resume from an earlier checkpoint."
            ) from error

    def state_dict(self) -> dict[str, Any]:
        """Plain types and tensors; the kept state itself, or where it lies."""
        return {
            "reference": self.reference,
            "verdict": self.verdict,
            "stopped": self.stopped,
            "snapshot": None if self._snapshot is None else self._snapshot.to_dict(),
            "file": self._file,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a saved state."""
        self.reference = state_dict["reference"]
        self.verdict, self.stopped = state_dict["verdict"], state_dict["stopped"]
        snapshot = state_dict["snapshot"]
        self._snapshot = None if snapshot is None else Snapshot.from_dict(snapshot)
        self._file = state_dict["file"]
