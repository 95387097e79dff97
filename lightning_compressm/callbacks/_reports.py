"""What a callback shows and saves of its run."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from lightning_compressm.callbacks import _lightning as pl
from lightning_compressm.callbacks._checkpoint import read_state
from lightning_compressm.callbacks._loggers import LoggedCallback
from lightning_compressm.callbacks._run import ReductionRun
from lightning_compressm.reduction.events import dimension_metrics
from lightning_compressm.reduction.policy import ReductionPolicy

__all__ = ["RunReports"]


class RunReports(LoggedCallback):
    """The part of a callback that others read: history, dimensions, logs and checkpoints."""

    _PREFIX = "compressm"
    policy: ReductionPolicy
    _run: ReductionRun
    _logged: dict[str, float]  # in the latest epoch of this run
    _fitting = True  # a test of some checkpoint must not replace the history of training

    @property
    def history(self) -> list[dict[str, Any]]:
        """One dict for each layer and look."""
        return self._run.history

    @property
    def state_dims(self) -> dict[str, int]:
        """Layer name -> current state dimension; empty before training starts."""
        return dict(self._run.state_dims)

    @cached_property  # the Trainer asks for it at every hook
    def state_key(self) -> str:
        """Two callbacks for different layers keep apart states in a checkpoint."""
        return self._generate_state_key(layers=self.policy.layers, ignore=self.policy.ignore)

    def _log_dimensions(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        together: Sequence[RunReports],
    ) -> None:
        """Log the state dimensions; the first callback does it for all: there is one sum."""
        if together[0] is not self:
            return
        state_dims = {name: dim for c in together for name, dim in c.state_dims.items()}
        history = sorted((e for c in together for e in c.history), key=lambda e: e["step"])
        metrics = dimension_metrics(state_dims, history)
        shared, total = trainer.world_size > 1, "compressm/total_state_dim"
        pl_module.log(total, metrics[total], prog_bar=self._run.verbose, sync_dist=shared)
        # Each takes the Trainer as long as a step of a small model does: dimensions are logged for
        # every epoch, what a look has found only after it.
        rest = {
            name: value
            for name, value in metrics.items()
            if name != total and ("state_dim" in name or self._logged.get(name) != value)
        }
        pl_module.log_dict(rest, sync_dist=shared)
        self._logged = metrics

    def state_dict(self) -> dict[str, Any]:
        """Window, history and a committed but not yet executed plan; plain types and tensors."""
        return self._run.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the state of a checkpoint that is trained on; the window stays what it was.

        Raises:
            CheckpointError: if it is damaged; the callback is as it was then.
        """
        if self._fitting:
            self._run.load_state_dict(read_state(state_dict))
