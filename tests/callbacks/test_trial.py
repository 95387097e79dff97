"""The bare callback: cuts are tried on the loss of a training batch before they are made."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics import MeanMetric

from lightning_compressm import CompreSSMCallback

from .helpers import (
    Classifier,
    StatefulLoader,
    SteppedByHand,
    dataset,
    loader,
    same,
    trainer,
)

EPOCHS = 5  # 30 steps
LOOKS = {3, 6, 9}


def fitted(tmp: Path, model: Classifier, *callbacks: Any, **settings: Any) -> Any:
    fit = trainer(tmp, *callbacks, **{"max_epochs": EPOCHS} | settings)
    fit.fit(model, loader())
    return fit


def cuts(callback: CompreSSMCallback) -> list[tuple[int, str, int]]:
    return [
        (e["step"], e["layer"], e["new_state_dim"])
        for e in callback.history
        if e["action"] == "reduce"
    ]


TWICE = [
    (3, "net.first", 12), (3, "net.second", 6), (6, "net.first", 6), (6, "net.second", 3)
]  # fmt: skip


def test_halves_twice_down_to_a_quarter(tmp_path: Path) -> None:
    callback = CompreSSMCallback(loss_budget=0.5, verbose=False)
    fitted(tmp_path, Classifier("adamw"), callback)
    assert cuts(callback) == TWICE
    assert all(abs(e["loss_change"]) <= 0.5 for e in callback.history if e["action"] == "reduce")
    later = [e["reason"] for e in callback.history if e["step"] > 6]
    assert later == [f"it has not more than its least number of states, {n}" for n in (6, 3)]


class Learning(Classifier):
    """Its loss falls to a twentieth after the first look."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return super().training_step(batch, batch_idx) * (1 if self.global_step < 3 else 0.05)


def test_goes_on_to_a_sixteenth_once_the_loss_has_fallen(tmp_path: Path) -> None:
    callback = CompreSSMCallback(loss_budget=0.9, verbose=False)
    fitted(tmp_path, Learning("adamw"), callback)
    assert cuts(callback) == [
        (3, "net.first", 12), (3, "net.second", 6), (6, "net.first", 6), (6, "net.second", 3),
        (9, "net.first", 3), (9, "net.second", 2),
    ]  # fmt: skip


def test_a_floor_ends_it_earlier(tmp_path: Path) -> None:
    callback = CompreSSMCallback(loss_budget=0.5, floor=0.5, verbose=False)
    fitted(tmp_path, Classifier("adamw"), callback)
    assert callback.state_dims == {"net.first": 12, "net.second": 6}


class Sensitive(Classifier):
    """Its loss is told to be a thousand where states are missing."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        missing = {"first": 24, "second": 12}
        lost = any(getattr(self.net, name).d_state < full for name, full in missing.items())
        return loss + 1000 * lost


def test_what_costs_too_much_is_left_and_said(tmp_path: Path) -> None:
    callback = CompreSSMCallback(verbose=False)
    fitted(tmp_path, Sensitive("adamw"), callback)
    assert {event["action"] for event in callback.history} == {"skip"}
    assert all("more than loss_budget = 2.00%" in event["reason"] for event in callback.history)
    assert callback.state_dims == {"net.first": 24, "net.second": 12}


class Eventful(Classifier):
    """Counts, logs, draws random numbers, and has statistics of its own."""

    def __init__(self) -> None:
        super().__init__("adamw")
        self.norm = nn.BatchNorm1d(3).double()
        self.mean, self.calls = MeanMetric(), 0

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.calls += 1
        x, y = batch
        noise = torch.rand(3).double() + random.random()
        logits = self.norm(self.net(x) + (noise if self.training else 0))
        loss = nn.functional.cross_entropy(logits, y)
        self.mean.update(loss.detach())
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        self.losses.append(loss.item())
        return loss


def test_a_trial_leaves_no_trace(tmp_path: Path) -> None:
    """A run whose looks may change nothing is the run without the callback, to the bit."""
    runs = []
    for callbacks in ([], [CompreSSMCallback(min_reduction=0.99, floor=0.0, verbose=False)]):
        torch.manual_seed(1)
        random.seed(1)
        model = Eventful()
        fit = fitted(tmp_path, model, *callbacks)
        logged = fit.callback_metrics["train_loss"]
        runs.append((model.losses, model.state_dict(), model.calls, model.mean.compute(), logged))
    assert len(callbacks[0].history) == 2 * len(LOOKS)
    assert all(same(a, b) for a, b in zip(*runs, strict=True))


class Slow(Classifier):
    """Trials take their time."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        time.sleep(0 if self.training else 0.02)
        return super().training_step(batch, batch_idx)


def test_the_time_of_trials_is_told(tmp_path: Path) -> None:
    callback = CompreSSMCallback(loss_budget=0.5, window=(3, 4), verbose=False)
    fitted(tmp_path, Slow("adamw"), callback, max_steps=4)
    told = sum(event["seconds"] for event in callback.history)
    assert told > 4 * 0.02  # the loss as it is, the task's Gramians, and a cut of each layer


class Manual(SteppedByHand, Classifier):
    def __init__(self) -> None:
        super().__init__("adamw")


class Unrepeatable(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if not self.training:
            raise RuntimeError("not in evaluation")
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    ("model", "why"),
    [(Manual, "it optimizes by hand"), (lambda: Unrepeatable("adamw"), "not in evaluation")],
)
def test_without_a_trial_the_energy_rule_decides(model: Any, why: str, tmp_path: Path) -> None:
    callback = CompreSSMCallback(verbose=False)
    with pytest.warns(UserWarning, match=f"{why}.*tolerance=0.05") as caught:
        fitted(tmp_path, model(), callback)
    assert sum("can't tell what a reduction costs" in str(w.message) for w in caught) == 1
    assert {event["step"] for event in callback.history} == LOOKS
    assert all(event["loss_change"] is None for event in callback.history)
    kept = [e["energy_kept"] for e in callback.history if e["action"] == "reduce"]
    assert kept
    assert min(kept) >= 0.95


@pytest.mark.parametrize(
    ("kind", "budget", "step"),
    [*((Classifier, 0.05, step) for step in (2, 4, 6)), (Learning, 0.9, 8)],
)
def test_resume_is_bitwise_equal(kind: Any, budget: float, step: int, tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    runs = []
    for path in (None, tmp_path / f"step={step}.ckpt"):
        model, callback = kind("adamw"), CompreSSMCallback(loss_budget=budget, verbose=False)
        callbacks = [callback, *([] if path else [keep])]
        fit = trainer(tmp_path, *callbacks, max_epochs=EPOCHS, enable_checkpointing=path is None)
        fit.fit(model, StatefulLoader(), ckpt_path=path)
        history = [{**event, "seconds": 0.0} for event in callback.history]
        runs.append((history, model.state_dict(), fit.optimizers[0].state_dict()))
    assert any(event["action"] == "reduce" for event in runs[0][0])
    assert all(same(a, b) for a, b in zip(*runs, strict=True))


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        while True:
            yield from dataset()


def test_runs_of_unknown_length_are_looked_at_ever_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_compressm.callbacks.schedule.ENDLESS", (2, 4, 8))
    callback = CompreSSMCallback(verbose=False)
    fit = trainer(tmp_path, callback, max_epochs=1, max_time={"seconds": 2})
    fit.fit(Classifier("adamw"), DataLoader(Endless(), batch_size=8))
    assert {event["step"] for event in callback.history} == {2, 4, 8}


def test_accumulated_batches_are_one_step(tmp_path: Path) -> None:
    callback = CompreSSMCallback(loss_budget=0.5, verbose=False)
    fitted(tmp_path, Classifier("adamw"), callback, accumulate_grad_batches=2, max_epochs=10)
    assert {event["step"] for event in callback.history} == LOOKS
    assert callback._run.trials.starts == {"net.first": 24, "net.second": 12}
    assert len(callback._run.trials.losses) <= 2 * (max(LOOKS) + 1)
