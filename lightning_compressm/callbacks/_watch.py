"""How long the sequences are that each layer sees in training."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from lightning_compressm.discovery import LengthRecorder, select_layers
from lightning_compressm.policy import ReductionPolicy

__all__ = ["LengthWatch"]


class LengthWatch:
    """Listens to the SSM layers during the first training batches, then never again.

    Attributes:
        lengths: layer name -> longest sequence seen, in steps.
    """

    def __init__(self, policy: ReductionPolicy, batches: int) -> None:
        self.policy = policy
        self.batches = batches
        self.lengths: dict[str, int] = {}
        self._seen = 0
        self._recorder: LengthRecorder | None = None

    def attach(self, pl_module: pl.LightningModule) -> None:
        """Listen to one batch, if lengths are wanted and not known yet."""
        if self.policy.horizon == "auto" and self._seen < self.batches:
            layers = select_layers(pl_module, self.policy.layers, self.policy.ignore)
            self._recorder = LengthRecorder(layers)

    def detach(self) -> None:
        """Keep what was heard; safe to call at any time."""
        if self._recorder is None:
            return
        self._recorder.close()
        for name, length in self._recorder.lengths.items():
            self.lengths[name] = max(length, self.lengths.get(name, 0))
        self._recorder = None
        self._seen += 1

    def state_dict(self) -> dict[str, Any]:
        """Plain types only."""
        return {"lengths": dict(self.lengths), "seen": self._seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a saved state."""
        self.lengths = dict(state_dict["lengths"])
        self._seen = state_dict["seen"]
