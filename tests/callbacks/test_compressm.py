"""CompreSSMCallback in real Trainer runs on one process."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    GradientAccumulationScheduler,
    ModelCheckpoint,
)
from lightning.pytorch.utilities import rank_zero
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_compressm import CompreSSMCallback, compress
from lightning_compressm.errors import (
    NonFiniteError,
    SurgeryError,
    UnsupportedLayerError,
    UnsupportedOptimizerError,
    UnsupportedStrategyError,
)

from .helpers import BATCHES, Classifier, loader, trainer

REDUCES = {"tolerance": 0.2, "window": (0.0, 0.7)}


def actions(callback: CompreSSMCallback) -> list[tuple[int, str]]:
    return [(event["step"], event["action"]) for event in callback.history]


class Spy(pl.Callback):
    """Notes the state dimensions at every training batch, and what checkpoints would hold."""

    def __init__(self) -> None:
        self.dims: list[int] = []
        self.at_validation_end: list[int] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.dims.append(pl_module.net.first.d_state)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.at_validation_end.append(pl_module.net.first.d_state)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "adamw_fused", "lbfgs"])
@pytest.mark.parametrize("policy", ["transport", "truncate", "reset"])
def test_reduces_and_trains_on(tmp_path: Any, optimizer: str, policy: Any) -> None:
    model = Classifier(optimizer, lr=0.05 if optimizer == "lbfgs" else 1e-2)
    callback = CompreSSMCallback(**REDUCES, optimizer_state=policy, verbose=False)
    fit = trainer(tmp_path, callback, max_epochs=5)
    before = {id(p) for p in model.parameters()}
    fit.fit(model, loader(), loader(1))
    assert model.net.first.d_state < 24
    assert callback.state_dims == {
        "net.first": model.net.first.d_state,
        "net.second": model.net.second.d_state,
    }
    bound = [p for group in fit.optimizers[0].param_groups for p in group["params"]]
    assert {id(p) for p in bound} == {id(p) for p in model.parameters()} != before
    for old, new in zip(bound, _one_more_step(fit, model), strict=True):
        assert not torch.equal(old, new), "a parameter did not move after the reduction"
    assert sum(model.losses[-BATCHES:]) < sum(model.losses[:BATCHES])


def _one_more_step(fit: pl.Trainer, model: Classifier) -> list[torch.Tensor]:
    """Clones before a further step replace the live parameters' old values in the caller."""
    optimizer = fit.optimizers[0]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    saved = [p.detach().clone() for p in params]
    x, y = next(iter(loader(2)))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model.net(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    return saved


def test_epoch_boundary_comes_in_two_phases(tmp_path: Any) -> None:
    """Checkpoints and validation of an epoch see the weights that were trained in it."""
    callback, spy = CompreSSMCallback(**REDUCES, verbose=False), Spy()
    trainer(tmp_path, callback, spy, max_epochs=5).fit(Classifier(), loader(), loader(1))
    steps = [event["step"] for event in callback.history if event["layer"] == "net.first"]
    assert steps == [BATCHES, 2 * BATCHES, 3 * BATCHES]  # 21 = 0.7 of 30 steps
    by_epoch = [set(spy.dims[i : i + BATCHES]) for i in range(0, len(spy.dims), BATCHES)]
    assert all(len(dims) == 1 for dims in by_epoch), "the dimension changed inside an epoch"
    # The sanity check comes first, then one validation after each epoch.
    assert [{dim} for dim in spy.at_validation_end[1:]] == by_epoch


def test_at_least_one_look_when_no_epoch_ends_inside_the_window(tmp_path: Any) -> None:
    callback, spy = CompreSSMCallback(tolerance=0.2, verbose=False), Spy()
    trainer(tmp_path, callback, spy, max_epochs=4).fit(Classifier(), loader())
    assert {event["step"] for event in callback.history} == {2}  # 0.1 of 24 steps
    assert spy.dims[1] == 24 > spy.dims[2]


def test_default_arguments_reduce_at_least_once_in_three_epochs(tmp_path: Any) -> None:
    callback = CompreSSMCallback(verbose=False)
    trainer(tmp_path, callback, max_epochs=3).fit(Classifier(), loader())
    assert "reduce" in {event["action"] for event in callback.history}


def test_acts_only_inside_the_window(tmp_path: Any) -> None:
    callback = CompreSSMCallback(tolerance=0.3, min_reduction=0.0, verbose=False)
    trainer(tmp_path, callback, max_epochs=50).fit(Classifier(), loader())
    assert callback.history
    assert max(event["step"] for event in callback.history) <= 0.1 * 50 * BATCHES


def test_every_n_steps_follows_optimizer_steps_not_batches(tmp_path: Any) -> None:
    callback = CompreSSMCallback(
        fraction=0.2, every_n_steps=2, window=(0, 7), min_reduction=0.0, verbose=False
    )
    fit = trainer(tmp_path, callback, max_epochs=4, accumulate_grad_batches=2)
    fit.fit(Classifier(), loader())
    assert sorted({event["step"] for event in callback.history}) == [2, 4, 6]


def test_nothing_happens_after_the_last_step(tmp_path: Any) -> None:
    callback = CompreSSMCallback(state_dim=4, window=(0.0, 1.0), every_n_epochs=3, verbose=False)
    model = Classifier()
    trainer(tmp_path, callback, max_epochs=3).fit(model, loader())
    steps = {event["step"] for event in callback.history}
    assert steps == {3 * BATCHES - 1}, "the only look is at the last step that is followed by one"


def test_fast_dev_run_does_not_fail_for_want_of_steps(tmp_path: Any) -> None:
    callback = CompreSSMCallback(state_dim=4, window=(100, 400), verbose=False)
    model = Classifier()
    trainer(tmp_path, callback, fast_dev_run=5).fit(model, loader())
    assert {event["step"] for event in callback.history} == {4}
    assert model.net.first.d_state == 4


def test_min_reduction_skips_with_a_reason(tmp_path: Any) -> None:
    callback = CompreSSMCallback(state_dim=20, min_reduction=0.5, verbose=False)
    model = Classifier()
    trainer(tmp_path, callback).fit(model, loader())
    assert {event["action"] for event in callback.history} == {"skip"}
    assert "of 24 states are needed" in callback.history[0]["reason"]
    assert model.net.first.d_state == 24


def test_patterns_limits_and_sharing(tmp_path: Any) -> None:
    callback = CompreSSMCallback(
        state_dim=3,
        min_state_dim=5,
        round_to=4,
        layers=["net.*"],
        ignore=["*.second"],
        verbose=False,
    )
    model = Classifier()
    trainer(tmp_path, callback).fit(model, loader())
    assert (model.net.first.d_state, model.net.second.d_state) == (8, 12)
    assert callback.state_dims == {"net.first": 8}
    shared = CompreSSMCallback(tolerance=0.5, share_state_dim=True, verbose=False)
    model = Classifier()
    trainer(tmp_path, shared).fit(model, loader())
    assert model.net.first.d_state == model.net.second.d_state < 12
    assert min(event["energy_kept"] for event in shared.history) >= 0.5


def test_history_and_metrics(tmp_path: Any) -> None:
    callback = CompreSSMCallback(**REDUCES, verbose=False)
    fit = trainer(tmp_path, callback, max_epochs=5)
    fit.fit(Classifier(), loader())
    event = callback.history[0]
    assert {
        "step",
        "epoch",
        "layer",
        "family",
        "action",
        "old_state_dim",
        "new_state_dim",
        "energy_kept",
        "error_bound",
        "seconds",
    } <= event.keys()
    assert event["epoch"] == 0
    assert event["horizon"] == 20  # the length of the training sequences
    assert event["energy_kept"] >= 0.8
    dims = callback.state_dims
    logged = fit.callback_metrics
    assert logged["compressm/total_state_dim"] == sum(dims.values())
    for name, dim in dims.items():
        assert logged[f"compressm/state_dim/{name}"] == dim
        assert 0 < logged[f"compressm/energy_kept/{name}"] <= 1
    assert logged["compressm/seconds"] > 0


def test_published_recipe_reports_its_bound(tmp_path: Any) -> None:
    callback = CompreSSMCallback(tolerance=0.2, balance="complex", horizon=None, verbose=False)
    trainer(tmp_path, callback).fit(Classifier(), loader())
    reduced = [event for event in callback.history if event["action"] == "reduce"]
    assert reduced
    assert all(event["error_bound"] > 0 and event["horizon"] is None for event in reduced)


def test_callback_can_be_used_for_a_second_run(tmp_path: Any) -> None:
    callback = CompreSSMCallback(tolerance=0.2, verbose=False)
    histories = []
    for _ in range(2):
        trainer(tmp_path, callback).fit(Classifier(), loader())
        histories.append([{**event, "seconds": 0} for event in callback.history])
    assert histories[0] == histories[1]


def test_verbose_prints_a_table(tmp_path: Any, capfd: Any, caplog: Any) -> None:
    callback = CompreSSMCallback(tolerance=0.2)
    fit = trainer(tmp_path, callback)
    with caplog.at_level("INFO", logger=rank_zero.__name__):
        fit.fit(Classifier(), loader())
    assert "net.first" in caplog.text
    assert "24 ->" in caplog.text


def test_manual_optimization_carries_pending_gradients(tmp_path: Any) -> None:
    """Gradients accumulated by hand across the swap still count in the next step."""

    class Manual(Classifier):
        def __init__(self) -> None:
            super().__init__("sgd")
            self.automatic_optimization = False
            self.pending: dict[str, float] = {}

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            if self.net.first.d_state < 24 and not self.pending:
                self.pending = {n: p.grad.norm().item() for n, p in self.net.named_parameters()}
            loss = super().training_step(batch, batch_idx)
            self.manual_backward(loss)
            if batch_idx % 4 == 3:
                optimizer.step()
                optimizer.zero_grad()

    model = Manual()
    callback = CompreSSMCallback(state_dim=20, window=(0, 2), layers=["net.first"], verbose=False)
    trainer(tmp_path, callback, max_epochs=3).fit(model, loader())
    assert model.net.first.d_state == 20
    assert model.pending["first.B_re"] > 0
    assert model.pending["first.C_re"] > 0


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("64-true", "float64"), ("bf16-mixed", "float32"), ("16-mixed", "float32")],
)
def test_precisions(tmp_path: Any, precision: Any, dtype: str) -> None:
    model = Classifier("adamw", dtype=dtype)
    callback = CompreSSMCallback(tolerance=0.2, verbose=False)
    trainer(tmp_path, callback, precision=precision).fit(model, loader())
    assert model.net.first.d_state < 24
    assert all(p.dtype == getattr(torch, dtype) for p in model.parameters())
    assert torch.isfinite(torch.tensor(model.losses)).all()


def test_bf16_true(tmp_path: Any) -> None:
    model = Classifier("adamw", dtype="float32")
    callback = CompreSSMCallback(tolerance=0.2, verbose=False)
    trainer(tmp_path, callback, precision="bf16-true").fit(model, loader())
    assert model.net.first.d_state < 24
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())


# -- refusals: before anything changes ---------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tolerance": 0.1, "fraction": 0.5}, "at most one"),
        ({"tolerance": 0.1, "state_dim": 5}, "at most one"),
        ({"tolerance": 1.0}, r"tolerance: expected a share in \[0, 1\) or None, got 1.0"),
        ({"tolerance": -0.1}, "tolerance"),
        ({"fraction": 0.0}, "fraction"),
        ({"state_dim": 0}, "state_dim"),
        ({"window": (0.5, 0.2)}, "window"),
        ({"window": (0.0, 1.5)}, "optimizer steps"),
        ({"every_n_epochs": 0}, "every_n_epochs"),
        ({"every_n_steps": -1}, "every_n_steps"),
        ({"min_reduction": 1.0}, "min_reduction"),
        ({"round_to": 0}, "round_to"),
        ({"layers": "net.*"}, "list of glob patterns"),
        ({"balance": "modal"}, "balance"),
        ({"horizon": 0}, "horizon"),
        ({"horizon": "long"}, "horizon"),
        ({"criterion": "biggest"}, "criterion"),
        ({"selection": "best"}, "selection"),
        ({"mode": "up"}, "mode"),
        ({"optimizer_state": "keep"}, "optimizer_state"),
        ({"calibration_batches": 0}, "calibration_batches"),
        ({"max_degradation": -1.0}, "max_degradation"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CompreSSMCallback(**arguments)


class Plain(pl.LightningModule):
    """No SSM layer at all."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(1, 1).double()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.net(batch[0]).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_no_ssm_layer_names_what_was_looked_at(tmp_path: Any) -> None:
    with pytest.raises(UnsupportedLayerError, match=r"no SSM layer found in Plain.*Linear x1"):
        trainer(tmp_path, CompreSSMCallback()).fit(Plain(), loader())


def test_unknown_pattern(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match=r"'encoder\.\*' matches no SSM layer.*'net\.first'"):
        trainer(tmp_path, CompreSSMCallback(layers=["encoder.*"])).fit(Classifier(), loader())


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        while True:
            yield from loader()


@pytest.mark.parametrize(
    "limits",
    [{"max_epochs": -1}, {"max_epochs": -1, "max_time": "00:00:00:01"}],
)
def test_endless_run_with_a_window_in_shares(tmp_path: Any, limits: dict[str, Any]) -> None:
    model = Classifier()
    with pytest.raises(ValueError, match=r"window=\(0, 2000\)"):
        trainer(tmp_path, CompreSSMCallback(tolerance=0.05), **limits).fit(model, loader())
    assert not model.losses, "refused only after training had begun"


def test_epoch_of_unknown_length(tmp_path: Any) -> None:
    endless = DataLoader(Endless(), batch_size=None)
    with pytest.raises(ValueError, match="optimizer steps"):
        trainer(tmp_path, CompreSSMCallback(tolerance=0.05), max_epochs=1).fit(
            Classifier(), endless
        )
    callback = CompreSSMCallback(tolerance=0.2, window=(0, 2), verbose=False)
    trainer(tmp_path, callback, max_steps=4, max_epochs=-1).fit(Classifier(), endless)
    assert {event["step"] for event in callback.history} == {2}


def test_scheduled_accumulation_needs_steps(tmp_path: Any) -> None:
    scheduler = GradientAccumulationScheduler({0: 2, 2: 1})
    with pytest.raises(ValueError, match="accumulation"):
        trainer(tmp_path, CompreSSMCallback(tolerance=0.05), scheduler).fit(Classifier(), loader())
    callback = CompreSSMCallback(tolerance=0.2, window=(0, 4), verbose=False)
    trainer(tmp_path, callback, GradientAccumulationScheduler({0: 2, 2: 1})).fit(
        Classifier(), loader()
    )
    assert {event["step"] for event in callback.history} == {3}  # the end of the first epoch


def test_window_after_the_end_of_the_run(tmp_path: Any) -> None:
    callback = CompreSSMCallback(window=(5000, 6000))
    with pytest.raises(ValueError, match="starts after"):
        trainer(tmp_path, callback).fit(Classifier(), loader())


def test_nan_parameters_stop_the_run_before_anything_changes(tmp_path: Any) -> None:
    class Poison(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 2:
                pl_module.net.first.B_re.data[0, 0] = float("nan")

    model = Classifier()
    callback = CompreSSMCallback(tolerance=0.2, window=(0, 2), verbose=False)
    with pytest.raises(NonFiniteError, match=r"net\.first"):
        trainer(tmp_path, Poison(), callback).fit(model, loader())
    assert (model.net.first.d_state, model.net.second.d_state) == (24, 12)
    assert callback.history == []


def test_failing_swap_leaves_model_and_optimizer_untouched(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An optimizer that refuses at the last moment: the model goes back to its old objects."""
    model = Classifier()
    seen: dict[str, Any] = {}

    class Break(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 2:
                seen["parameters"] = list(pl_module.parameters())
                seen["values"] = [p.detach().clone() for p in seen["parameters"]]
                trainer.optimizers[0].mine = seen["parameters"]

    callback = CompreSSMCallback(tolerance=0.2, window=(0, 2), verbose=False)
    with pytest.raises(UnsupportedOptimizerError, match="mine"):
        trainer(tmp_path, Break(), callback).fit(model, loader())
    assert all(a is b for a, b in zip(model.parameters(), seen["parameters"], strict=True))
    assert all(map(torch.equal, model.parameters(), seen["values"]))
    assert callback.history == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "16-true"}, "precision '16-true'"),
        ({"strategy": "fsdp_cpu"}, "ModelParallelStrategy"),
    ],
)
def test_strategies_and_precisions_refused_by_name(
    tmp_path: Any, settings: dict[str, Any], message: str
) -> None:
    if settings.get("strategy") == "fsdp_cpu":
        from lightning.pytorch.strategies import ModelParallelStrategy

        settings = {"strategy": ModelParallelStrategy()}
    fit = trainer(tmp_path, CompreSSMCallback(), **settings)
    with pytest.raises(UnsupportedStrategyError, match=message):
        CompreSSMCallback().setup(fit, Classifier(), "fit")


def test_two_callbacks_keep_apart_states(tmp_path: Any) -> None:
    one = CompreSSMCallback(state_dim=8, layers=["net.first"], verbose=False)
    two = CompreSSMCallback(state_dim=4, layers=["net.second"], verbose=False)
    model = Classifier()
    trainer(tmp_path, one, two).fit(model, loader())
    assert (model.net.first.d_state, model.net.second.d_state) == (8, 4)
    assert one.state_key != two.state_key


def test_best_checkpoint_holds_the_weights_of_its_metric(tmp_path: Any) -> None:
    checkpoint = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=-1)
    callback = CompreSSMCallback(state_dim=3, window=(0.0, 0.5), verbose=False)
    fit = trainer(tmp_path, callback, checkpoint, max_epochs=4, enable_checkpointing=True)
    fit.fit(Classifier(lr=0.02), loader(), loader(1))
    assert len(checkpoint.best_k_models) == 4
    for path, score in checkpoint.best_k_models.items():
        found = trainer(tmp_path).validate(Classifier(), loader(1), ckpt_path=path, verbose=False)
        assert found[0]["val_loss"] == pytest.approx(score.item(), rel=1e-9)


def test_surgery_error_names() -> None:
    """compress() and the callback share one path; its errors are of one family."""
    model = Classifier().net
    model.first.B_re.data[0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match="first"):
        compress(model, state_dim=4)
    assert model.first.d_state == 24
    assert issubclass(SurgeryError, Exception)


@pytest.mark.parametrize(("balance", "form"), [("auto", "folded"), ("real", "real")])
def test_a_layer_that_is_trained_on_is_folded(tmp_path: Any, balance: Any, form: str) -> None:
    callback = CompreSSMCallback(state_dim=3, balance=balance, window=(0, 6), verbose=False)
    trainer(tmp_path, callback).fit(Classifier(), loader())
    assert {event["balance"] for event in callback.history} == {form}


class Lazy(torch.optim.SGD):
    """Keeps buffers by the parameters' ids, and makes them in its first step."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        self.buffers = {id(p): p.detach().clone() for g in self.param_groups for p in g["params"]}
        return loss


def test_buffers_by_id_that_come_late_end_the_run_at_the_second_step(tmp_path: Any) -> None:
    class Model(Classifier):
        def configure_optimizers(self) -> Any:
            return Lazy(self.parameters(), lr=0.1)

    model = Model()
    with pytest.raises(
        UnsupportedOptimizerError, match=r"references to parameters in \['buffers'\]"
    ):
        trainer(tmp_path, CompreSSMCallback(**REDUCES, verbose=False)).fit(model, loader())
    assert len(model.losses) == 2
    assert model.net.first.d_state == 24
