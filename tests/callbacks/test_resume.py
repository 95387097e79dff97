"""Checkpoints around a reduction: resume, evaluate, load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_compressm import CompreSSMCallback, load_compressed

from ..features import from_lightning
from ..processes import run_one
from .helpers import BATCHES, Classifier, StatefulLoader, loader, same, trainer
from .resume_worker import SETTINGS

EPOCHS = 6


class EpochCheckpoint(ModelCheckpoint):
    """Another class name, so that its state is kept apart from the validated one's."""


class Uninterrupted:
    """One run that leaves checkpoints of every kind behind."""

    def __init__(self, tmp: Path) -> None:
        self.model, self.callback = Classifier("adamw"), CompreSSMCallback(**SETTINGS)
        name = "{epoch}-{step}"
        kinds: list[pl.Callback] = [
            ModelCheckpoint(tmp / "validated", name, save_top_k=-1),
            EpochCheckpoint(tmp / "epoch", name, save_top_k=-1, save_on_train_epoch_end=True),
            ModelCheckpoint(tmp / "step", name, save_top_k=-1, every_n_train_steps=4),
        ]
        fit = trainer(tmp, self.callback, *kinds, max_epochs=EPOCHS, enable_checkpointing=True)
        fit.fit(self.model, StatefulLoader(), loader(1))
        self.optimizer = fit.optimizers[0].state_dict()
        self.tmp = tmp

    def checkpoint(self, kind: str, step: int) -> Path:
        (path,) = (self.tmp / kind).glob(f"*-step={step}.ckpt")
        return path


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Uninterrupted:
    torch.manual_seed(0)
    return Uninterrupted(tmp_path_factory.mktemp("run"))


def test_the_run_was_reduced_twice_or_more(uninterrupted: Uninterrupted) -> None:
    reduced = {e["step"] for e in uninterrupted.callback.history if e["action"] == "reduce"}
    assert {BATCHES, 2 * BATCHES} <= reduced


@pytest.mark.parametrize(
    ("kind", "step"),
    [
        ("epoch", BATCHES),  # a plan is committed to, but not carried out
        ("epoch", 2 * BATCHES),  # after one reduction, before the next
        ("epoch", 4 * BATCHES),  # after the window
        ("validated", BATCHES),  # written before the epoch's look
        ("validated", 2 * BATCHES),
        ("step", 8),  # in the middle of an epoch
        ("step", 20),
    ],
)
def test_resume_is_bitwise_equal(
    uninterrupted: Uninterrupted, tmp_path: Path, kind: str, step: int
) -> None:
    model, callback = Classifier("adamw"), CompreSSMCallback(**SETTINGS)
    fit = trainer(tmp_path, callback, max_epochs=EPOCHS)
    path = uninterrupted.checkpoint(kind, step)
    fit.fit(model, StatefulLoader(), loader(1), ckpt_path=path)
    assert model.losses == uninterrupted.model.losses[step:]
    assert same(model.state_dict(), uninterrupted.model.state_dict())
    assert same(fit.optimizers[0].state_dict(), uninterrupted.optimizer)
    strip = [{**e, "seconds": 0} for e in callback.history]
    assert strip == [{**e, "seconds": 0} for e in uninterrupted.callback.history]


@from_lightning("2.5", "Lightning 2.4 resumes within an accumulation in a wrong place")
def test_a_resumed_accumulation_is_no_optimizer_step(tmp_path: Path) -> None:
    # The checkpoint's step is one of the schedule's: it was looked at before it was written.
    runs = []
    for name in ("whole", "resumed"):
        torch.manual_seed(0)
        callback = CompreSSMCallback(
            fraction=0.5, window=(0, 8), every_n_steps=2, min_state_dim=1, verbose=False
        )
        saver = ModelCheckpoint(tmp_path / name, "{step}", save_top_k=-1, every_n_train_steps=2)
        fit = trainer(
            tmp_path, callback, saver, max_epochs=2, accumulate_grad_batches=2,
            enable_checkpointing=True,
        )  # fmt: skip
        path = tmp_path / "whole/step=2.ckpt" if name == "resumed" else None
        model = Classifier("adamw")
        fit.fit(model, StatefulLoader(), loader(1), ckpt_path=path)
        runs.append((callback, model))
    (whole, one), (resumed, other) = runs
    steps = [e["step"] for e in whole.history if e["action"] == "reduce"]
    assert 2 in steps
    assert [e["step"] for e in resumed.history if e["action"] == "reduce"] == steps
    assert same(one.state_dict(), other.state_dict())


def test_resume_in_a_fresh_process(uninterrupted: Uninterrupted, tmp_path: Path) -> None:
    step = 2 * BATCHES
    checkpoint = uninterrupted.checkpoint("epoch", step)
    run_one("resume_worker", checkpoint, tmp_path / "out.pt", EPOCHS)
    fresh = torch.load(tmp_path / "out.pt", weights_only=True)
    assert fresh["losses"] == uninterrupted.model.losses[step:]
    assert same(fresh["state_dict"], uninterrupted.model.state_dict())
    assert same(fresh["optimizer"], uninterrupted.optimizer)


def test_longer_resume_does_not_move_the_window(
    uninterrupted: Uninterrupted, tmp_path: Path
) -> None:
    callback = CompreSSMCallback(**SETTINGS)
    fit = trainer(tmp_path, callback, max_epochs=4 * EPOCHS)
    fit.fit(Classifier("adamw"), loader(), ckpt_path=uninterrupted.checkpoint("epoch", BATCHES))
    assert max(event["step"] for event in callback.history) <= 0.5 * EPOCHS * BATCHES


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_evaluation_from_a_reduced_checkpoint(
    uninterrupted: Uninterrupted, tmp_path: Path, stage: str
) -> None:
    class Evaluated(Classifier):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.validation_step(batch, batch_idx)

        def predict_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return self.net(batch[0])

    model = Evaluated("adamw")
    run = getattr(trainer(tmp_path, CompreSSMCallback(**SETTINGS)), stage)
    run(model, loader(1), ckpt_path=uninterrupted.checkpoint("epoch", EPOCHS * BATCHES))
    assert same(model.state_dict(), uninterrupted.model.state_dict())


def test_load_from_checkpoint_and_load_compressed(uninterrupted: Uninterrupted) -> None:
    path = uninterrupted.checkpoint("epoch", EPOCHS * BATCHES)
    loaded = Classifier.load_from_checkpoint(path)
    assert same(loaded.state_dict(), uninterrupted.model.state_dict())
    ours = load_compressed(Classifier("adamw"), path)
    assert ours.net.first.d_state == uninterrupted.model.net.first.d_state
    assert same(ours.state_dict(), uninterrupted.model.state_dict())


def test_checkpoint_is_plain_data(uninterrupted: Uninterrupted) -> None:
    path = uninterrupted.checkpoint("epoch", BATCHES)
    data = torch.load(path, weights_only=True)
    (state,) = (v for k, v in data["callbacks"].items() if k.startswith("CompreSSMCallback"))
    assert state["window"] == [0, 18]
    assert state["pending"]["plan"]["attributes"]["net.first.d_state"] < 24


class Worse(Classifier):
    """Its score gets worse with every validation."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("score", float(self.trainer.global_step))


@pytest.mark.filterwarnings("ignore:CompreSSMCallback took the last reduction back")
def test_a_verdict_waits_for_the_next_step_after_a_resume_within_an_epoch(tmp_path: Path) -> None:
    """No epoch begins there, though Lightning 2.4 says so."""
    runs = []
    for name in ("whole", "resumed"):
        callback = CompreSSMCallback(
            state_dim=6, window=(7, 8), every_n_steps=4, monitor="score", verbose=False
        )
        saver = ModelCheckpoint(tmp_path / name, "{step}", monitor="score", save_top_k=-1)
        fit = trainer(
            tmp_path, callback, saver, max_epochs=2, val_check_interval=3, enable_checkpointing=True
        )
        model = Worse()
        path = tmp_path / "whole/step=9.ckpt" if name == "resumed" else None
        fit.fit(model, StatefulLoader(), loader(1), ckpt_path=path)
        runs.append((model, callback))
    (whole, one), (resumed, other) = runs
    events = [(e["action"], e["step"]) for e in one.history]
    assert events == [("reduce", 8)] * 2 + [("rollback", 10)] * 2
    assert [(e["action"], e["step"]) for e in other.history] == events
    assert resumed.losses == whole.losses[9:]
