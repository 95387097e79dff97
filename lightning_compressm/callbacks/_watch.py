"""What the layers see in training: lengths of sequences, and inputs for calibration."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

from lightning_compressm.errors import CalibrationError
from lightning_compressm.model.layers import SSMLayer
from lightning_compressm.reduction.policy import ReductionPolicy
from lightning_compressm.reduction.recorder import CallRecorder, Seen

__all__ = ["TrainingWatch"]

# Lengths alone are taken from the first batches, and later from one batch in so many.
_FIRST, _ONE_IN = 8, 8


class TrainingWatch:
    """Listens to the SSM layers during training batches, as long as a look is to come.

    Lengths are the longest of the batches listened to so far. Inputs of layers that need data are
    those of the latest batches, so that a look sees the layer as it is fed at that time; they are
    not saved.

    Attributes:
        lengths: layer name -> longest sequence seen, in steps.
    """

    def __init__(self, policy: ReductionPolicy, batches: int) -> None:
        self.policy = policy
        self.lengths: dict[str, int] = {}
        self._layers: Mapping[str, SSMLayer] = {}
        self._wanted: set[str] = set()  # layers that can't be looked at without data
        self._recorder: CallRecorder | None = None
        self._latest: deque[CallRecorder] = deque(maxlen=batches)
        self._batches = 0
        self._copied: set[str] = set()  # layers whose inputs the model changes in place

    def __getstate__(self) -> dict[str, Any]:
        """Neither layers nor their data go along into a copy."""
        return vars(self) | {
            "_layers": {},
            "_recorder": None,
            "_latest": deque(maxlen=self._latest.maxlen),
        }

    def start(self, layers: Mapping[str, SSMLayer]) -> None:
        """Listen to these layers from now on, and forget what others got."""
        self._layers = layers
        self._wanted = {name for name, layer in layers.items() if layer.family.needs_data}
        self._latest.clear()

    def attach(self, *, looking: bool) -> None:
        """Listen to one batch, if anything about it is wanted.

        Args:
            looking: whether a look is still to come.
        """
        self.drop()
        if not looking:
            self._latest.clear()
        elif self._wanted or self._wants_lengths():
            self._recorder = CallRecorder(self._layers, self._copied)

    def _wants_lengths(self) -> bool:
        """Whether to listen to this batch for the lengths of its sequences."""
        self._batches += 1
        due = self._batches <= _FIRST or self._batches % _ONE_IN == 0
        return due and self.policy.horizon == "auto"

    def detach(self) -> None:
        """Keep what was heard; safe to call at any time."""
        recorder = self._recorder
        if recorder is None:
            return
        self.drop()
        for name, length in recorder.lengths.items():
            self.lengths[name] = max(length, self.lengths.get(name, 0))
        self._latest.append(recorder)

    def drop(self) -> None:
        """Stop listening; alone, to a batch that was skipped (a hook returned -1 at its start)."""
        if self._recorder is not None:
            self._recorder.close()
            self._recorder = None

    def check_calls(self) -> None:
        """Refuse layers that can't be looked at without data and got none; before the first step.

        Raises:
            CalibrationError: naming them.
        """
        heard = [*self._latest, *([] if self._recorder is None else [self._recorder])]
        silent = self._wanted - {name for recorder in heard for name in recorder.inputs}
        if silent and heard:
            raise CalibrationError(
                f"expected training_step to call {', '.join(map(repr, sorted(silent)))} with whole "
                "sequences, got no such call before the first step: what a selective layer's "
                "states are worth depends on its input. Put a layer that is not used into `ignore`."
            )

    @property
    def ready(self) -> bool:
        """Whether there is calibration data if it is needed.

        There is none right after a resume, and where the model has changed it in place; then it is
        copied from now on.
        """
        changed = {name for recorder in self._latest for name in recorder.changed}
        if changed:
            self._copied |= changed
            self._latest.clear()
        heard = {name for recorder in self._latest for name in recorder.inputs}
        return not self._wanted or bool(self._wanted & heard)

    @property
    def seen(self) -> Seen:
        """What is known of the data by now."""
        return Seen(self.lengths, Seen.in_batches(self._latest).inputs)

    def state_dict(self) -> dict[str, Any]:
        """Plain types only."""
        return {"lengths": dict(self.lengths)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a saved state."""
        self.lengths = dict(state_dict["lengths"])
