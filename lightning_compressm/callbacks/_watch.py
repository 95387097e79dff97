"""What the layers see in training: lengths of sequences, and inputs for calibration."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from lightning_compressm.families import SelectiveFamily
from lightning_compressm.model.layers import SSMLayer, select_layers
from lightning_compressm.reduction.policy import ReductionPolicy
from lightning_compressm.reduction.recorder import CallRecorder, Context, Processes

__all__ = ["TrainingWatch"]


class TrainingWatch:
    """Listens to the SSM layers during training batches.

    Lengths come from the first batches. Inputs of selective layers are those of the latest batches,
    so that a look sees the layer as it is fed at that time; they are not saved.

    Attributes:
        lengths: layer name -> longest sequence seen, in steps.
    """

    def __init__(self, policy: ReductionPolicy, batches: int) -> None:
        self.policy = policy
        self.batches = batches
        self.lengths: dict[str, int] = {}
        self._seen = 0
        self._layers: dict[str, SSMLayer] | None = None
        self._recorder: CallRecorder | None = None
        self._inputs: dict[str, list[Any]] = {}

    def start(self) -> None:
        """Forget which layers there were: a new run may have others."""
        self._layers = None
        self._inputs = {}

    def attach(self, pl_module: pl.LightningModule, *, looking: bool) -> None:
        """Listen to one batch, if anything about it is wanted.

        Args:
            pl_module: whose layers to listen to.
            looking: whether a look is still to come, for which inputs are wanted.
        """
        self.drop()
        layers = self._chosen(pl_module)
        selective = any(isinstance(x.family, SelectiveFamily) for x in layers.values())
        lengths = self.policy.horizon == "auto" and self._seen < self.batches
        if not looking:
            self._inputs = {}
        if lengths or (selective and looking):
            self._recorder = CallRecorder(layers)

    def detach(self) -> None:
        """Keep what was heard; safe to call at any time."""
        recorder = self._recorder
        if recorder is None:
            return
        self.drop()
        for name, length in recorder.lengths.items():
            self.lengths[name] = max(length, self.lengths.get(name, 0))
        for name, calls in recorder.inputs.items():
            self._inputs[name] = [*self._inputs.get(name, []), *calls][-self.batches :]
        self._seen += 1

    def drop(self) -> None:
        """Stop listening; alone, to a batch that was skipped (a hook returned -1 at its start)."""
        if self._recorder is not None:
            self._recorder.close()
            self._recorder = None

    def ready(self, pl_module: pl.LightningModule) -> bool:
        """Whether there is calibration data if it is needed; right after a resume there is none."""
        layers = self._chosen(pl_module)
        wanted = {n for n, x in layers.items() if isinstance(x.family, SelectiveFamily)}
        return not wanted or bool(wanted & self._inputs.keys())

    def _chosen(self, pl_module: pl.LightningModule) -> dict[str, SSMLayer]:
        if self._layers is None:
            self._layers = select_layers(pl_module, self.policy.layers, self.policy.ignore)
        return self._layers

    def context(self, processes: Processes) -> Context:
        """What is known of the data by now."""
        return Context(self.lengths, self._inputs, processes)

    def state_dict(self) -> dict[str, Any]:
        """Plain types only."""
        return {"lengths": dict(self.lengths), "seen": self._seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a saved state."""
        self.lengths = dict(state_dict["lengths"])
        self._seen = state_dict["seen"]
