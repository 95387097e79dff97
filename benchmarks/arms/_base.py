"""What an arm is, and what several of them share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import lightning as L
from torch import Tensor, nn

from benchmarks.compare.bench import Bench, TimedCompreSSM
from benchmarks.compare.tasks import WINDOW_END, CompareTask, LayerKind
from lightning_compressm import compress, find_ssm_layers
from lightning_compressm.families import Family
from lightning_compressm.surgery.apply import apply_plan


class Arm(ABC):
    """One way to a small model.

    Attributes:
        name: Key in files and on the command line.
        label: In tables and pictures.
        about: A sentence about it for the results page.
        place: Where it stands in tables; smaller numbers first.
        kinds: Of layers that it can deal with.
        one_training: One training serves all sizes, and `cut` makes them out of copies of it.
        needs: Name of an arm whose network has to be trained before this one begins.
        own_size: Chooses its number of states itself: trained once, not cut.
        choice: A variant of ours that a default is chosen by; in a suite of its own.
    """

    name: ClassVar[str]
    label: ClassVar[str]
    about: ClassVar[str]
    place: ClassVar[int] = 50
    kinds: ClassVar[tuple[LayerKind, ...]] = ("linear", "selective")
    one_training: ClassVar[bool] = False
    needs: ClassVar[str | None] = None
    own_size: ClassVar[bool] = False
    choice: ClassVar[bool] = False

    def suits(self, task: CompareTask) -> bool:
        """Whether it can do the task."""
        return task.kind in self.kinds

    @abstractmethod
    def train(self, bench: Bench, size: int | None) -> L.LightningModule:
        """Train a network that ends with `size` states in every layer; None with `one_training`."""

    def cut(self, bench: Bench, module: L.LightningModule, size: int) -> None:
        """Cut a copy of the trained network to `size` states; only with `one_training`."""
        raise NotImplementedError(f"{type(self).__name__} has one training, but no cut")


class InTraining(Arm):
    """Reduce in training; subclasses say how.

    Attributes:
        share: Of the training, after which the reduction comes.
    """

    share: ClassVar[float] = WINDOW_END

    def options(self, task: CompareTask) -> dict[str, Any]:
        """Arguments of the callback."""
        return {}

    def schedule(self, task: CompareTask, size: int) -> dict[str, Any]:
        """Arguments of the callback that say when, and how far."""
        step = task.step_at(self.share)
        return {"state_dim": size, "window": (0, step), "every_n_steps": step}

    def prepare(self, bench: Bench, module: L.LightningModule) -> None:
        """Called with the new network before it is trained."""

    def train(self, bench: Bench, size: int | None) -> L.LightningModule:
        assert size is not None
        callback = TimedCompreSSM(
            calibration_batches=bench.task.calibration_batches,
            # Every arm ends with the same number of states, whatever that does to the output.
            max_output_error=None,
            verbose=False,
            **self.schedule(bench.task, size),
            **self.options(bench.task),
        )
        module = bench.fresh()
        self.prepare(bench, module)
        bench.fit(module, [callback])
        return module


class AfterTraining(Arm):
    """Cut the trained full model, and train no further."""

    one_training = True
    needs = "full"

    def train(self, bench: Bench, size: int | None) -> L.LightningModule:
        return bench.trained("full")


def keep_states(module: nn.Module, score: Callable[[Family, nn.Module], Tensor], size: int) -> None:
    """Keep the `size` states of each linear layer with the highest scores, exactly as they are.

    Args:
        module: Any with SSM layers, all of them linear.
        score: Called with a layer's family and the layer; scores (N,).
        size: States to keep.
    """
    for layer in find_ssm_layers(module).values():
        assert isinstance(layer.family, Family)
        index = score(layer.family, layer.module).topk(size).indices.sort().values
        apply_plan(layer.module, layer.family.kept_plan(layer.module, index))


def cut_by_compress(bench: Bench, module: nn.Module, size: int, **options: Any) -> None:
    """`compress()` to exactly so many states, calibrated on training batches."""
    compress(module, state_dim=size, sample=bench.sample(), max_output_error=None, **options)


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
