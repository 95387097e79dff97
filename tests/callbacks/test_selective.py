"""Mamba blocks of mamba_ssm and transformers, trained through a reduction by a real Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_compressm import CompreSSMCallback
from lightning_compressm.errors import CalibrationError
from lightning_compressm.nn._mamba import MambaBlock

from ..processes import run_pair
from . import helpers, selective_models
from .helpers import BATCHES, Classifier, Plain, StatefulLoader, trainer
from .test_ddp import _load

BY_LOSS = "mamba+budget"
KINDS = {
    "mamba": "mamba_ssm",
    "mamba2": "mamba_ssm",
    "transformers": "transformers",
    **dict.fromkeys(selective_models.LINEAR_ATTENTION, "transformers"),
}


def _need(kind: str) -> None:
    pytest.importorskip(KINDS[kind], reason=f"{KINDS[kind]} is not installed", exc_type=ImportError)


@pytest.fixture(scope="module")
def mamba_ssm_on_cpu() -> None:
    """mamba_ssm can't be imported on a CPU without its compatibility layer."""
    from importlib.util import find_spec

    if find_spec("mamba_ssm") is not None:
        from lightning_compressm.compat import enable_mamba_ssm_cpu

        enable_mamba_ssm_cpu()


@pytest.mark.usefixtures("mamba_ssm_on_cpu")
@pytest.mark.parametrize("kind", KINDS)
def test_trains_through_a_reduction(kind: str, tmp_path: Path) -> None:
    _need(kind)
    result = selective_models.run(kind, tmp_path)
    events = [e for e in result["history"] if e["action"] == "reduce"]
    assert len(events) == 2
    assert {(e["old_state_dim"], e["new_state_dim"]) for e in events} == {(16, 4)}
    assert all(0 <= e["output_error"] < 0.5 and e["error_bound"] is None for e in events)
    assert set(result["state_dims"].values()) == {4}
    assert result["found"] == result["state_dims"]
    assert result["in_optimizer"]
    losses = result["losses"]
    assert all(torch.isfinite(torch.tensor(losses)))
    assert sum(losses[-4:]) < sum(losses[:4])


@pytest.mark.usefixtures("mamba_ssm_on_cpu")
def test_energy_decides_by_default(tmp_path: Path) -> None:
    _need("mamba")
    result = selective_models.run("mamba", tmp_path, state_dim=None, tolerance=0.1)
    events = [e for e in result["history"] if e["action"] == "reduce"]
    assert events
    assert all(e["energy_kept"] >= 0.9 for e in events)


@pytest.mark.usefixtures("mamba_ssm_on_cpu")
def test_a_cut_that_changes_too_much_is_skipped_with_a_reason(tmp_path: Path) -> None:
    _need("mamba")
    result = selective_models.run("mamba", tmp_path, max_output_error=1e-9)
    assert {e["action"] for e in result["history"]} == {"skip"}
    assert all("max_output_error" in e["reason"] for e in result["history"])
    assert set(result["state_dims"].values()) == {16}


@pytest.mark.usefixtures("mamba_ssm_on_cpu")
def test_every_step_looks_at_the_latest_batches(tmp_path: Path) -> None:
    _need("mamba")
    result = selective_models.run(
        "mamba",
        tmp_path,
        state_dim=None,
        fraction=0.25,
        window=(2, 4),
        every_n_steps=2,
        calibration_batches=2,
    )
    reduced = [e for e in result["history"] if e["action"] == "reduce"]
    assert {e["step"] for e in reduced} == {2, 4}
    assert set(result["state_dims"].values()) == {9}


def test_resumes_from_every_kind_of_checkpoint(tmp_path: Path) -> None:
    """A checkpoint of a validation is older than its epoch's look, and holds no inputs."""
    settings: dict[str, Any] = {
        "fraction": 0.5,
        "window": (0, 2 * BATCHES),
        "layers": ["net.first"],
        "verbose": False,
    }
    kinds = [
        ModelCheckpoint(
            tmp_path / "validated", "{step}", save_top_k=-1, save_on_train_epoch_end=False
        ),
        ModelCheckpoint(tmp_path / "step", "{step}", save_top_k=-1, every_n_train_steps=4),
    ]
    callback = CompreSSMCallback(**settings)
    fit = trainer(tmp_path, callback, *kinds, max_epochs=4, enable_checkpointing=True)
    fit.fit(Plain(), StatefulLoader(), helpers.loader(1))
    steps = [e["step"] for e in callback.history]
    assert steps == [BATCHES, 2 * BATCHES]
    for path, looks in (
        (tmp_path / "validated" / f"step={BATCHES}.ckpt", [BATCHES + 1, 2 * BATCHES]),
        (tmp_path / "step" / "step=8.ckpt", steps),
    ):
        resumed, model = CompreSSMCallback(**settings), Plain()
        again = trainer(tmp_path, resumed, max_epochs=4)
        again.fit(model, StatefulLoader(), helpers.loader(1), ckpt_path=path)
        assert [e["step"] for e in resumed.history] == looks
        assert model.net.first.d_state == 4


@pytest.mark.parametrize("kind", selective_models.LINEAR_ATTENTION)
def test_resumes_with_a_config_that_follows(kind: str, tmp_path: Path) -> None:
    """From after a reduction, and from the end of the epoch in which it was decided."""
    _need(kind)
    settings = {"share_state_dim": True, "refit": False, "max_output_error": None}
    saving = ModelCheckpoint(
        tmp_path, "{step}", save_top_k=-1, every_n_epochs=1, save_on_train_epoch_end=True
    )
    whole = selective_models.run(kind, tmp_path, saving=saving, **settings)
    for step in (selective_models.BATCHES, 3 * selective_models.BATCHES):
        path = tmp_path / f"step={step}.ckpt"
        again = selective_models.run(kind, tmp_path, ckpt_path=path, **settings)
        assert again["losses"] == whole["losses"][step:]
        assert helpers.same(again["state_dict"], whole["state_dict"])
        assert helpers.same(again["optimizer"], whole["optimizer"])
        assert again["config"] == whole["config"]
        assert again["config"]["linear_key_head_dim"] == 4


def test_a_layer_that_training_never_calls_is_named(tmp_path: Path) -> None:
    class Unused(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.unused = MambaBlock(4, 8)

    fit = trainer(tmp_path, CompreSSMCallback(window=(0.0, 0.9)))
    with pytest.raises(CalibrationError, match="unused"):
        fit.fit(Unused(), helpers.loader())


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory, mamba_ssm_on_cpu: None) -> Path:
    for kind in KINDS:
        _need(kind)
    out = tmp_path_factory.mktemp("selective")
    run_pair("ddp_worker", out, *(f"selective/{kind}" for kind in (*KINDS, BY_LOSS)))
    return out


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_sum_their_statistics(kind: str, two_ranks: Path, tmp_path: Path) -> None:
    first, second = (_load(two_ranks, f"selective/{kind}", rank) for rank in (0, 1))
    single: dict[str, Any] = selective_models.run(kind, tmp_path)
    assert first["history"] == second["history"]
    assert first["state_dims"] == second["state_dims"] == single["state_dims"]
    assert set(first["state_dims"].values()) == {4}
    assert first["in_optimizer"]
    for name, value in first["state_dict"].items():
        assert torch.equal(value, second["state_dict"][name]), f"{name} differs between ranks"
        torch.testing.assert_close(value, single["state_dict"][name], rtol=1e-2, atol=1e-2)


@pytest.mark.slow
def test_two_processes_try_cuts_together(two_ranks: Path, tmp_path: Path) -> None:
    first, second = (_load(two_ranks, f"selective/{BY_LOSS}", rank) for rank in (0, 1))
    assert first["history"] == second["history"]
    assert set(first["state_dims"].values()) == {4}
    for name, value in first["state_dict"].items():
        assert torch.equal(value, second["state_dict"][name]), f"{name} differs between ranks"
    single = selective_models.run(BY_LOSS, tmp_path)
    assert single["state_dims"] == first["state_dims"]
    looks = [[e["loss_change"] for e in run["history"]][:2] for run in (first, single)]
    assert looks[0] == pytest.approx(looks[1], rel=1e-3, abs=1e-4)
    reasons = {e["reason"] for run in (first, single) for e in run["history"]}
    assert "weighted by the loss" in reasons
