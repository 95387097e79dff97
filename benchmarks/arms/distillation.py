"""A small model that learns from the full one."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.arms._base import Arm, change_loss
from benchmarks.compare.bench import Bench
from benchmarks.data.mqar import IGNORED

_TEMPERATURE = 2.0
_SHARE = 0.5


class Distillation(Arm):
    name = "distillation"
    label = "distillation"
    about = (
        "The small model from scratch; half of its loss is the divergence from the trained full "
        "model's answers at temperature 2 (Hinton et al. 2015, arXiv 1503.02531)."
    )
    place = 20
    needs = "full"

    def train(self, bench: Bench, size: int | None) -> L.LightningModule:
        teacher = bench.trained("full").eval()
        student = bench.fresh(size)
        latest: list[Tensor] = []

        def remember(model: nn.Module, inputs: Any, logits: Tensor) -> None:
            latest[:] = [logits]

        def with_teacher(loss: Tensor, batch: Any) -> Tensor:
            inputs, targets = batch
            with torch.no_grad():
                answers = teacher(inputs)
            return (1 - _SHARE) * loss + _SHARE * divergence(latest[0], answers, targets)

        network = student.get_submodule("model")
        listening = network.register_forward_hook(remember)
        undo = change_loss(student, with_teacher)
        bench.fit(student)
        undo()
        listening.remove()
        return student


def divergence(student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
    """Mean Kullback-Leibler divergence at `_TEMPERATURE`, where something is asked, times T^2."""
    if student.ndim == 3:
        asked = targets != IGNORED
        student, teacher = student[asked], teacher[asked]
    ours, theirs = (F.log_softmax(x / _TEMPERATURE, -1) for x in (student, teacher))
    loss = F.kl_div(ours, theirs, log_target=True, reduction="batchmean")
    return _TEMPERATURE**2 * loss
