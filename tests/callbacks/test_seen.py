"""What is seen of the data: every call, every length, nothing that was overwritten since."""

from __future__ import annotations

import pickle
from io import BytesIO
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_compressm import CompreSSMCallback, HankelMonitor, compress, load_compressed
from lightning_compressm.callbacks._losses import LossWatch
from lightning_compressm.errors import CalibrationError, NonFiniteError
from lightning_compressm.nn import LRU
from lightning_compressm.nn._mamba import MambaBlock

from ..features import from_lightning
from .helpers import BATCHES, LENGTH, Classifier, Plain, dataset, loader, trainer

QUIET: dict[str, Any] = {"verbose": False, "max_output_error": None}


class BothWays(nn.Module):
    """One block, used in both directions."""

    def __init__(self) -> None:
        super().__init__()
        self.block = MambaBlock(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        # The second call sees nothing but zeros.
        return self.block(x) + self.block(torch.zeros_like(x))


def _relative(output: Tensor, wanted: Tensor) -> float:
    return float((output - wanted).norm() / wanted.norm())


@torch.no_grad()
def test_all_calls_of_a_layer_count():
    model, x = BothWays(), torch.randn(4, 16, 4)
    before = model.block(x)
    event = compress(model, state_dim=3, sample=x, max_output_error=None).events[0]
    assert event.output_error == pytest.approx(_relative(model.block(x), before), rel=1e-3)


class Overwriting(nn.Module):
    """Forgets what it gave to its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.block = MambaBlock(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.0
        output = self.block(x)
        with torch.no_grad():
            x.detach().zero_()
        return output


@torch.no_grad()
def test_inputs_that_the_model_overwrites_are_copied():
    model, x = Overwriting(), torch.randn(4, 16, 4)
    before = model(x)
    event = compress(model, state_dim=3, sample=[x], max_output_error=None).events[0]
    assert event.output_error == pytest.approx(_relative(model(x), before), rel=1e-3)
    assert event.output_error > 1e-3


class Spoiling(Plain):
    """Uses the memory of a batch for the next one."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = torch.zeros(8, LENGTH, 4, dtype=torch.float64)
        forward = self.net.first.forward

        def overwrite(x: Tensor) -> Tensor:
            output = forward(x.clone())
            with torch.no_grad():
                x.detach().zero_()
            return output

        self.net.first.forward = overwrite  # type: ignore[method-assign]


def test_a_training_run_copies_them_from_then_on(tmp_path: Path):
    callback = CompreSSMCallback(state_dim=4, layers=["net.first"], window=(0, BATCHES), **QUIET)
    trainer(tmp_path, callback, max_epochs=2).fit(Spoiling(), loader())
    (event,) = callback.history
    assert (event["action"], event["new_state_dim"]) == ("reduce", 4)
    assert event["step"] == BATCHES + 1, "the first batch that was copied"
    assert event["output_error"] > 1e-3


def test_a_look_in_the_middle_of_an_epoch_waits_for_copies_too(tmp_path: Path):
    callback = CompreSSMCallback(
        state_dim=4, layers=["net.first"], window=(0, BATCHES), every_n_steps=3, **QUIET
    )
    trainer(tmp_path, callback, max_epochs=2).fit(Spoiling(), loader())
    first = callback.history[0]
    assert (first["action"], first["step"]) == ("reduce", 4), "three steps, and one more to copy"
    assert first["output_error"] > 1e-3


class Growing(Classifier):
    """Short sequences first."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return super().training_step((x[:, : 2 + 3 * batch_idx], y), batch_idx)


def test_the_horizon_is_the_longest_sequence_seen_up_to_the_look(tmp_path: Path):
    callback = CompreSSMCallback(state_dim=4, window=(0, BATCHES), verbose=False)
    trainer(tmp_path, callback, max_epochs=2).fit(Growing(), loader())
    assert {event["horizon"] for event in callback.history} == {2 + 3 * (BATCHES - 1)}


class Idle(Plain):
    """Has a block that it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.net.idle = MambaBlock(4, 8).double()


def test_a_layer_that_is_never_called_stops_the_run_before_the_first_step(tmp_path: Path):
    model = Idle()
    before = model.net.encoder.weight.detach().clone()
    callback = CompreSSMCallback(state_dim=4, window=(0, BATCHES), **QUIET)
    with pytest.raises(CalibrationError, match=r"to call 'net\.idle' with whole sequences"):
        trainer(tmp_path, callback).fit(model, loader())
    assert torch.equal(model.net.encoder.weight, before)
    ignoring = CompreSSMCallback(state_dim=4, window=(0, 6), ignore=["net.idle"], **QUIET)
    trainer(tmp_path, ignoring).fit(Idle(), loader())
    assert ignoring.history


class Diverging(Classifier):
    """One bad batch."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * (torch.nan if batch_idx == 2 else 1.0)


def test_the_step_of_the_first_bad_loss_is_named(tmp_path: Path):
    callback = CompreSSMCallback(state_dim=4, window=(0, BATCHES), verbose=False)
    with pytest.raises(NonFiniteError, match="not finite for the first time at step 3"):
        trainer(tmp_path, callback).fit(Diverging(), loader())


# -- hooks ---------------------------------------------------------------------------------------


class Saving(Plain):
    """Writes itself to a file in the middle of a batch."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        file = BytesIO()
        torch.save(self.net, file)
        file.seek(0)
        again = torch.load(file, weights_only=False)
        assert torch.equal(again.encoder.weight, self.net.encoder.weight)
        again(torch.zeros(1, LENGTH, 1, dtype=torch.float64))


def test_a_watched_model_can_be_saved_whole(tmp_path: Path):
    callbacks = [
        CompreSSMCallback(state_dim=4, window=(0, BATCHES), **QUIET),
        HankelMonitor(),
    ]
    trainer(tmp_path, *callbacks, max_epochs=1).fit(Saving(), loader())


class Failing(Plain):
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        raise RuntimeError("lost")


@pytest.mark.parametrize("make", [HankelMonitor, lambda: CompreSSMCallback(state_dim=4)])
def test_a_failure_leaves_no_hook(make: Any, tmp_path: Path):
    model = Failing()
    with pytest.raises(RuntimeError, match="lost"):
        trainer(tmp_path, make(), max_epochs=1).fit(model, loader())
    assert not any(module._forward_pre_hooks for module in model.modules())
    pickle.dumps(model.net)


# -- inference mode ------------------------------------------------------------------------------


def _is_trainable(model: nn.Module, x: Tensor) -> bool:
    model(x.clone()).square().mean().backward()
    return all(p.grad is not None and not p.is_inference() for p in model.parameters())


def test_reducing_in_inference_mode_leaves_ordinary_parameters():
    x = torch.randn(2, 12, 4)
    for model in (LRU(4, 12), MambaBlock(4, 12)):
        optimizer = torch.optim.AdamW(model.parameters())
        model(x).square().mean().backward()
        optimizer.step()
        with torch.inference_mode():
            compress(
                model, state_dim=4, sample=x * 1.0, max_output_error=None, optimizers=[optimizer]
            )
        assert _is_trainable(model, x)
        optimizer.step()


@pytest.mark.parametrize("way", ["load_compressed", "load_state_dict"])
def test_loading_in_inference_mode_leaves_ordinary_parameters(way: str):
    saved, model = LRU(4, 3).state_dict(), LRU(4, 12)
    with torch.inference_mode():
        if way == "load_compressed":
            load_compressed(model, saved)
        else:
            model.load_state_dict(saved)
    assert model.d_state == 3
    assert _is_trainable(model, torch.randn(2, 12, 4))


class Compressing(Classifier):
    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.net(batch[0])

    def on_test_end(self) -> None:
        compress(self.net, state_dim=4)


def test_compressing_at_the_end_of_a_test_run(tmp_path: Path):
    model = Compressing()
    trainer(tmp_path).test(model, loader(), verbose=False)
    trainer(tmp_path, max_epochs=1).fit(model, loader())
    assert model.net.first.d_state == 4


# -- learning-rate and batch-size search ----------------------------------------------------------


class Searched(Classifier):
    def __init__(self) -> None:
        super().__init__("sgd")
        self.lr, self.batch_size, self.states = 1e-2, 8, list[int]()

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(dataset(), batch_size=self.batch_size)

    def val_dataloader(self) -> DataLoader[Any]:
        return loader()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.states.append(self.net.first.d_state)
        return super().training_step(batch, batch_idx)


@from_lightning("2.6", "after a search, Lightning 2.4 leaves batches of the first epoch out")
@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("search", ["LearningRateFinder", "BatchSizeFinder"])
def test_a_search_before_a_run_looks_at_nothing(search: str, place: int, tmp_path: Path):
    """The run that follows is bitwise that without a search."""

    def run(*others: pl.Callback) -> tuple[Searched, CompreSSMCallback]:
        callback = CompreSSMCallback(state_dim=6, window=(0, 4), verbose=False)
        callbacks = list(others)
        callbacks.insert(place, callback)
        model = Searched()
        trainer(tmp_path, *callbacks, max_epochs=2).fit(model)
        return model, callback

    if search == "LearningRateFinder":
        # The rate that it finds is not what is looked at here.
        other = pl.callbacks.LearningRateFinder(num_training_steps=9, update_attr=False)
    else:
        other = pl.callbacks.BatchSizeFinder(max_trials=2, steps_per_trial=5, init_val=4)
    model, callback = run(other)
    alone, without = run()
    tried = len(model.states) - len(alone.states)
    assert tried > 4, "the search went past the window"
    assert set(model.states[:tried]) == {24}
    assert model.states[tried:] == alone.states
    assert [{**e, "seconds": 0} for e in callback.history] == [
        {**e, "seconds": 0} for e in without.history
    ]
    for name, value in alone.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


# -- data that must not be asked for early ---------------------------------------------------------


class Counting(Classifier):
    """Counts how often its loader is made, and when."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[bool] = []
        self.started = False

    def train_dataloader(self) -> Any:
        self.made.append(self.started)
        return loader()

    def setup(self, stage: str) -> None:
        self.started = False

    def on_fit_start(self) -> None:
        self.started = True


@pytest.mark.parametrize("window", [(0, 4), (0.0, 0.5)])
def test_training_data_is_not_loaded_before_the_trainer_does(window: Any, tmp_path: Path):
    model = Counting()
    callback = CompreSSMCallback(state_dim=6, window=window, verbose=False)
    fit = trainer(tmp_path, callback, max_epochs=2, enable_checkpointing=False)
    fit.fit(model)
    assert callback.history
    assert model.made == [True], "loaded once, by the loop of training"


def test_an_empty_run_is_no_error(tmp_path: Path):
    callback = CompreSSMCallback(verbose=False)
    trainer(tmp_path, callback, limit_train_batches=0).fit(Classifier(), loader())
    assert callback.history == []


def test_the_first_bad_step_is_found_wherever_it_lies() -> None:
    for bad in (1, 64, 65, 100, 130):
        watch = LossWatch()
        for step in range(1, 131):
            watch.note(torch.full((2,) * (step % 3), float("inf" if step >= bad else 1)), step)
        assert watch.first_bad_step() == bad
    assert LossWatch().first_bad_step() is None
