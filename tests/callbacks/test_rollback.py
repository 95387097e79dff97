"""Rollback: the next validation decides whether a reduction stays."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_compressm import CompreSSMCallback
from lightning_compressm.errors import CheckpointError

from ..features import needs_ema
from .helpers import BATCHES, Classifier, StatefulLoader, loader, same, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:CompreSSMCallback took the last reduction back"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]

CUT = {"state_dim": 1, "window": (0, 2 * BATCHES), "every_n_epochs": 2, "verbose": False}
GUARD = CUT | {"monitor": "val_loss", "max_degradation": 0.0}


class Judged(Classifier):
    """Its validation metric is what the test says, after each epoch."""

    def __init__(self, metrics: list[float], *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.metrics = metrics
        self.norm = nn.BatchNorm1d(4).double()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        hidden = self.net.encoder(x)
        hidden = self.norm((hidden + self.net.first(hidden)).mT).mT
        hidden = hidden + self.net.second(hidden)
        loss = nn.functional.cross_entropy(self.net.decoder(hidden.mean(1)), y)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        done = 0 if self.trainer.sanity_checking else self.trainer.current_epoch
        self.log("score", self.metrics[done])


class Record(pl.Callback):
    """What the model and the optimizer are at the start of every epoch, before anything changes."""

    def __init__(self) -> None:
        self.values: dict[int, Any] = {}
        self.rates: list[float] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.values[trainer.current_epoch] = capture(trainer, pl_module)

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


class RecordAfter(Record):
    """The same, after the callback under test."""


def capture(trainer: Any, pl_module: Any) -> dict[str, Any]:
    return {
        "model": deepcopy(pl_module.state_dict()),
        "optimizer": deepcopy(trainer.optimizers[0].state_dict()["state"]),
    }


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "adamw_fused", "lbfgs"])
@pytest.mark.parametrize("directory", [False, True], ids=["memory", "disk"])
def test_a_worse_metric_brings_everything_back(
    tmp_path: Path, optimizer: str, directory: bool
) -> None:
    """Epoch 2 is trained on the reduced model, its validation is bad: epoch 3 starts as epoch 2."""
    model = Judged([1.0, 0.9, 1.5, 0.9, 0.8], optimizer)
    before, after = Record(), RecordAfter()
    callback = CompreSSMCallback(
        **CUT,
        monitor="score",
        max_degradation=0.1,
        rollback_dir=str(tmp_path / "kept") if directory else None,
    )
    fit = trainer(tmp_path, before, callback, after, max_epochs=5)
    fit.fit(model, loader(), loader(1))
    assert after.values[2]["model"]["net.first.nu_log"].shape == (1,)
    assert same(after.values[3], before.values[2])
    assert model.net.first.d_state == 24
    assert [e["action"] for e in callback.history] == ["reduce"] * 2 + ["rollback"] * 2
    event = callback.history[2]
    assert (event["old_state_dim"], event["new_state_dim"]) == (1, 24)
    assert "score went from 0.9 to 1.5" in event["reason"]
    assert callback.state_dims == {"net.first": 24, "net.second": 12}
    assert not list(tmp_path.glob("kept/*"))
    bound = [p for group in fit.optimizers[0].param_groups for p in group["params"]]
    assert {id(p) for p in bound} == {id(p) for p in model.parameters()}
    assert not same(capture(fit, model)["model"], after.values[3]["model"]), "it trains on"
    # The schedule goes on as in a run without any reduction.
    plain = Record()
    trainer(tmp_path, plain, max_epochs=5).fit(Judged([1.0] * 5, optimizer), loader(), loader(1))
    assert before.rates == plain.rates


@pytest.mark.parametrize(
    ("mode", "metrics", "rolled_back"),
    [
        ("min", [1.0, 0.9, 0.99, 0.9, 0.8], False),
        ("min", [1.0, 0.9, 1.01, 0.9, 0.8], True),
        ("max", [0.5, 0.9, 0.81, 0.9, 0.8], False),
        ("max", [0.5, 0.9, 0.79, 0.9, 0.8], True),
        ("max", [0.5, 0.9, 1.5, 0.1, 0.1], False),  # only the next validation decides
        ("min", [1.0, 0.9, float("nan"), 0.9, 0.8], True),
    ],
)
def test_verdict(tmp_path: Path, mode: Any, metrics: list[float], rolled_back: bool) -> None:
    model = Judged(metrics)
    callback = CompreSSMCallback(**CUT, monitor="score", mode=mode, max_degradation=0.1)
    trainer(tmp_path, callback, max_epochs=5).fit(model, loader(), loader(1))
    assert (model.net.first.d_state == 24) is rolled_back
    assert ("rollback" in {e["action"] for e in callback.history}) is rolled_back


def test_nothing_is_reduced_after_a_rollback(tmp_path: Path) -> None:
    model = Judged([1.0, 1.5, 1.0, 1.0, 1.0])
    callback = CompreSSMCallback(
        fraction=0.5, window=(0, 4 * BATCHES), monitor="score", verbose=False
    )
    trainer(tmp_path, callback, max_epochs=5).fit(model, loader(), loader(1))
    assert [e["action"] for e in callback.history] == ["reduce"] * 2 + ["rollback"] * 2
    assert {e["step"] for e in callback.history} == {BATCHES, 2 * BATCHES}


def test_no_reduction_before_the_first_validation(tmp_path: Path) -> None:
    """The window ends in the first epoch; the look waits for a metric to compare with."""
    model = Judged([1.0, 1.0, 1.0])
    callback = CompreSSMCallback(
        state_dim=4, window=(0, 2), every_n_steps=1, monitor="score", verbose=False
    )
    trainer(tmp_path, callback).fit(model, loader(), loader(1))
    assert {e["step"] for e in callback.history} == {BATCHES + 1}
    assert model.net.first.d_state == 4


def test_reductions_between_two_validations_go_back_together(tmp_path: Path) -> None:
    model = Judged([1.0, 2.0, 1.0, 1.0])
    callback = CompreSSMCallback(
        fraction=0.2,
        min_reduction=0.0,
        window=(BATCHES, 2 * BATCHES),
        every_n_steps=2,
        monitor="score",
        verbose=False,
    )
    trainer(tmp_path, callback, max_epochs=4).fit(model, loader(), loader(1))
    actions = [e["action"] for e in callback.history if e["layer"] == "net.first"]
    assert actions[-1] == "rollback"
    assert actions.count("reduce") >= 2
    assert model.net.first.d_state == 24


@needs_ema
def test_the_last_validation_counts_too(tmp_path: Path) -> None:
    model = Judged([1.0, 2.0])
    callback = CompreSSMCallback(state_dim=2, window=(0.0, 0.5), monitor="score", verbose=False)
    ema = pl.callbacks.EMAWeightAveraging(decay=0.5)
    before = Record()
    fit = trainer(tmp_path, ema, before, callback, max_epochs=2)
    fit.fit(model, loader(), loader(1))
    assert model.net.first.d_state == 24
    average = ema._average_model.module
    assert average.net.first.d_state == 24
    assert same(model.state_dict(), average.state_dict()), "the average is what training ends with"


@pytest.mark.parametrize("directory", [False, True], ids=["memory", "disk"])
@pytest.mark.parametrize("epoch", [1, 2], ids=["plan committed", "verdict pending"])
def test_rollback_survives_a_restart(tmp_path: Path, directory: bool, epoch: int) -> None:
    """Stop with the reduction planned or judged bad; the resumed run is bitwise the same."""

    def run(path: Path, checkpoint: Path | None = None) -> tuple[Judged, Any, pl.Trainer]:
        model = Judged([1.0, 0.9, 1.5, 0.9, 0.8])
        callback = CompreSSMCallback(
            **CUT, monitor="score", rollback_dir=str(path / "kept") if directory else None
        )
        keep = ModelCheckpoint(path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        fit = trainer(path, callback, keep, max_epochs=5, enable_checkpointing=True)
        fit.fit(model, StatefulLoader(), loader(1), ckpt_path=checkpoint)
        return model, callback, fit

    whole, callback, fit = run(tmp_path / "whole")
    checkpoint = tmp_path / "whole" / f"epoch={epoch}.ckpt"
    torch.load(checkpoint, weights_only=True)
    if directory and epoch == 2:  # the whole run has used its file up; stop one before that
        checkpoint = _stopped_after(tmp_path / "stopped", epoch)
    again, callback_again, fit_again = run(tmp_path / "stopped", checkpoint)
    assert same(again.state_dict(), whole.state_dict())
    assert same(capture(fit_again, again), capture(fit, whole))
    strip = [[{**e, "seconds": 0} for e in c.history] for c in (callback, callback_again)]
    assert strip[0] == strip[1]


def test_runs_in_one_folder_keep_apart(tmp_path: Path) -> None:
    checkpoint, kept = _stopped_after(tmp_path, 2), tmp_path / "kept"
    (file,) = kept.glob("*.pt")
    _stopped_after(tmp_path, 2, lr=0.5)
    assert len(list(kept.glob("*.pt"))) == 2
    model = Judged([1.0, 0.9, 1.5, 0.9, 0.8])
    callback = CompreSSMCallback(**CUT, monitor="score", rollback_dir=str(kept))
    before = torch.load(file, weights_only=True)["model"]
    after = RecordAfter()
    trainer(tmp_path, callback, after, max_epochs=4).fit(
        model, StatefulLoader(), loader(1), ckpt_path=checkpoint
    )
    assert [e["action"] for e in callback.history] == ["reduce"] * 2 + ["rollback"] * 2
    assert not file.exists()
    assert len(list(kept.glob("*.pt"))) == 1
    restored = after.values[3]["model"]
    assert same({k: v for k, v in before.items() if k in restored}, restored)


def _stopped_after(path: Path, epoch: int, **settings: Any) -> Path:
    class Stop(pl.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == epoch + 1:
                raise KeyboardInterrupt

    callback = CompreSSMCallback(**CUT, monitor="score", rollback_dir=str(path / "kept"))
    keep = ModelCheckpoint(path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    fit = trainer(path, Stop(), callback, keep, max_epochs=5, enable_checkpointing=True)
    with pytest.raises(SystemExit):
        fit.fit(Judged([1.0, 0.9, 1.5, 0.9, 0.8], **settings), StatefulLoader(), loader(1))
    assert list((path / "kept").glob("*.pt"))
    return path / f"epoch={epoch}.ckpt"


def test_a_lost_file_stops_the_run_with_its_name(tmp_path: Path) -> None:
    checkpoint = _stopped_after(tmp_path, 2)
    (file,) = (tmp_path / "kept").glob("*.pt")
    file.unlink()
    callback = CompreSSMCallback(**CUT, monitor="score", rollback_dir=str(tmp_path / "kept"))
    model = Judged([1.0, 0.9, 1.5, 0.9, 0.8])
    with pytest.raises(CheckpointError, match=r"before_reduction\.\w+\.step\d+\.rank0\.pt"):
        trainer(tmp_path, callback, max_epochs=5).fit(
            model, StatefulLoader(), loader(1), ckpt_path=checkpoint
        )
    assert model.net.first.d_state == 1


def test_a_real_degradation(tmp_path: Path) -> None:
    """No invented metric: one state of 24 is too few for the task."""
    model = Classifier(lr=0.02)
    callback = CompreSSMCallback(**GUARD | {"window": (0, 4 * BATCHES), "every_n_epochs": 4})
    trainer(tmp_path, callback, max_epochs=6).fit(model, loader(), loader(1))
    reduced = [e["action"] for e in callback.history if e["layer"] == "net.first"]
    assert reduced == ["reduce", "rollback"]


def test_monitor_needs_a_validation(tmp_path: Path) -> None:
    model = Classifier()
    with pytest.raises(ValueError, match=r"monitor='val_loss': expected a run with validation"):
        trainer(tmp_path, CompreSSMCallback(**GUARD)).fit(model, loader())
    assert not model.losses


def test_monitor_that_is_not_logged(tmp_path: Path) -> None:
    callback = CompreSSMCallback(**CUT, monitor="accuracy")
    with pytest.raises(ValueError, match=r"'accuracy' was not logged.*'val_loss'"):
        trainer(tmp_path, callback).fit(Classifier(), loader(), loader(1))
