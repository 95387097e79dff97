"""What an arm is, and what several of them share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import lightning as L
import torch
from torch import Tensor, nn

from benchmarks.comparison.bench import Bench, TimedCompreSSM
from benchmarks.comparison.tasks import CompareTask
from lightning_compressm import find_ssm_layers
from lightning_compressm.surgery.apply import apply_plan
from lightning_compressm.surgery.plan import SurgeryPlan, TensorEdit, take


class Arm(ABC):
    """One way to a small model.

    Attributes:
        name: Key in files and on the command line.
        label: In tables and pictures.
        about: A sentence about it for the results page.
        place: Where it stands in tables; smaller numbers first.
        one_training: One training serves all sizes, and `cut` makes them out of copies of it.
        needs_full: Begins when the full model is trained.
        own_size: Chooses its number of states itself: trained once, not cut.
        choice: A variant of ours that a default is chosen by; in a suite of its own.
    """

    name: ClassVar[str]
    label: ClassVar[str]
    about: ClassVar[str]
    place: ClassVar[int] = 50
    one_training: ClassVar[bool] = False
    needs_full: ClassVar[bool] = False
    own_size: ClassVar[bool] = False
    choice: ClassVar[bool] = False

    def suits(self, task: CompareTask) -> bool:
        """Whether it can do the task."""
        return True

    @abstractmethod
    def train(self, bench: Bench, size: int | None) -> L.LightningModule:
        """Train a network that ends with `size` states in every layer; None with `one_training`."""

    def cut(self, bench: Bench, module: L.LightningModule, size: int) -> None:
        """Cut a copy of the trained network to `size` states; only with `one_training`."""
        raise NotImplementedError(f"{type(self).__name__} has one training, but no cut")


class InTraining(Arm):
    """Reduce once, after a tenth of the training; subclasses say how."""

    def options(self, task: CompareTask) -> dict[str, Any]:
        """Arguments of the callback."""
        return {}

    def schedule(self, task: CompareTask, size: int) -> dict[str, Any]:
        """Arguments of the callback that say when, and how far."""
        return {"state_dim": size, "window": (0, task.look), "every_n_steps": task.look}

    def train(self, bench: Bench, size: int | None) -> L.LightningModule:
        assert size is not None
        callback = TimedCompreSSM(
            calibration_batches=8,
            # Every arm ends with the same number of states, whatever that does to the output.
            max_output_error=None,
            verbose=False,
            **self.schedule(bench.task, size),
            **self.options(bench.task),
        )
        module = bench.fresh()
        bench.fit(module, [callback])
        return module


class AfterTraining(Arm):
    """Cut the trained full model, and train no further."""

    one_training = True
    needs_full = True

    def train(self, bench: Bench, size: int | None) -> L.LightningModule:
        return bench.full()


def keep_states(module: nn.Module, choose: Callable[[Any, nn.Module], Tensor], size: int) -> None:
    """Keep the `size` states of each layer that `choose` scores highest, exactly as they are.

    Args:
        module: Any with SSM layers.
        choose: Called with a layer's family and the layer; scores (N,).
        size: States to keep.
    """
    for layer in find_ssm_layers(module).values():
        index = choose(layer.family, layer.module).topk(size).indices.sort().values
        edits = {
            name: TensorEdit(take(layer.module.get_parameter(name).detach(), dim, entries))
            for name, (dim, entries) in layer.family.entries(layer.module, index).items()
        }
        attributes = layer.family.attributes(layer.module, size)
        apply_plan(layer.module, SurgeryPlan(edits, attributes))


def change_loss(
    module: L.LightningModule, change: Callable[[Tensor, Any], Tensor]
) -> Callable[[], None]:
    """Let `change` turn the loss of each training step and its batch into another loss.

    Returns:
        Takes it back.
    """
    original = module.training_step

    def training_step(batch: Any, batch_idx: int) -> Tensor:
        loss = original(batch, batch_idx)
        assert isinstance(loss, Tensor)
        return change(loss, batch)

    module.training_step = training_step  # type: ignore[method-assign]
    return lambda: vars(module).__delitem__("training_step")


@torch.no_grad()
def logits_of(module: L.LightningModule, inputs: Tensor) -> Tensor:
    """What a trained network says, without gradients."""
    logits: Tensor = module(inputs)
    return logits
