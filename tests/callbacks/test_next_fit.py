"""What one fit leaves behind must not reach the next; a fit that goes on repeats nothing."""

from __future__ import annotations

import pickle
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_compressm import CompreSSMCallback

from .helpers import BATCHES, Classifier, Plain, loader, same, trainer


class Stop(pl.Callback):
    """Ends a fit at the end of an epoch, or in the middle of one."""

    def __init__(self, epoch: int, *, batch: int | None = None, error: Any = None) -> None:
        self.epoch, self.batch, self.error = epoch, batch, error

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, index: int) -> None:
        if self.error is not None and (trainer.current_epoch, index) == (self.epoch, self.batch):
            self.epoch = -1
            raise self.error

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if self.error is None and trainer.current_epoch == self.epoch:
            self.epoch = -1
            trainer.should_stop = True


def _callback(**choices: Any) -> CompreSSMCallback:
    settings: dict[str, Any] = {"state_dim": 6, "window": (0, 10 * BATCHES), "verbose": False}
    return CompreSSMCallback(**(settings | choices))


def _stopped(tmp_path: Path, callback: CompreSSMCallback) -> tuple[pl.Trainer, Classifier]:
    """A fit that ends between the decision of its first epoch and the swap."""
    fit, model = trainer(tmp_path, callback, Stop(0), max_epochs=3), Classifier()
    # The decision comes before the stop, which the callback's look would otherwise see.
    fit.callbacks.sort(key=lambda one: isinstance(one, Stop))
    fit.fit(model, loader())
    fit.should_stop = False  # Lightning 2.4 keeps it
    assert callback._run.pending is not None
    assert model.net.first.d_state == 24
    return fit, model


@pytest.mark.parametrize("again", ["another Trainer", "the same Trainer"])
def test_a_decision_does_not_reach_another_model(again: str, tmp_path: Path):
    """The second model goes the way that it goes with a callback of its own."""

    def second(fit: pl.Trainer) -> dict[str, Any]:
        torch.manual_seed(3)
        model = Classifier()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.9)
        if fit.current_epoch:
            fit.fit_loop.max_epochs = fit.current_epoch + 2
            with pytest.warns(UserWarning, match="drops a reduction that was decided"):
                fit.fit(model, loader())
        else:
            fit.fit(model, loader())
        return dict(model.state_dict())

    callback = _callback()
    fit, _ = _stopped(tmp_path, callback)
    found = second(
        fit if again == "the same Trainer" else trainer(tmp_path, callback, max_epochs=2)
    )
    own = _callback()
    assert same(found, second(trainer(tmp_path, own, max_epochs=2)))
    assert [e["new_state_dim"] for e in callback.history] == [6, 6] * (len(own.history) // 2)


class First(pl.Callback):
    """The states at the first batch of each fit."""

    def __init__(self) -> None:
        self.states: list[int] = []

    def on_train_start(self, *_: Any) -> None:
        self.states.append(0)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.states[-1] = self.states[-1] or pl_module.net.first.d_state


def test_weights_loaded_in_between_are_not_overwritten(tmp_path: Path):
    callback, first = _callback(), First()
    fit, model = _stopped(tmp_path, callback)
    model.load_state_dict({name: value * 0.9 for name, value in model.state_dict().items()})
    fit.callbacks.append(first)
    fit.fit_loop.max_epochs = fit.current_epoch + 1
    with pytest.warns(UserWarning, match="drops a reduction that was decided"):
        fit.fit(model, loader())
    assert first.states == [24]


def test_a_fit_that_goes_on_carries_out_what_was_decided(tmp_path: Path):
    callback = _callback()
    fit, model = _stopped(tmp_path, callback)
    fit.fit_loop.max_epochs = 3
    fit.fit(model, loader())
    assert model.net.first.d_state == 6
    assert [event["step"] for event in callback.history][:2] == [BATCHES, BATCHES]


def test_a_second_model_in_a_finished_trainer_is_looked_at_anew(tmp_path: Path):
    callback = _callback()
    fit = trainer(tmp_path, callback, max_epochs=2)
    fit.fit(Classifier(), loader())
    assert set(callback.state_dims.values()) == {6}
    other = Classifier()
    fit.fit_loop.max_epochs = 4
    fit.fit(other, loader())
    assert other.net.first.d_state == 6
    assert [event["old_state_dim"] for event in callback.history][:2] == [24, 12]


@pytest.mark.parametrize("error", [RuntimeError("lost"), KeyboardInterrupt()])
def test_restarts_in_the_middle_of_an_epoch_cut_nothing_more(error: Any, tmp_path: Path):
    def cuts(*stops: Stop) -> list[tuple[int, int]]:
        callback = _callback(state_dim=None, fraction=0.5, layers=["net.first"])
        fit, model = trainer(tmp_path, callback, *stops, max_epochs=6), Classifier()
        for _ in range(len(stops) + 1):
            try:
                fit.fit(model, loader())
            except (RuntimeError, SystemExit, KeyboardInterrupt):
                fit.should_stop = False
        return [(e["epoch"], e["new_state_dim"]) for e in callback.history][:3]

    assert cuts() == [(0, 12), (1, 6), (2, 3)]
    assert cuts(Stop(1, batch=2, error=error), Stop(1, batch=4, error=error)) == cuts()


class Scored(Classifier):
    """Its score gets worse with each epoch."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("score", float(self.current_epoch))


def test_an_unjudged_state_is_not_rolled_back_into_another_model(tmp_path: Path):
    callback = _callback(monitor="score")
    fit = trainer(tmp_path, callback, Stop(1, batch=3, error=RuntimeError("lost")), max_epochs=4)
    with pytest.raises(RuntimeError, match="lost"):
        fit.fit(Scored(), loader(), loader())
    assert callback._run.guard.keeps
    other, alone = Scored(), Scored()
    trainer(tmp_path, callback, max_epochs=1).fit(other, loader(), loader())
    trainer(tmp_path, _callback(monitor="score"), max_epochs=1).fit(alone, loader(), loader())
    assert same(dict(other.state_dict()), dict(alone.state_dict()))
    assert not [event for event in callback.history if event["action"] == "rollback"]


def test_a_callback_can_be_copied_and_sent_to_processes_after_a_fit(tmp_path: Path):
    callback = _callback(layers=["net.first"])
    trainer(tmp_path, callback, max_epochs=2).fit(Plain(), loader())
    for other in (deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert other.history == callback.history
        assert other.state_dims == callback.state_dims == {"net.first": 6}
        model = Plain()
        trainer(tmp_path, other, max_epochs=2).fit(model, loader())
        assert other.state_dims == {"net.first": 6}
