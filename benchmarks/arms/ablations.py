"""Which states stay: the least energetic ones, or any."""

from __future__ import annotations

from typing import Any, ClassVar

from benchmarks.arms._base import InTraining
from benchmarks.compare.tasks import CompareTask


class Ablation(InTraining):
    """Like ours, with another choice of states."""

    keep: ClassVar[str]

    def options(self, task: CompareTask) -> dict[str, Any]:
        if task.kind == "linear":
            return {"selection": self.keep}
        return {"criterion": self.keep, "refit": False}


class Random(Ablation):
    name = "random"
    label = "random states"
    about = "As ours, but random balanced states stay (selective layers: random states, no refit)."
    place = 30
    keep = "random"


class Smallest(Ablation):
    name = "smallest"
    label = "smallest states"
    about = "As ours, but the states with the least energy stay (selective layers: no refit)."
    place = 31
    keep = "smallest"
