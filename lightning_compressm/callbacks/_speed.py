"""The learning speed of reduced layers during one run of a Trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_compressm.callbacks import _lightning as pl
from lightning_compressm.model.layers import SSMLayer
from lightning_compressm.reduction.decision import Decision
from lightning_compressm.surgery.learning_speed import LearningSpeed, state_parameters

__all__ = ["FollowedCut", "SpeedKeeper"]


@dataclass(frozen=True)
class FollowedCut:
    """A cut of one layer: its parameters that consist of states, and their numbers."""

    names: Sequence[str]
    old_dim: int
    new_dim: int


class SpeedKeeper:
    """Tells :class:`~lightning_compressm.surgery.learning_speed.LearningSpeed` what happens.

    Args:
        enabled: whether steps are lengthened. What was cut is taken note of anyway, so that a run
            can go on with it.
    """

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self._speed = LearningSpeed()
        self._said: set[str] = set()

    def attach(self, trainer: pl.Trainer) -> None:
        """Watch the optimizers' steps, once a checkpoint has given them what it had."""
        if self.enabled:
            self._speed.attach(trainer.lightning_module, trainer.optimizers)
            self._say_who_is_left_alone()

    def detach(self) -> None:
        """Let go of the optimizers."""
        self._speed.detach()

    @staticmethod
    def cuts(
        model: nn.Module, decision: Decision, layers: Mapping[str, SSMLayer]
    ) -> list[FollowedCut]:
        """What a decision is about to cut, read off before it is carried out."""
        found = []
        for event in decision.events:
            if event.action == "reduce" and event.layer in layers:
                path, dims = layers[event.layer].path, (event.old_state_dim, event.new_state_dim)
                names = state_parameters(model, decision.plan, path, *dims)
                found.append(FollowedCut(names, *dims))
        return found

    def follow(self, cuts: Sequence[FollowedCut]) -> None:
        """Cuts were carried out."""
        for cut in cuts:
            self._speed.follow(cut.names, cut.old_dim, cut.new_dim)
        self._say_who_is_left_alone()

    def go_back(self, decision: Decision, layers: Mapping[str, SSMLayer]) -> None:
        """Layers have got states back."""
        for event in decision.events:
            names = self._speed.followed(layers[event.layer].path)
            self._speed.follow(names, event.old_state_dim, event.new_state_dim)

    def _say_who_is_left_alone(self) -> None:
        for kind in self._speed.left_alone():
            if kind not in self._said:
                self._said.add(kind)
                pl.rank_zero_info(
                    f"CompreSSMCallback leaves the steps of {kind} as they are after a reduction: "
                    "learning_speed is for Adam, AdamW, NAdam, RAdam, Adamax, RMSprop and Adagrad."
                )

    def state_dict(self) -> dict[str, list[int]]:
        """Plain types only."""
        return self._speed.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checked state."""
        self._speed.load_state_dict(state)
