"""What the layers see in training: lengths of sequences, and inputs for calibration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_compressm.model.layers import SSMLayer
from lightning_compressm.reduction.policy import ReductionPolicy
from lightning_compressm.reduction.recorder import CallRecorder, Seen

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
        self._layers: Mapping[str, SSMLayer] = {}
        self._recorder: CallRecorder | None = None
        self._inputs: dict[str, list[Any]] = {}

    def start(self, layers: Mapping[str, SSMLayer]) -> None:
        """Listen to these layers from now on, and forget what others got."""
        self._layers = layers
        self._inputs = {}

    def attach(self, *, looking: bool) -> None:
        """Listen to one batch, if anything about it is wanted.

        Args:
            looking: whether a look is still to come, for which inputs are wanted.
        """
        self.drop()
        lengths = self.policy.horizon == "auto" and self._seen < self.batches
        if not looking:
            self._inputs = {}
        if lengths or (self._wanted and looking):
            self._recorder = CallRecorder(self._layers)

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

    @property
    def ready(self) -> bool:
        """Whether there is calibration data if it is needed; right after a resume there is none."""
        return not self._wanted or bool(self._wanted & self._inputs.keys())

    @property
    def _wanted(self) -> set[str]:
        """Layers that can't be looked at without data."""
        return {name for name, layer in self._layers.items() if layer.family.needs_data}

    @property
    def seen(self) -> Seen:
        """What is known of the data by now."""
        return Seen(self.lengths, self._inputs)

    def state_dict(self) -> dict[str, Any]:
        """Plain types only."""
        return {"lengths": dict(self.lengths), "seen": self._seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a saved state."""
        self.lengths = dict(state_dict["lengths"])
        self._seen = state_dict["seen"]
