"""Train several models side by side, so that their times can be compared on a noisy machine.

Each training is a thread of its own, but only one of them computes: they take turns by the epoch.
A slow minute of the machine then hits all of them alike.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from typing import TypeVar

import lightning as L
import torch

T = TypeVar("T")


class Turns:
    """A ring of participants, of whom the first may compute."""

    def __init__(self) -> None:
        self._ring: deque[str] = deque()
        self._changed = threading.Condition()
        self._closed = False

    def join(self, name: str) -> None:
        """Take a place at the end of the ring."""
        with self._changed:
            self._ring.append(name)
            self._changed.notify_all()

    def wait(self, name: str) -> None:
        """Block until it is this participant's turn; CancelledError if the ring was closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._ring[0] == name)
            if self._closed:
                raise CancelledError(f"{name} stopped, because another training did")

    def pass_on(self, name: str) -> None:
        """End one's turn and wait for the next, with torch's random numbers as they were.

        The trainings share the global generator; without this, dropout in one of them would
        depend on the others.
        """
        state = torch.get_rng_state()
        with self._changed:
            self._ring.rotate(-1)
            self._changed.notify_all()
        self.wait(name)
        torch.set_rng_state(state)

    def leave(self, name: str) -> None:
        """Give one's place up."""
        with self._changed:
            self._ring.remove(name)
            self._changed.notify_all()

    def __contains__(self, name: str) -> bool:
        """Whether this participant has a place."""
        with self._changed:
            return name in self._ring

    def close(self) -> None:
        """End all: whoever waits, or waits next, gets a CancelledError."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


def run_together(turns: Turns, works: Sequence[Callable[[], T]]) -> list[T]:
    """Do each in a thread of its own; the first failure ends all. Results as they come."""
    with ThreadPoolExecutor(len(works)) as pool:
        running = [pool.submit(work) for work in works]
        try:
            return [done.result() for done in as_completed(running)]
        except BaseException:
            turns.close()
            raise


class Stopwatch:
    """Adds up wall and processor seconds between `start` and `stop`."""

    def __init__(self) -> None:
        self.wall = 0.0
        self.cpu = 0.0
        self._since: tuple[float, float] | None = None

    def start(self) -> None:
        # The process' time, not the thread's: helper threads of torch count as well.
        self._since = (time.perf_counter(), time.process_time())

    def stop(self) -> None:
        if self._since is None:
            return
        wall, cpu = self._since
        self.wall += time.perf_counter() - wall
        self.cpu += time.process_time() - cpu
        self._since = None


class TimedTurns(L.Callback):
    """Time a training, and hand the processor on after every epoch.

    Put it last in the list of callbacks: their work at the end of an epoch is then timed too.
    Validation is not.
    """

    def __init__(self, turns: Turns, name: str) -> None:
        self.turns = turns
        self.name = name
        self.watch = Stopwatch()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.watch.start()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.watch.stop()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.training:
            self.watch.start()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.watch.stop()
        self.turns.pass_on(self.name)
        self.watch.start()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.watch.stop()
