"""CompreSSM as its paper and code have it."""

from __future__ import annotations

from typing import Any

from benchmarks.arms._base import InTraining
from benchmarks.compare.tasks import CompareTask


class Published(InTraining):
    name = "published"
    label = "CompreSSM as published"
    about = (
        "One reduction after a tenth of the training: complex balancing, infinite horizon, the "
        "optimizer's moments sliced (arXiv 2510.02823). Linear layers only."
    )
    place = 2
    kinds = ("linear",)

    def options(self, task: CompareTask) -> dict[str, Any]:
        return {"balance": "complex", "horizon": None, "optimizer_state": "truncate"}
