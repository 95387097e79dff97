"""Checkpoints of reduced models, by every road that Lightning has for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_compressm import CompreSSMCallback, compress, find_ssm_layers, load_compressed
from lightning_compressm.errors import CheckpointError
from lightning_compressm.model.resizing import install_resize_hooks
from lightning_compressm.nn import S5
from lightning_compressm.nn._mamba import MambaBlock
from tests.families.layers import PortedLRU

from ..processes import run_pair
from .checkpointing import EPOCHS, SETTINGS, Run, make
from .helpers import BATCHES, Classifier, Plain, StatefulLoader, loader, same, trainer
from .selective_models import Recall


class Whole(Classifier):
    """Also tested and asked for predictions."""

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.net(batch[0])


def _double(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


class Foreign(Whole):
    """A port of an LRU, which has no hooks of its own, in the place of the first layer."""

    def __init__(self, optimizer: str = "adamw") -> None:
        super().__init__(optimizer)
        self.net.first = PortedLRU(4, 4, 24)._apply(_double)


class Hooked(Foreign):
    """The same with hooks from the start."""

    def __init__(self, optimizer: str = "adamw") -> None:
        super().__init__(optimizer)
        install_resize_hooks(self)


KINDS: dict[str, type[Classifier]] = {"ours": Whole, "foreign": Foreign, "hooked": Hooked}


@pytest.fixture(scope="module", params=KINDS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    torch.manual_seed(0)
    run = Run(tmp_path_factory.mktemp(request.param), KINDS[request.param]())
    assert {e["epoch"] for e in run.callback.history if e["action"] == "reduce"} >= {0, 1}
    return run


def sizes(model: nn.Module) -> dict[str, int]:
    return {name: layer.state_dim for name, layer in find_ssm_layers(model).items()}


@pytest.mark.parametrize("point", [("epoch", 0, -1), ("epoch", 2, -1), ("step", 1, 3)])
@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_evaluation(run: Run, stage: str, point: tuple[str, int, int], tmp_path: Path):
    path = run.checkpoint(*point)
    model, callback = type(run.model)(), CompreSSMCallback(**SETTINGS)
    getattr(trainer(tmp_path, callback), stage)(model, loader(1), ckpt_path=path)
    saved = torch.load(path, weights_only=True)
    assert same(model.state_dict(), dict(saved["state_dict"]))


@pytest.mark.parametrize("point", [("epoch", 0, -1), ("epoch", 1, -1), ("step", 2, 2)])
def test_resume(run: Run, point: tuple[str, int, int], tmp_path: Path):
    run.resume(tmp_path, type(run.model)(), run.checkpoint(*point))


def test_resume_in_a_model_that_is_smaller(run: Run, tmp_path: Path):
    """A checkpoint of before a reduction makes it big again, and one of after it smaller."""
    for point in (("step", 0, 1), ("epoch", 2, -1)):
        model = type(run.model)()
        compress(model, state_dim=3)
        run.resume(tmp_path, model, run.checkpoint(*point))


@pytest.mark.parametrize("name", ["best", "last"])
@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
def test_best_and_last(name: str, stage: str, tmp_path: Path):
    keep = ModelCheckpoint(
        tmp_path / "kept", monitor="val_loss", save_last=True, save_on_train_epoch_end=True
    )
    callback = CompreSSMCallback(**SETTINGS)
    fit = trainer(tmp_path, callback, keep, max_epochs=EPOCHS, enable_checkpointing=True)
    model = Whole()
    fit.fit(model, loader(), loader(1))
    path = keep.best_model_path if name == "best" else keep.last_model_path
    wanted = torch.load(path, weights_only=True)
    if stage == "fit":
        fit.fit_loop.max_epochs = EPOCHS + 1
        fit.fit(model, loader(), loader(1), ckpt_path=name)
        assert fit.global_step == (EPOCHS + 1) * BATCHES
        assert model.net.first.d_state <= len(wanted["state_dict"]["net.first.nu_log"])
    else:
        (metrics,) = getattr(fit, stage)(model, loader(1), ckpt_path=name)
        assert same(model.state_dict(), dict(wanted["state_dict"]))
        if name == "best":
            assert metrics["val_loss"] == pytest.approx(float(keep.best_model_score), rel=1e-9)


def test_load_from_checkpoint(run: Run):
    path, kind = run.checkpoint("epoch", EPOCHS - 1), type(run.model)
    if kind is not Foreign:
        assert same(kind.load_from_checkpoint(path).state_dict(), run.model.state_dict())
        return
    # No callback runs there, and nothing of ours has seen the model.
    with pytest.raises(RuntimeError, match=r"size mismatch for net\.first\.nu_log"):
        kind.load_from_checkpoint(path)


def test_load_compressed(run: Run):
    path = run.checkpoint("epoch", EPOCHS - 1)
    for start in (24, 2):
        model = type(run.model)()
        if start == 2:
            compress(model, state_dim=start)
        assert same(load_compressed(model, path).state_dict(), run.model.state_dict())


def test_every_checkpoint_is_plain_data(run: Run):
    for kind in ("epoch", "validated", "step"):
        for path in (run.tmp / kind).glob("*.ckpt"):
            data = torch.load(path, weights_only=True)
            assert any(key.startswith("CompreSSMCallback") for key in data["callbacks"])


class Without(Whole):
    def __init__(self, change: str) -> None:
        super().__init__("adamw")
        if change == "missing":
            self.net.second = nn.Identity()
        elif change == "renamed":
            self.net.other, self.net.second = self.net.second, nn.Identity()
        elif change == "family":
            self.net.second = S5(4, 12).double()
        elif change == "width":
            self.net.second = type(self.net.second)(5, 12).double()


@pytest.mark.parametrize("run", ["ours"], indirect=True)
@pytest.mark.parametrize("change", ["missing", "renamed", "family", "width"])
def test_a_checkpoint_of_another_model_says_what_differs(run: Run, change: str, tmp_path: Path):
    path = run.checkpoint("epoch", 2)
    model = Without(change)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(CheckpointError, match=r"net\.second"):
        load_compressed(model, path)
    assert same(dict(model.named_parameters()), before)
    fit = trainer(tmp_path, CompreSSMCallback(**SETTINGS), max_epochs=EPOCHS)
    with pytest.raises(RuntimeError, match=r"net\.second"):
        fit.fit(model, StatefulLoader(), loader(1), ckpt_path=path)


@pytest.mark.parametrize("run", ["ours"], indirect=True)
def test_optimizer_state_that_does_not_fit_is_named(run: Run, tmp_path: Path):
    data = torch.load(run.checkpoint("epoch", 2), weights_only=True)
    state = data["optimizer_states"][0]["state"]
    index = next(i for i, s in state.items() if s["exp_avg"].ndim == 2)
    state[index]["exp_avg_sq"] = torch.zeros(24, 4, dtype=torch.float64)
    torch.save(data, tmp_path / "odd.ckpt")
    model = Whole()
    fit = trainer(tmp_path, CompreSSMCallback(**SETTINGS), max_epochs=EPOCHS)
    with pytest.raises(CheckpointError, match=r"exp_avg_sq' of 'net\..*got \(24, 4\)"):
        fit.fit(model, StatefulLoader(), loader(1), ckpt_path=tmp_path / "odd.ckpt")
    assert not model.losses


# -- selective layers ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def selective(tmp_path_factory: pytest.TempPathFactory) -> Run:
    torch.manual_seed(0)
    run = Run(tmp_path_factory.mktemp("selective"), Plain(), fraction=0.3, tolerance=None)
    assert {e["epoch"] for e in run.callback.history if e["action"] == "reduce"} >= {0, 1}
    return run


@pytest.mark.parametrize(
    "point", [("epoch", 0, -1), ("epoch", 1, -1), ("epoch", 2, -1), ("step", 0, 1), ("step", 1, 2)]
)
def test_selective_layers_resume_to_the_bit(
    selective: Run, point: tuple[str, int, int], tmp_path: Path
):
    """Also at an epoch's end, where the checkpoint holds what was decided on the batch before."""
    selective.resume(tmp_path, Plain(), selective.checkpoint(*point))


@pytest.mark.parametrize("kind", ["mamba", "transformers"])
def test_other_peoples_mamba(kind: str, tmp_path: Path):
    package = {"mamba": "mamba_ssm", "transformers": "transformers"}[kind]
    if kind == "mamba":
        from importlib.util import find_spec

        if find_spec("mamba_ssm") is None:
            pytest.skip("mamba_ssm is not installed")
    else:
        pytest.importorskip(package)
    from . import selective_models

    class Kept(Recall):
        def __init__(self) -> None:
            super().__init__(kind)

    model = Kept()
    keep = ModelCheckpoint(tmp_path / "kept", "{epoch}", save_top_k=-1)
    settings: dict[str, Any] = {"state_dim": 4, "window": (0.0, 0.6), "verbose": False}
    fit = trainer(
        tmp_path, CompreSSMCallback(**settings), keep, max_epochs=3, enable_checkpointing=True
    )
    fit.fit(model, selective_models.loader())
    path = tmp_path / "kept" / "epoch=2.ckpt"
    assert set(sizes(model).values()) == {4}
    assert same(load_compressed(Kept(), path).state_dict(), model.state_dict())
    with pytest.raises(RuntimeError, match=r"size mismatch for .*A_log"):
        Kept.load_from_checkpoint(path)
    again, callback = Kept(), CompreSSMCallback(**settings)
    more = trainer(tmp_path, callback, max_epochs=3)
    more.fit(again, selective_models.loader(), ckpt_path=tmp_path / "kept" / "epoch=0.ckpt")
    assert same(again.state_dict(), model.state_dict())


# -- two processes -------------------------------------------------------------------------------


@pytest.mark.slow
def test_between_one_process_and_two(tmp_path: Path):
    """A run of two processes goes on in two to the bit, and in one up to the order of sums."""
    torch.manual_seed(0)
    single = Run(tmp_path / "single", make("adamw"))
    run_pair("checkpoint_worker", tmp_path)
    for rank in (0, 1):
        two, resumed, from_one = (
            torch.load(tmp_path / f"{case}.{rank}.pt") for case in ("two", "resumed", "from_one")
        )
        assert same(resumed["state_dict"], two["state_dict"])
        assert resumed["history"] == two["history"]
        close(from_one["state_dict"], single.model.state_dict())
    model, callback = make("adamw"), CompreSSMCallback(**SETTINGS)
    fit = trainer(tmp_path, callback, max_epochs=EPOCHS)
    (path,) = (tmp_path / "two").glob(f"step={BATCHES}.ckpt")
    fit.fit(model, StatefulLoader(), loader(1), ckpt_path=path)
    close(model.state_dict(), two["state_dict"])


def close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], rtol=1e-6, atol=1e-6)


def test_callbacks_of_other_layers_keep_apart(tmp_path: Path):
    """Each of two callbacks finds its own state."""
    settings = SETTINGS | {"window": (0, BATCHES)}
    make_two = lambda: [  # noqa: E731
        CompreSSMCallback(**settings, layers=["net.first"]),
        CompreSSMCallback(**settings, ignore=["net.first"]),
    ]
    callbacks = make_two()
    keep = ModelCheckpoint(tmp_path / "kept", "{epoch}", save_on_train_epoch_end=True)
    fit = trainer(tmp_path, *callbacks, keep, max_epochs=3, enable_checkpointing=True)
    fit.fit(Whole(), StatefulLoader())
    again: list[pl.Callback] = [*make_two()]
    more = trainer(tmp_path, *again, max_epochs=4)
    more.fit(Whole(), StatefulLoader(), ckpt_path=tmp_path / "kept" / "epoch=2.ckpt")
    assert [c.history for c in callbacks] == [c.history for c in again]  # type: ignore[attr-defined]
    assert [{e["layer"] for e in c.history} for c in callbacks] == [{"net.first"}, {"net.second"}]
    total = sum(dim for c in callbacks for dim in c.state_dims.values())
    assert float(fit.callback_metrics["compressm/total_state_dim"]) == total
    seconds = sum(e["seconds"] for c in callbacks for e in c.history)
    assert float(fit.callback_metrics["compressm/seconds"]) == pytest.approx(seconds)


def test_hooks_of_a_layer_that_is_built_late(tmp_path: Path):
    class Late(Whole):
        def configure_model(self) -> None:
            if not isinstance(self.net.first, MambaBlock):
                torch.manual_seed(1)
                self.net.first = MambaBlock(4, 16).double()

    keep = ModelCheckpoint(tmp_path / "kept", "{epoch}", save_on_train_epoch_end=True)
    settings = SETTINGS | {"layers": ["net.first"]}
    model = Late()
    fit = trainer(tmp_path, CompreSSMCallback(**settings), keep, enable_checkpointing=True)
    fit.fit(model, loader())
    assert model.net.first.d_state < 16
    again = Late()
    evaluate = trainer(tmp_path, CompreSSMCallback(**settings))
    evaluate.validate(again, loader(1), ckpt_path=tmp_path / "kept" / "epoch=2.ckpt")
    assert again.net.first.d_state == model.net.first.d_state
