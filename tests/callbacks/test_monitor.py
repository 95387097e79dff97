"""HankelMonitor watches spectra over training and changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_compressm import CompreSSMCallback, HankelMonitor

from .helpers import Classifier, Plain, StatefulLoader, loader, trainer


@pytest.mark.parametrize("make", [Classifier, Plain])
def test_logs_spectra_and_changes_nothing(make: type[Classifier], tmp_path: Path) -> None:
    watched, alone, monitor = make(), make(), HankelMonitor(tolerance=0.1)
    fit = trainer(tmp_path, monitor)
    fit.fit(watched, loader())
    trainer(tmp_path).fit(alone, loader())
    for name, value in alone.state_dict().items():
        assert torch.equal(value, watched.state_dict()[name])
    assert [entry["epoch"] for entry in monitor.history] == [0, 1, 2]
    size = 16 if make is Plain else 24
    for entry in monitor.history:
        sigma = entry["spectra"]["net.first"]
        assert sigma.shape == (size,)
        assert bool((sigma.diff() <= 0).all())
    metrics = fit.callback_metrics
    assert 1 <= float(metrics["hankel/rank/net.first"]) < size
    last = monitor.history[-1]["spectra"]["net.first"]
    assert float(metrics["hankel/energy/net.first"]) == pytest.approx(float(last.sum()), rel=1e-5)


def test_every_other_epoch_and_some_layers(tmp_path: Path) -> None:
    monitor = HankelMonitor(every_n_epochs=2, layers=["*.second"])
    trainer(tmp_path, monitor, max_epochs=4).fit(Classifier(), loader())
    assert [entry["epoch"] for entry in monitor.history] == [1, 3]
    assert set(monitor.history[0]["spectra"]) == {"net.second"}


def test_a_second_run_starts_anew(tmp_path: Path) -> None:
    monitor = HankelMonitor()
    for _ in range(2):
        trainer(tmp_path, monitor, max_epochs=2).fit(Classifier(), loader())
        assert [entry["epoch"] for entry in monitor.history] == [0, 1]


def test_a_layer_that_does_nothing_needs_no_state(tmp_path: Path) -> None:
    model, monitor = Classifier(), HankelMonitor()
    with torch.no_grad():
        model.net.first.C_re.zero_()
        model.net.first.C_im.zero_()
    model.net.first.requires_grad_(False)
    fit = trainer(tmp_path, monitor, max_epochs=1)
    fit.fit(model, loader())
    assert float(fit.callback_metrics["hankel/rank/net.first"]) == 0
    assert float(fit.callback_metrics["hankel/energy/net.first"]) == 0


class Skipping(Plain):
    """Ends every epoch at its third batch."""

    def on_train_batch_start(self, batch: object, batch_idx: int) -> int:
        return -1 if batch_idx == 2 else 0


def test_a_skipped_batch_leaves_no_hooks(tmp_path: Path) -> None:
    model = Skipping()
    callbacks = [HankelMonitor(), CompreSSMCallback(state_dim=8, window=(0, 3), verbose=False)]
    trainer(tmp_path, *callbacks).fit(model, loader())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_test_of_a_checkpoint_keeps_the_history(tmp_path: Path) -> None:
    monitor, cut = HankelMonitor(), CompreSSMCallback(state_dim=8, window=(0, 6), verbose=False)
    keep = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, monitor=None)
    fit = trainer(tmp_path, monitor, cut, keep, enable_checkpointing=True)
    fit.fit(Classifier(), loader(), loader(1))
    before = [list(monitor.history), list(cut.history)]
    fit.validate(Classifier(), loader(1), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)
    assert [entry["epoch"] for entry in monitor.history] == [0, 1, 2]
    assert [monitor.history, cut.history] == before


def test_unknown_pattern_is_refused_before_the_first_step(tmp_path: Path) -> None:
    model = Classifier()
    with pytest.raises(ValueError, match="matches no SSM layer"):
        trainer(tmp_path, HankelMonitor(layers=["nothing"])).fit(model, loader())
    assert model.losses == []


def test_goes_on_after_a_resume_at_the_end_of_an_epoch(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, save_on_train_epoch_end=False)
    fit = trainer(tmp_path, HankelMonitor(), keep, enable_checkpointing=True)
    fit.fit(Plain(), StatefulLoader(), loader(1))
    resumed = HankelMonitor()
    (path,) = tmp_path.glob("step=6.ckpt")
    trainer(tmp_path, resumed).fit(Plain(), StatefulLoader(), loader(1), ckpt_path=path)
    assert [entry["epoch"] for entry in resumed.history] == [1, 2]
