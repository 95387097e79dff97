"""What an arm works with: one task and seed, its turn at the processor, and a stopwatch."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import lightning as L
from torch import Tensor

from benchmarks.compare.tasks import CompareTask, calibration, evaluate
from benchmarks.train.interleave import TimedTurns, Turns
from benchmarks.train.trainer import AfterEveryStep, make_trainer
from lightning_compressm import CompreSSMCallback, find_ssm_layers

Report = Callable[[int], None]
_TURN = 25  # steps between handing the processor on


@dataclass(frozen=True)
class Trained:
    """The network of an arm that others begin with, and what it cost."""

    module: L.LightningModule
    cpu: float


@dataclass
class Measured:
    """What a training left behind beside the network.

    Attributes:
        after_cut: Test accuracy right after each reduction in training.
        analysis: Processor seconds spent in looking and reducing.
        borrowed: Processor seconds of the network that the arm starts from.
        curves: Whatever was watched over training.
    """

    after_cut: list[float] = field(default_factory=list)
    analysis: float = 0.0
    borrowed: float = 0.0
    curves: dict[str, Any] = field(default_factory=dict)


class Bench:
    """Tools for one training of one arm.

    Args:
        task: What is trained.
        seed: Fixes initialisation, order of the batches and dropout.
        turns: Who may compute.
        name: Of this training among the turns.
        needed: Arm -> will hold its trained network.
        report: Called with the step now and then.
        beside: The training whose size this one has, and whose time it is compared with.
    """

    def __init__(
        self,
        task: CompareTask,
        seed: int,
        turns: Turns,
        name: str,
        needed: Mapping[str, Future[Trained]],
        report: Report = lambda _: None,
        beside: str | None = None,
    ) -> None:
        self.task = task
        self.seed = seed
        self.measured = Measured()
        self._needed = needed
        self._watcher = _Watcher(turns, name, report, beside)
        self._data = task.make_data(seed)

    @property
    def cpu(self) -> float:
        """Processor seconds of training and cutting so far."""
        return self._watcher.watch.cpu

    @property
    def cpu_at_pace(self) -> float:
        """The same, had it gone on all the time as fast as it went beside the other training.

        One that waits for the other's size ends later, when fewer share the processor's caches.
        """
        steps, cpu = self._watcher.together
        return cpu * self.task.steps / steps if steps else self.cpu

    @property
    def data(self) -> Any:
        """The task's data."""
        return self._data

    def fresh(self, d_state: int | None = None) -> L.LightningModule:
        """A network as initialised by the seed, with the task's states or others."""
        module, self._data = self.task.build(self.seed, d_state)
        return module

    def fit(self, module: L.LightningModule, callbacks: Sequence[L.Callback] = ()) -> None:
        """Train for the task's steps, timed, taking turns with the other arms."""
        reducing = [callback for callback in callbacks if isinstance(callback, TimedCompreSSM)]
        # The watcher comes last, so that the callbacks' work is timed.
        own = [*callbacks, *(_AfterCut(self, callback) for callback in reducing), self._watcher]
        make_trainer(self.task.steps, own, clip=self.task.clip).fit(module, self._data)
        self.measured.analysis += sum(callback.seconds for callback in reducing)

    def trained(self, arm: str) -> L.LightningModule:
        """A copy of another arm's trained network, whose time is charged."""
        trained = self._needed[arm].result()
        self.measured.borrowed = trained.cpu
        return copy.deepcopy(trained.module)

    def states_of(self, arm: str) -> int:
        """States of the layer that has most in another arm's network; free of charge."""
        return max(state_dims(self._needed[arm].result().module))

    def hand_on(self, arm: str, module: L.LightningModule) -> None:
        """Give this arm's network to those that wait for it, unless they have it."""
        wanted = self._needed.get(arm)
        if wanted is not None and not wanted.done():
            wanted.set_result(Trained(module, self.cpu))

    def sample(self) -> list[Tensor]:
        """Training batches to calibrate on."""
        return calibration(self.task, self._data)

    def timed(self) -> contextlib.AbstractContextManager[None]:
        """What happens inside counts as training time."""
        return _between(self._watcher.watch.start, self._watcher.watch.stop)

    def untimed(self) -> contextlib.AbstractContextManager[None]:
        """What happens inside, in the middle of a training, does not."""
        return _between(self._watcher.watch.stop, self._watcher.watch.start)


@contextlib.contextmanager
def _between(before: Callable[[], None], after: Callable[[], None]) -> Iterator[None]:
    before()
    try:
        yield
    finally:
        after()


def state_dims(module: L.LightningModule) -> list[int]:
    """States of every layer."""
    return [layer.state_dim for layer in find_ssm_layers(module).values()]


class TimedCompreSSM(CompreSSMCallback):
    """The package's callback; counts the processor seconds spent where it looks and reduces."""

    seconds = 0.0

    def on_train_epoch_start(self, *args: Any, **kwargs: Any) -> None:
        self._timed(super().on_train_epoch_start, *args, **kwargs)

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self._timed(super().on_train_batch_end, *args, **kwargs)

    def on_train_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        self._timed(super().on_train_epoch_end, *args, **kwargs)

    def _timed(self, hook: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        start = time.process_time()
        hook(*args, **kwargs)
        self.seconds += time.process_time() - start


class _Watcher(AfterEveryStep, TimedTurns):
    """Hand the processor on after so many steps, however long an epoch is."""

    def __init__(self, turns: Turns, name: str, report: Report, beside: str | None) -> None:
        super().__init__(turns, name)
        self.report, self.beside = report, beside
        self.together = (0, 0.0)  # steps beside the other training, and their processor seconds

    def after_step(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.global_step % _TURN == 0:
            self.watch.stop()
            self.report(trainer.global_step)
            if self.beside is not None and self.beside in self.turns:
                self.together = (trainer.global_step, self.watch.cpu)
            self.turns.pass_on(self.name)
            self.watch.start()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The turns go by steps."""


class _AfterCut(AfterEveryStep):
    """Test right after every reduction, before anything is trained further."""

    def __init__(self, bench: Bench, callback: CompreSSMCallback) -> None:
        self.bench = bench
        self.callback = callback
        self.dims: dict[str, int] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.dims = self.callback.state_dims

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._test(pl_module)

    def after_step(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._test(module)

    def _test(self, module: L.LightningModule) -> None:
        dims = self.callback.state_dims
        if dims != self.dims:
            self.dims = dims
            with self.bench.untimed():
                self.bench.measured.after_cut.append(evaluate(module, self.bench.data)[0])
