"""The callback in a Trainer on CUDA: precisions, the gradient scaler, resume."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_compressm import CompreSSMCallback
from tests.callbacks.helpers import (
    BATCHES,
    Classifier,
    Plain,
    StatefulLoader,
    loader,
    same,
    trainer,
)

pytestmark = pytest.mark.cuda

CUT = {"state_dim": 4, "window": (0.0, 0.5), "verbose": False}


class Watch(pl.Callback):
    """What is where at the end of training; after it Lightning brings all to the CPU."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        (optimizer,) = trainer.optimizers
        state = [v for held in optimizer.state.values() for v in held.values() if v.ndim]
        self.devices = {t.device.type for t in [*pl_module.parameters(), *state]}
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self.held = held == {id(p) for p in pl_module.parameters()}


def there(tmp: Path, device: torch.device, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    """A Trainer on the device."""
    kind = "gpu" if device.type == "cuda" else "cpu"
    return trainer(tmp, *callbacks, accelerator=kind, **options)


def assert_cut(
    model: Classifier, callback: CompreSSMCallback, watch: Watch, device: torch.device
) -> None:
    """Reduced, everything where it belongs, and learning."""
    assert set(callback.state_dims.values()) == {4}
    assert watch.devices == {device.type}
    assert watch.held
    assert all(map(math.isfinite, model.losses))
    assert sum(model.losses[-BATCHES:]) < sum(model.losses[:BATCHES])


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("make", [Classifier, Plain])
def test_precisions(
    device: torch.device, tmp_path: Path, make: type[Classifier], precision: Any
) -> None:
    model, callback, watch = make().float(), CompreSSMCallback(**CUT), Watch()
    fit = there(tmp_path, device, callback, watch, precision=precision)
    fit.fit(model, loader(), loader(1))
    assert_cut(model, callback, watch, device)


@pytest.mark.parametrize("clip", [None, 1.0])
def test_half_precision_with_a_gradient_scaler(
    cuda: torch.device, tmp_path: Path, clip: float | None
) -> None:
    """The scaler starts at 2^16, where steps overflow and are left out; the cut is after some."""
    model, callback, watch = Classifier(dtype="float32"), CompreSSMCallback(**CUT), Watch()
    fit = there(tmp_path, cuda, callback, watch, precision="16-mixed", gradient_clip_val=clip)
    fit.fit(model, loader(), loader(1))
    assert_cut(model, callback, watch, cuda)
    scaler = fit.precision_plugin.scaler  # type: ignore[attr-defined]
    assert scaler.is_enabled()
    assert 0 < scaler.get_scale() <= 2**16


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_fused", "sgd"])
def test_without_arguments(device: torch.device, tmp_path: Path, optimizer: str) -> None:
    """Cuts are tried on a copy of the model, on a batch that has to be where the model is."""
    model = Classifier(optimizer, dtype="float32")
    callback = CompreSSMCallback(verbose=False)
    there(tmp_path, device, callback, max_epochs=5).fit(model, loader(), loader(1))
    assert callback.history
    cuts = [event for event in callback.history if event["action"] == "reduce"]
    assert all(event["loss_change"] is not None for event in cuts)
    assert all(map(math.isfinite, model.losses))


@pytest.mark.parametrize("make", [Classifier, Plain])
def test_the_cpu_trains_to_the_same(
    device: torch.device, tmp_path: Path, make: type[Classifier]
) -> None:
    """In double precision, through a cut; after it Adam sees another basis of the same states."""
    losses = []
    for where in (torch.device("cpu"), device):
        model, callback = make(), CompreSSMCallback(**CUT)
        there(tmp_path, where, callback).fit(model, loader())
        assert set(callback.state_dims.values()) == {4}
        losses.append(model.losses)
    before, after = slice(BATCHES), slice(BATCHES, BATCHES + 1)
    torch.testing.assert_close(losses[1][before], losses[0][before], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(losses[1][after], losses[0][after], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(losses[1], losses[0], rtol=0.1, atol=0.1)


@pytest.mark.parametrize("step", [BATCHES, 2 * BATCHES, 2 * BATCHES + 2])
def test_resume_is_bitwise_equal(device: torch.device, tmp_path: Path, step: int) -> None:
    """From before the swap, after it, and from the middle of an epoch."""
    settings: dict[str, Any] = {"tolerance": 0.2, "window": (0.0, 0.5), "verbose": False}
    runs = []
    for name in ("whole", "resumed"):
        model, callback = Classifier("adamw"), CompreSSMCallback(**settings)
        at_end = step % BATCHES == 0
        when = {"save_on_train_epoch_end": True} if at_end else {"every_n_train_steps": 2}
        saver = ModelCheckpoint(tmp_path / name, "{step}", save_top_k=-1, **when)
        fit = there(tmp_path, device, callback, saver, max_epochs=5, enable_checkpointing=True)
        path = tmp_path / f"whole/step={step}.ckpt" if name == "resumed" else None
        fit.fit(model, StatefulLoader(), ckpt_path=path)
        history = [{**event, "seconds": 0.0} for event in callback.history]
        runs.append((model, fit.optimizers[0].state_dict(), history))
    (whole, optimizer, history), (resumed, again, told) = runs
    assert any(event["action"] == "reduce" for event in history)
    assert resumed.losses == whole.losses[step:]
    assert same(resumed.state_dict(), whole.state_dict())
    assert same(again, optimizer)
    assert told == history
