"""Layers of a LightningModule that are not trained: averages by hand, target networks, teachers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from lightning_compressm import CompreSSMCallback
from lightning_compressm.errors import UnsupportedLayerError

from .helpers import BATCHES, Classifier, Net, StatefulLoader, WithAverage, loader, trainer

pytestmark = [pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")]

CUT = {"state_dim": 6, "window": (0, 2 * BATCHES), "every_n_epochs": 2, "verbose": False}
EPOCHS = 5


class Apart(pl.Callback):
    """How far apart the outputs of network and average are after every step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.seen.append(apart(pl_module))


def apart(model: Any) -> float:
    """How far the outputs of average and network are apart, as a share."""
    (x, _), *_ = loader()
    ours, theirs = model.net(x), model.ema(x)
    return float((ours - theirs).norm() / ours.norm())


def test_an_average_by_hand_follows_through_cuts(tmp_path: Path) -> None:
    """Its output stays as close to that of the network as in a run without any cut."""
    runs = []
    for callbacks in ([CompreSSMCallback(**CUT, averages=["ema.*"])], []):
        model, watch = WithAverage(lr=3e-2), Apart()
        trainer(tmp_path, *callbacks, watch, max_epochs=EPOCHS).fit(model, loader())
        runs.append((model, watch.seen))
    (cut, ours), (_, full) = runs
    assert [cut.net.first.d_state, cut.ema.first.d_state, cut.ema.second.d_state] == [6, 6, 6]
    for reduced, plain in zip(ours, full, strict=True):
        assert reduced <= 1.5 * plain + 1e-3
    assert not any(parameter.requires_grad for parameter in cut.ema.parameters())
    held = {id(p) for group in cut.trainer.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in cut.parameters()}


@pytest.mark.filterwarnings("ignore:CompreSSMCallback took the last reduction back")
def test_a_cut_that_is_taken_back_takes_that_of_the_average_back(tmp_path: Path) -> None:
    guard = {"monitor": "val_loss", "max_degradation": 0.0, "mode": "max"}
    model = WithAverage()
    callback = CompreSSMCallback(**CUT, **guard, averages=["ema.*"])
    trainer(tmp_path, callback, max_epochs=EPOCHS).fit(model, loader(), loader(1))
    assert {event["action"] for event in callback.history} == {"reduce", "rollback"}
    assert model.net.first.d_state == model.ema.first.d_state == 24


def test_a_resumed_run_with_an_average_by_hand_ends_as_the_uninterrupted_one(
    tmp_path: Path,
) -> None:
    def fit(epochs: int, path: Path | None = None) -> Any:
        model, callback = WithAverage(), CompreSSMCallback(**CUT, averages=["ema.*"])
        run = trainer(tmp_path, callback, max_epochs=epochs)
        run.fit(model, StatefulLoader(), ckpt_path=path)
        return model, run

    whole, _ = fit(EPOCHS)
    _, stopped = fit(4)
    stopped.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = fit(EPOCHS, tmp_path / "half.ckpt")
    assert resumed.ema.first.d_state == 6
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "in no optimizer"])
def test_an_average_that_nobody_named_is_refused_with_both_ways_out(
    tmp_path: Path, frozen: bool
) -> None:
    class Model(WithAverage):
        def configure_optimizers(self) -> Any:
            self.ema.requires_grad_(not frozen)
            return torch.optim.SGD(self.net.parameters(), lr=0.1)

    model = Model()
    with pytest.raises(UnsupportedLayerError, match=r"'ema' is not trained.*'net'") as refusal:
        trainer(tmp_path, CompreSSMCallback(**CUT)).fit(model, loader())
    assert "averages=['ema.*']" in str(refusal.value)
    assert "ignore=['ema.*']" in str(refusal.value)
    assert not model.losses


class Teacher(Net):
    """Of another class, and larger."""


class Student(Classifier):
    """Learns beside a frozen network that nothing in it is a copy of."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = Teacher(30).double().requires_grad_(False)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, _ = batch
        return super().training_step(batch, batch_idx) + (self.teacher(x) - self.net(x)).norm()


@pytest.mark.parametrize("named", [False, True])
def test_frozen_layers_that_are_no_copies_stay_unless_they_are_named(
    tmp_path: Path, named: bool
) -> None:
    layers = ["teacher.*", "net.*"] if named else None
    model, callback = Student(), CompreSSMCallback(**CUT, layers=layers)
    fit = trainer(tmp_path, callback)
    if named:
        fit.fit(model, loader())
    else:
        with pytest.warns(UserWarning, match="leaves frozen layers.*'teacher.first'"):
            fit.fit(model, loader())
    assert model.net.first.d_state == 6
    assert model.teacher.first.d_state == (6 if named else 30)
    assert ("teacher.first" in callback.state_dims) == named


@pytest.mark.filterwarnings("ignore:CompreSSMCallback leaves frozen layers")
def test_a_frozen_half_of_a_stack_is_no_copy_of_the_other_half(tmp_path: Path) -> None:
    class Stack(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = torch.nn.Sequential(*(Net().double() for _ in range(2)))
            self.net[0].decoder = torch.nn.Identity()
            self.net[0].forward = lambda x: Net.forward(self.net[0], x)[:, None, :1]
            self.net[0].requires_grad_(False)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.net[1].parameters(), lr=0.1)

    model = Stack()
    trainer(tmp_path, CompreSSMCallback(**CUT)).fit(model, loader())
    assert [net.first.d_state for net in model.net] == [24, 6]
