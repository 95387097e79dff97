"""Lightning under both of its names: `lightning.pytorch` and `pytorch_lightning`."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_compressm import CompreSSMCallback, HankelMonitor
from lightning_compressm.callbacks._refusals import check_fit, check_setup
from lightning_compressm.errors import UnsupportedStrategyError
from lightning_compressm.model.layers import find_ssm_layers
from lightning_compressm.nn._mamba import MambaBlock

from ..processes import run_pair
from ..test_architecture import LIGHTNING
from .helpers import same, trainer
from .names import CUT, NAMES, fit, task

ROOT = Path(__file__).parents[2]
DIMS = {"net.first": 6, "net.second": 3}  # halved twice

by_name = pytest.mark.parametrize("name", NAMES)
both = pytest.mark.skipif(
    not all(map(find_spec, ("lightning", "pytorch_lightning"))), reason="one of them is missing"
)


def _saver(name: str, tmp: Path) -> Any:
    kind = import_module(name).callbacks.ModelCheckpoint
    return kind(tmp, "{step}", save_top_k=-1, every_n_train_steps=4)


@by_name
def test_a_run_is_reduced_and_resumed(tmp_path: Path, name: str) -> None:
    """From the middle of the second epoch, to the bit."""
    callback, monitor = CompreSSMCallback(**CUT), HankelMonitor()
    kinds = [callback, monitor, _saver(name, tmp_path)]
    model, run = fit(name, tmp_path, *kinds, enable_checkpointing=True)
    assert callback.state_dims == DIMS
    assert len(monitor.history) == run.max_epochs
    resumed = CompreSSMCallback(**CUT)
    again, _ = fit(name, tmp_path, resumed, path=tmp_path / "step=8.ckpt")
    assert resumed.state_dims == DIMS
    assert again.losses == model.losses[8:]
    assert same(again.state_dict(), model.state_dict())


@both
def test_both_names_train_alike(tmp_path: Path) -> None:
    """Twelve lines, the same seed: the same dimensions and bitwise the same parameters."""
    runs = []
    for name in ("lightning.pytorch", "pytorch_lightning"):
        callback = CompreSSMCallback(loss_budget=0.9, verbose=False)
        model, _ = fit(name, tmp_path, callback)
        runs.append((callback.state_dims, model.state_dict(), model.losses))
    assert runs[0][0] != {"net.first": 24, "net.second": 12}
    assert same(*runs)


@by_name
def test_ddp(tmp_path: Path, name: str) -> None:
    run_pair("names", name, tmp_path)
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert one["dims"] == DIMS
    assert same(one, other)


@pytest.mark.filterwarnings("ignore:CompreSSMCallback took the last reduction back")
@by_name
def test_rollback(tmp_path: Path, name: str) -> None:
    guard = CompreSSMCallback(
        state_dim=1, window=(0, 6), monitor="val_loss", max_degradation=0.0, verbose=False
    )
    model, _ = fit(name, tmp_path, guard, num_sanity_val_steps=1)
    assert [e["action"] for e in guard.history] == ["reduce"] * 2 + ["rollback"] * 2
    assert model.net.first.d_state == 24


@pytest.mark.filterwarnings("ignore:SWA is currently only supported every epoch")
@pytest.mark.parametrize("kind", ["StochasticWeightAveraging", "EMAWeightAveraging"])
@by_name
def test_averages_are_reduced_along(tmp_path: Path, name: str, kind: str) -> None:
    callbacks = import_module(name).callbacks
    if not hasattr(callbacks, kind):
        pytest.skip(f"this Lightning has no {kind}")
    options = {"swa_lrs": 1e-3, "swa_epoch_start": 1} if kind.startswith("Sto") else {"decay": 0.9}
    average, cut = getattr(callbacks, kind)(**options), CompreSSMCallback(**CUT)
    model, _ = fit(name, tmp_path, average, cut, max_epochs=4)
    (held,) = [v for v in vars(average).values() if isinstance(v, torch.nn.Module)]
    dims = {n: layer.state_dim for n, layer in find_ssm_layers(held).items()}
    assert sorted(dims.values()) == [3, 6]
    assert all(torch.isfinite(p).all() for p in model.parameters())


@by_name
def test_scheduled_accumulation_is_seen(tmp_path: Path, name: str) -> None:
    scheduler = import_module(name).callbacks.GradientAccumulationScheduler({0: 1, 1: 2})
    with pytest.raises(ValueError, match="a changing accumulation of gradients"):
        fit(name, tmp_path, scheduler, CompreSSMCallback(tolerance=0.1))


@by_name
def test_what_would_go_wrong_is_refused(tmp_path: Path, name: str) -> None:
    package = import_module(name)
    model = task(name)()
    sharded = trainer(tmp_path, package=package, strategy="ddp_fork", devices=2)
    model.net.first = MambaBlock(4, 8).double()
    with pytest.raises(UnsupportedStrategyError, match="send their weights back"):
        check_setup(sharded, model)
    sharded.strategy.__class__ = type("Other", (type(sharded.strategy),), {})
    with pytest.raises(UnsupportedStrategyError, match="Other is not supported"):
        check_setup(sharded, model)
    pruning = package.callbacks.ModelPruning("l1_unstructured", [(model.net.second, "B_re")])
    pruned = trainer(tmp_path, pruning, package=package)
    pruning.setup(pruned, model, "fit")
    with pytest.raises(UnsupportedStrategyError, match="ModelPruning prunes 'B_re'"):
        check_fit(pruned, find_ssm_layers(model).values())


@by_name
def test_command_line(tmp_path: Path, name: str) -> None:
    pytest.importorskip("jsonargparse")
    cli = import_module(f"{name}.cli")
    options = {"accelerator": "cpu", "max_epochs": 3, "logger": False, "default_root_dir": tmp_path}
    options |= {"enable_progress_bar": False, "enable_model_summary": False}
    argv = [f"--trainer.{key}={value}" for key, value in options.items()]
    argv += ["--trainer.enable_checkpointing=false"]
    argv += ["--trainer.callbacks=lightning_compressm.CompreSSMCallback"]
    argv += ["--trainer.callbacks.fraction=0.5", "--trainer.callbacks.window=[0, 12]"]
    done = cli.LightningCLI(task(name), args=["fit", *argv], save_config_callback=None)
    assert done.model.net.first.d_state == 6


BLOCK = """
import sys
for name in {names!r}:
    sys.modules[name] = None
"""

WITHOUT = """
import sys, torch, lightning_compressm
from lightning_compressm.nn import LRU
layer = LRU(2, 8)
lightning_compressm.compress(layer, state_dim=3)
assert layer.d_state == 3
for name in ("CompreSSMCallback", "HankelMonitor"):
    try:
        getattr(lightning_compressm, name)
    except ModuleNotFoundError as error:
        assert "pip install 'lightning_compressm[lightning]'" in str(error), error
        assert "[pytorch-lightning]" in str(error), error
    else:
        raise AssertionError(name)
loaded = [m for m, there in sys.modules.items() if there and m.split(".")[0] in {blocked}]
assert not loaded, loaded
"""


def _python(code: str, *blocked: str) -> None:
    """Run code where these packages can't be imported."""
    code = BLOCK.format(names=blocked) + code
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]


def test_neither_is_needed_and_the_callbacks_say_what_is() -> None:
    _python(WITHOUT.replace("{blocked}", repr(LIGHTNING)), *LIGHTNING)


TRAIN = """
import torch, {name} as pl
from torch.utils.data import DataLoader
from lightning_compressm import CompreSSMCallback
from lightning_compressm.nn import LRU

class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.lru = LRU(2, 8)

    def training_step(self, batch, batch_idx):
        return (self.lru(batch) - batch.cumsum(1)).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

callback = CompreSSMCallback(state_dim=3, window=(0, 4), every_n_steps=2, verbose=False)
quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
pl.Trainer(accelerator="cpu", max_epochs=2, enable_model_summary=False, callbacks=[callback],
           **quiet).fit(Model(), DataLoader(torch.randn(12, 20, 2), batch_size=2))
assert callback.state_dims == {{"lru": 3}}, callback.history
"""


@pytest.mark.parametrize(
    ("name", "blocked"),
    [
        pytest.param("lightning.pytorch", "pytorch_lightning", marks=NAMES[0].marks),
        pytest.param("pytorch_lightning", "lightning", marks=NAMES[1].marks),
    ],
)
def test_one_of_them_is_enough(name: str, blocked: str) -> None:
    _python(TRAIN.format(name=name), blocked)


LOGGER = """
import pytorch_lightning
from lightning_utilities.core import rank_zero
before = rank_zero.log
from lightning_compressm import CompreSSMCallback
import lightning.pytorch
assert rank_zero.log is before, rank_zero.log
"""


@both
def test_messages_stay_with_the_name_that_is_used() -> None:
    """Both packages set one logger when they are imported; a user silences that of his own."""
    _python(LOGGER)
