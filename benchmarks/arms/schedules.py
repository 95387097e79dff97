"""When to reduce: earlier, later, or bit by bit. Variants of ours by which the window is chosen."""

from __future__ import annotations

from typing import Any

from benchmarks.arms.choices import Choice
from benchmarks.compare.tasks import CompareTask

_LOOKS = 5


class Early(Choice):
    name = "early"
    label = "once, after 5%"
    about = "As ours, but after a twentieth of the training."
    place = 80
    share = 0.05


class Late(Choice):
    name = "late"
    label = "once, after 20%"
    about = "As ours, but after a fifth of the training."
    place = 81
    share = 0.2


class Gradual(Choice):
    name = "gradual"
    label = "five times up to 10%"
    about = "As ours, in five equal shares of what is left, after 2%, 4%, ... 10% of the training."
    place = 83

    def schedule(self, task: CompareTask, size: int) -> dict[str, Any]:
        end = task.step_at(self.share)
        every = max(1, end // _LOOKS)
        # A little more than needed each time; the last look stops at the size.
        kept = 0.9 * (size / task.d_state) ** (1 / (end // every))
        return {
            "fraction": 1 - kept,
            "min_state_dim": size,
            "min_reduction": 0.0,
            "window": (0, end),
            "every_n_steps": every,
        }


class GradualLate(Gradual):
    name = "gradual-late"
    label = "five times up to 25%"
    about = "The same after 5%, 10%, ... 25% of the training."
    place = 84
    share = 0.25
