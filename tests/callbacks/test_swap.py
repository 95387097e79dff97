"""What a swap leaves behind and what it costs: nothing of the old wrapper, no collector's run."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.strategies import DDPStrategy

from lightning_compressm import CompreSSMCallback

from .helpers import BATCHES, Classifier, loader, trainer


class Watch(pl.Callback):
    """Without the collector from the first step on; sees the states and the wrapper of each."""

    def __init__(self) -> None:
        self.states: list[int] = []
        self.reducers: list[Any] = []
        self.collected: list[int] = []

    def on_train_start(self, *_: Any) -> None:
        gc.disable()
        gc.callbacks.append(self._note)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.states.append(pl_module.net.first.d_state)
        reducer = getattr(trainer.strategy.model, "reducer", None)
        self.reducers.append(None if reducer is None else weakref.ref(reducer))

    def on_train_end(self, *_: Any) -> None:
        gc.callbacks.remove(self._note)
        gc.enable()

    def _note(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            self.collected.append(info["generation"])


@pytest.mark.parametrize("strategy", ["auto", "ddp"])
def test_the_old_wrapper_goes_without_the_collector(strategy: str, tmp_path: Path):
    watch = Watch()
    callback = CompreSSMCallback(
        state_dim=4, layers=["net.first"], window=(0, BATCHES), verbose=False
    )
    chosen = DDPStrategy(process_group_backend="gloo") if strategy == "ddp" else strategy
    trainer(tmp_path, callback, watch, strategy=chosen, max_epochs=2).fit(Classifier(), loader())
    assert watch.states == [24] * BATCHES + [4] * BATCHES
    assert not watch.collected
    if strategy == "ddp":
        first, last = watch.reducers[0], watch.reducers[-1]
        assert first is not None
        assert first() is None, "its hooks on parameters that stayed would still fire"
        assert last is not first


def test_times_include_the_swap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from lightning_compressm.callbacks import _run
    from lightning_compressm.reduction import decide

    ticks = iter(range(1000))
    clock = SimpleNamespace(perf_counter=lambda: float(next(ticks)))
    for module in (_run, decide):  # not Lightning's own
        monkeypatch.setattr(module, "time", clock)
    callback = CompreSSMCallback(state_dim=4, window=(0, BATCHES), verbose=False)
    trainer(tmp_path, callback, max_epochs=2).fit(Classifier(), loader())
    seconds = [event["seconds"] for event in callback.history]
    # For each layer a tick of the clock for its look, one for its cut, half of the five between
    # them, and half of the swap.
    assert seconds == [5.0, 5.0]
