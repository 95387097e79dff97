"""When to reduce: earlier, later, or bit by bit. Variants of ours by which the window is chosen."""

from __future__ import annotations

from typing import Any, ClassVar

from benchmarks.arms._base import InTraining
from benchmarks.comparison.tasks import CompareTask

_LOOKS = 5


class Schedule(InTraining):
    """Ours, at other times; linear layers."""

    choice = True
    start: ClassVar[float]
    end: ClassVar[float]
    looks: ClassVar[int] = 1

    def suits(self, task: CompareTask) -> bool:
        return task.kind == "linear"

    def schedule(self, task: CompareTask, size: int) -> dict[str, Any]:
        start, end = (max(1, round(share * task.steps)) for share in (self.start, self.end))
        if self.looks == 1:
            return {"state_dim": size, "window": (start, end), "every_n_steps": end}
        every = max(1, end // self.looks)
        looks = end // every - (start - 1) // every
        # A little more than needed each time; the last look stops at the size.
        kept = 0.9 * (size / task.d_state) ** (1 / looks)
        return {
            "fraction": 1 - kept,
            "min_state_dim": size,
            "min_reduction": 0.0,
            "window": (start, end),
            "every_n_steps": every,
        }


class Early(Schedule):
    name = "early"
    label = "once, after 5%"
    about = "As ours, but after a twentieth of the training."
    place = 80
    start, end = 0.0, 0.05


class Late(Schedule):
    name = "late"
    label = "once, after 20%"
    about = "As ours, but after a fifth of the training."
    place = 81
    start, end = 0.0, 0.2


class VeryLate(Schedule):
    name = "ours-late"
    label = "ours, after 40%"
    about = "As ours, but after two fifths of the training."
    place = 5
    choice = False
    start, end = 0.0, 0.4

    def suits(self, task: CompareTask) -> bool:
        return True


class Gradual(Schedule):
    name = "gradual"
    label = "five times up to 10%"
    about = "As ours, in five equal shares of what is left, after 2%, 4%, ... 10% of the training."
    place = 83
    start, end, looks = 0.0, 0.1, _LOOKS


class GradualLate(Schedule):
    name = "gradual-late"
    label = "five times up to 25%"
    about = "The same after 5%, 10%, ... 25% of the training."
    place = 84
    start, end, looks = 0.0, 0.25, _LOOKS
