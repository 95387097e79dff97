"""Averaged weights through a reduction: EMA, stochastic weight averaging, averages in a module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from lightning_compressm import CompreSSMCallback

from ..features import needs_ema
from .helpers import BATCHES, Classifier, Plain, StatefulLoader, loader, same, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:SWA is currently only supported every epoch"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]

CUT = {"state_dim": 6, "window": (0, 2 * BATCHES), "every_n_epochs": 2, "verbose": False}
EPOCHS = 5


class Validated(pl.Callback):
    """The validation loss of every epoch."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.losses.append(float(trainer.callback_metrics["val_loss"]))


def ema() -> pl.Callback:
    made: pl.Callback = pl.callbacks.EMAWeightAveraging(decay=0.9)
    return made


def run(
    tmp: Path, *callbacks: Any, model: Any = None, ckpt_path: Path | None = None
) -> tuple[Any, list[float]]:
    model, seen = model or Classifier(), Validated()
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    fit = trainer(tmp, *callbacks, seen, max_epochs=EPOCHS, enable_checkpointing=saves)
    fit.fit(model, StatefulLoader(), loader(1), ckpt_path=ckpt_path)
    return model, seen.losses


@needs_ema
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("module", [Classifier, Plain], ids=["LRU", "Mamba"])
def test_ema_goes_through_a_reduction(tmp_path: Path, first: bool, module: Any) -> None:
    """Whichever callback comes first; its validation follows that of the run without a cut."""
    average, cut = ema(), CompreSSMCallback(**CUT)
    callbacks = [average, cut] if first else [cut, average]
    model, losses = run(tmp_path, *callbacks, model=module())
    _, plain = run(tmp_path, ema(), model=module())
    assert [e["action"] for e in cut.history] == ["reduce"] * 2
    mirror = average._average_model.module
    assert mirror.net.second.d_state == model.net.second.d_state == 6
    # Training ends with the averaged weights.
    assert same(model.state_dict(), mirror.state_dict())
    assert losses[:2] == plain[:2]
    assert losses == pytest.approx(plain, rel=0.05)


@needs_ema
def test_ema_through_a_reduction_and_a_resume(tmp_path: Path) -> None:
    """From a checkpoint with the plan pending and from a reduced one, in both orders: bitwise."""
    keep = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    cut = CompreSSMCallback(**CUT)
    whole, losses = run(tmp_path, ema(), cut, keep)
    for epoch in (1, 2, 3):
        for first in (True, False):
            average, again = ema(), CompreSSMCallback(**CUT)
            callbacks = [average, again] if first else [again, average]
            path = tmp_path / f"epoch={epoch}.ckpt"
            model, later = run(tmp_path / "again", *callbacks, ckpt_path=path)
            assert same(model.state_dict(), whole.state_dict()), (epoch, first)
            assert later == losses[epoch + 1 :]


@needs_ema
def test_checkpoints_hold_the_average_and_validate_alike(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, "{epoch}", monitor="val_loss", save_top_k=-1)
    _, losses = run(tmp_path, ema(), CompreSSMCallback(**CUT), keep)
    for epoch, loss in enumerate(losses):
        path = tmp_path / f"epoch={epoch}.ckpt"
        found = trainer(tmp_path, CompreSSMCallback(**CUT)).validate(
            Classifier(), loader(1), ckpt_path=path, verbose=False
        )
        assert found[0]["val_loss"] == pytest.approx(loss, rel=1e-9)


@needs_ema
def test_ema_added_when_a_reduced_run_is_resumed(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    run(tmp_path, CompreSSMCallback(**CUT), keep)
    for callback in (
        ema(),
        StochasticWeightAveraging(1e-3, 4),
    ):
        model, losses = run(
            tmp_path / "again",
            callback,
            CompreSSMCallback(**CUT),
            ckpt_path=tmp_path / "epoch=2.ckpt",
        )
        assert model.net.first.d_state == 6
        assert len(losses) == 2


@pytest.mark.parametrize("start", [1, 3, 4])
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_stochastic_weight_averaging(tmp_path: Path, start: int, first: bool) -> None:
    """Also where averaging starts before the reduction."""
    swa, cut = StochasticWeightAveraging(1e-3, start), CompreSSMCallback(**CUT)
    model, losses = run(tmp_path, *([swa, cut] if first else [cut, swa]))
    assert model.net.first.d_state == 6
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.parameters(), swa._average_model.parameters(), strict=True)
    )
    assert losses[-1] < losses[0]


class WithTeacher(Classifier):
    """A user's own average of a part of the module, updated by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = AveragedModel(self.net, avg_fn=get_ema_avg_fn(0.9))
        self.gaps: list[float] = []

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.teacher.update_parameters(self.net)
        with torch.no_grad():
            self.gaps.append(float((self.net(batch[0]) - self.teacher(batch[0])).norm()))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.net.parameters(), lr=1e-2)


def test_an_average_inside_the_module(tmp_path: Path) -> None:
    model, cut = WithTeacher(), CompreSSMCallback(**CUT)
    run(tmp_path, cut, model=model)
    assert cut.state_dims == {"net.first": 6, "net.second": 6}
    assert model.teacher.module.first.d_state == 6
    at = 2 * BATCHES
    assert max(model.gaps[at : at + BATCHES]) < 2 * max(model.gaps[:at])


class Held(pl.Callback):
    """Holds modules that are no averages: the model itself, a part of it, something else."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self.model, self.part, self.other = pl_module, pl_module.net.first, nn.Linear(2, 2)


def test_other_modules_of_callbacks_are_left_alone(tmp_path: Path) -> None:
    held = Held()
    model, _ = run(tmp_path, held, CompreSSMCallback(**CUT))
    assert held.part is model.net.first
    assert held.part.d_state == 6


class Teacher(pl.Callback):
    """Holds a network of the model's class, with states of its own."""

    def __init__(self) -> None:
        self.teacher = Classifier(d_state=40)


def test_a_teacher_with_other_states_is_left_alone(tmp_path: Path) -> None:
    held = Teacher()
    before = {name: value.clone() for name, value in held.teacher.state_dict().items()}
    model, _ = run(tmp_path, held, CompreSSMCallback(**CUT))
    assert model.net.first.d_state == 6
    assert same(held.teacher.state_dict(), before)


def test_a_teacher_with_as_many_states_is_left_alone_and_named(tmp_path: Path) -> None:
    held = Teacher()
    held.teacher = Classifier()
    before = {name: value.clone() for name, value in held.teacher.state_dict().items()}
    with pytest.warns(UserWarning, match="leaves the Classifier that Teacher holds as it is"):
        model, _ = run(tmp_path, held, CompreSSMCallback(**CUT))
    assert model.net.first.d_state == 6
    assert same(held.teacher.state_dict(), before)
