"""What is left of a layer learns as fast as the whole layer did, and never faster than the rest."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities import rank_zero
from torch import Tensor
from torch.optim import LBFGS, SGD, AdamW
from torch.optim.lr_scheduler import LambdaLR, MultiplicativeLR, OneCycleLR, StepLR

from lightning_compressm import CompreSSMCallback

from ..features import needs
from .checkpointing import EPOCHS, Run
from .helpers import BATCHES, Classifier, StatefulLoader, SteppedByHand, loader, same, trainer

CUT = 3  # optimizer steps before it
OPTIONS: dict[str, Any] = {
    "state_dim": 6,
    "window": (0, CUT),
    "every_n_steps": CUT,
    "learning_speed": True,
    "verbose": False,
}
STATES = ("nu_log", "theta_log", "gamma_log", "B_re", "B_im", "C_re", "C_im")  # D has no states
RATE = 1e-2

Values = dict[str, Tensor]


def state_names(layer: str) -> set[str]:
    return {f"net.{layer}.{name}" for name in STATES}


class TwoRates(Classifier):
    """The states' parameters train at a fraction of the others' rate."""

    def __init__(
        self,
        share: float = 0.25,
        make: Callable[[list[Any]], Any] | None = None,
        schedule: Callable[[Any], Any] | None = None,
        dtype: str = "float64",
    ) -> None:
        super().__init__(dtype=dtype)
        self.share, self.make, self.schedule = share, make or AdamW, schedule

    def groups(self) -> tuple[list[Tensor], list[Tensor]]:
        """Parameters of states, and all others."""
        states = state_names("first") | state_names("second")
        named = dict(self.named_parameters())
        return [named[n] for n in sorted(states)], [p for n, p in named.items() if n not in states]

    def configure_optimizers(self) -> Any:
        states, others = self.groups()
        optimizer = self.make(
            [
                {"params": others, "lr": RATE, "weight_decay": 0.1},
                {"params": states, "lr": self.share * RATE, "weight_decay": 0.1},
            ]
        )
        if self.schedule is None:
            return optimizer
        scheduler = {"scheduler": self.schedule(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


class Recorded(pl.Callback):
    """The parameters after each optimizer step, and after what the callback before it did."""

    def __init__(self) -> None:
        self.after: dict[int, Values] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        named = pl_module.named_parameters()
        self.after[trainer.global_step] = {name: p.detach().clone() for name, p in named}


def fit(
    tmp: Path,
    model: Classifier,
    speed: bool,
    steps: int = CUT + 1,
    options: Mapping[str, Any] = MappingProxyType({}),
    **more: Any,
) -> Recorded:
    values = Recorded()
    callback = CompreSSMCallback(**OPTIONS | {"learning_speed": speed, **options})
    fitted = trainer(tmp, callback, values, max_steps=steps, max_epochs=-1, **more)
    fitted.fit(model, loader())
    for optimizer in fitted.optimizers:
        assert not optimizer._optimizer_step_pre_hooks
        assert not optimizer._optimizer_step_post_hooks
    return values


def update(values: Recorded, step: int, name: str) -> Tensor:
    return values.after[step][name] - values.after[step - 1][name]


def check_first_update(with_rule: Recorded, without: Recorded, first: float, second: float) -> None:
    """Cut 24 -> 6 and 12 -> 6; the step after it is so many times that of the other run."""
    assert same(with_rule.after[CUT], without.after[CUT])
    assert with_rule.after[CUT]["net.first.nu_log"].shape == (6,)
    factors = dict.fromkeys(state_names("first"), first)
    factors |= dict.fromkeys(state_names("second"), second)
    for name in with_rule.after[CUT]:
        factor = factors.get(name, 1.0)
        plain = update(without, CUT + 1, name)
        assert plain.any(), name
        if factor == 1:
            assert torch.equal(update(with_rule, CUT + 1, name), plain), name
        else:
            torch.testing.assert_close(
                update(with_rule, CUT + 1, name), factor * plain, rtol=1e-9, atol=1e-16
            )


SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "StepLR": lambda o: StepLR(o, 1, 0.7),
    "OneCycleLR": lambda o: OneCycleLR(
        o, [group["lr"] for group in o.param_groups], total_steps=20, cycle_momentum=False
    ),
    "LambdaLR": lambda o: LambdaLR(o, lambda step: 1 / (1 + step)),
    "recursive": lambda o: MultiplicativeLR(o, lambda step: 0.7),
}
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    **{name: ({"schedule": schedule}, {}) for name, schedule in SCHEDULES.items()},
    "clipped": ({}, {"gradient_clip_val": 1e-3}),
    "accumulated": ({}, {"accumulate_grad_batches": 2}),
    "fused": ({"make": lambda groups: AdamW(groups, fused=True)}, {}),
    "foreach": ({"make": lambda groups: AdamW(groups, foreach=True)}, {}),
    "tensor rate": (
        {"make": lambda groups: AdamW([g | {"lr": torch.tensor(g["lr"])} for g in groups])},
        {},
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_first_update_after_a_cut_is_as_many_times_longer(tmp_path: Path, way: str):
    model, more = WAYS[way]
    runs = [fit(tmp_path, TwoRates(**model), speed, **more) for speed in (True, False)]
    check_first_update(*runs, first=4, second=2)


@pytest.mark.parametrize(("share", "first", "second"), [(1 / 3, 3, 2), (2 / 3, 1.5, 1.5)])
def test_the_highest_other_rate_is_the_limit(
    tmp_path: Path, share: float, first: float, second: float
):
    runs = [fit(tmp_path, TwoRates(share), speed) for speed in (True, False)]
    check_first_update(*runs, first=first, second=second)


@pytest.mark.parametrize("share", [1.0, 4.0, None], ids=["same rate", "higher rate", "one group"])
def test_nothing_changes_where_states_train_as_fast_as_the_rest(
    tmp_path: Path, share: float | None
):
    runs = [
        fit(tmp_path, Classifier() if share is None else TwoRates(share), speed, CUT + 4)
        for speed in (True, False)
    ]
    assert same(runs[0].after, runs[1].after)


def test_the_limit_is_the_rates_of_now(tmp_path: Path):
    """The others' rate falls to the states' one: from there on all goes at one speed."""

    def schedule(optimizer: Any) -> LambdaLR:
        return LambdaLR(optimizer, [lambda step: 1.0 if step < CUT else 0.5, lambda step: 1.0])

    runs = [fit(tmp_path, TwoRates(schedule=schedule), speed) for speed in (True, False)]
    check_first_update(*runs, first=2, second=2)


def test_a_second_cut_counts_from_the_first_dimension(tmp_path: Path):
    """Two halvings within the last of two steps: the third step's update is four times as long."""
    halve = {"state_dim": None, "fraction": 0.5, "window": (CUT - 1, CUT), "every_n_steps": 1}
    runs = []
    for speed in (True, False):
        values = Recorded()
        callback = CompreSSMCallback(**OPTIONS | halve | {"learning_speed": speed})
        # Nothing moves between the cuts, so that both runs meet the second one alike.
        model = TwoRates(schedule=lambda o: LambdaLR(o, lambda step: float(step != CUT - 1)))
        trainer(tmp_path, callback, values, max_steps=CUT + 1, max_epochs=-1).fit(model, loader())
        runs.append(values)
    name = "net.first.nu_log"
    assert [v[name].shape[0] for v in runs[0].after.values()] == [24, 12, 6, 6]
    torch.testing.assert_close(
        update(runs[0], CUT + 1, name), 4 * update(runs[1], CUT + 1, name), rtol=1e-9, atol=1e-16
    )


class SeveralOptimizers(SteppedByHand, TwoRates):
    """States by AdamW, the rest by something else, stepped by hand."""

    def __init__(self, other: Callable[[list[Tensor]], Any]) -> None:
        super().__init__()
        self.other = other

    def configure_optimizers(self) -> Any:
        states, others = self.groups()
        return [AdamW(states, lr=RATE / 4), self.other(others)]


def test_rates_of_another_optimizer_count(tmp_path: Path):
    # Each optimizer's step counts.
    options = OPTIONS | {"window": (0, 2 * CUT), "every_n_steps": 2 * CUT}

    def run(speed: bool) -> Recorded:
        model = SeveralOptimizers(lambda others: AdamW(others, lr=RATE, weight_decay=0.0))
        callback = CompreSSMCallback(**options | {"learning_speed": speed})
        values = Recorded()
        trainer(tmp_path, callback, values, max_steps=2 * CUT + 2, max_epochs=-1).fit(
            model, loader()
        )
        values.after = {step // 2: found for step, found in values.after.items()}
        return values

    check_first_update(run(True), run(False), first=4, second=2)


class OneGroup(TwoRates):
    """As one group, for optimizers that have no more."""

    def configure_optimizers(self) -> Any:
        return self.make(list(self.parameters()))


class OwnAdamW(AdamW):
    """A step of its own: whatever it does may not bear to be lengthened."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("SGD", lambda: TwoRates(make=lambda groups: SGD(groups, momentum=0.9))),
        pytest.param(
            "Adafactor",
            lambda: TwoRates(make=torch.optim.Adafactor),
            marks=needs(torch.optim, "Adafactor"),
        ),
        ("LBFGS", lambda: OneGroup(make=lambda p: LBFGS(p, lr=RATE, max_iter=2))),
        ("OwnAdamW", lambda: TwoRates(make=OwnAdamW)),
    ],
)
def test_other_optimizers_are_left_alone_and_it_is_said_once(
    tmp_path: Path, name: str, make: Callable[[], Classifier], caplog: pytest.LogCaptureFixture
):
    again = {"state_dim": None, "fraction": 0.5, "every_n_steps": 1}  # three cuts
    runs = []
    for speed in (True, False):
        model = make()
        with caplog.at_level(logging.INFO, logger=rank_zero.__name__):
            runs.append(fit(tmp_path, model, speed, CUT + 3, again))
    said = [r.getMessage() for r in caplog.records if "leaves the steps of" in r.getMessage()]
    assert len(said) == 1
    assert f"the steps of {name} as they are" in said[0]
    assert same(runs[0].after, runs[1].after)


@needs(torch.optim, "Muon")
def test_rates_that_count_something_else_are_no_limit_to_go_up_to(tmp_path: Path):
    """Muon's rate is that of a whole matrix: four times of it says nothing about an entry."""

    class WithMuon(SeveralOptimizers):
        def configure_optimizers(self) -> Any:
            states, others = self.groups()
            matrices = [p for p in others if p.ndim == 2]
            rest = [p for p in others if p.ndim != 2]
            return [AdamW([*states, *rest], lr=RATE / 4), torch.optim.Muon(matrices, lr=RATE)]

    values = {}
    for speed in (True, False):
        callback = CompreSSMCallback(**OPTIONS | {"learning_speed": speed})
        model = WithMuon(lambda others: None)
        trainer(tmp_path, callback, max_epochs=1).fit(model, loader())
        assert callback.state_dims["net.first"] == 6
        values[speed] = model.state_dict()
    assert same(values[True], values[False])


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_loss_scaling_skips_moves_nothing(tmp_path: Path, fused: bool):
    bad = CUT + 1  # the first batch after the cut

    class Overflowing(TwoRates):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss * (float("inf") if batch_idx == bad - 1 else 1.0)

    runs = []
    for speed in (True, False):
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        model = Overflowing(make=lambda groups: AdamW(groups, fused=fused), dtype="float32")
        plugin = MixedPrecision("16-mixed", "cpu", scaler)
        runs.append(fit(tmp_path, model, speed, CUT + 2, plugins=[plugin]))
        assert scaler.get_scale() == 2.0
    kept, moved = runs[0].after[bad], runs[0].after[bad + 1]
    assert same(kept, runs[0].after[CUT])
    name = "net.first.nu_log"
    torch.testing.assert_close(
        moved[name] - kept[name], 4 * update(runs[1], bad + 1, name), rtol=1e-3, atol=1e-7
    )


def ends_differ(tmp: Path, model: Callable[[], Classifier], **options: Any) -> bool:
    ends = []
    for plain in (options, {**options, "learning_speed": False}):
        one = model()
        trainer(tmp, CompreSSMCallback(**plain), max_steps=CUT + 2, max_epochs=-1).fit(
            one, loader()
        )
        ends.append(one.state_dict())
    return not same(*ends)


@pytest.mark.parametrize(
    ("options", "on"),
    [
        ({"state_dim": 6}, False),
        ({"fraction": 0.5}, False),
        ({"tolerance": 0.5}, False),
        ({"tolerance": 0.5, "learning_speed": True}, True),
    ],
)
def test_a_target_of_ones_own_keeps_its_published_meaning(
    tmp_path: Path, options: dict[str, Any], on: bool
):
    schedule = {"window": (0, CUT), "every_n_steps": CUT, "verbose": False}
    assert ends_differ(tmp_path, TwoRates, **schedule, **options) is on


def test_the_bare_callback_has_it(tmp_path: Path):
    assert CompreSSMCallback()._run.speed.enabled
    assert not CompreSSMCallback(learning_speed=False)._run.speed.enabled
    with pytest.raises(ValueError, match="learning_speed: expected True or False or None"):
        CompreSSMCallback(learning_speed="yes")  # type: ignore[arg-type]


POINTS = {"pending": ("epoch", 0, -1), "after the cut": ("step", 1, 2), "later": ("epoch", 2, -1)}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("speed"), TwoRates(), learning_speed=True)


@pytest.mark.parametrize("point", POINTS)
def test_resume_is_bitwise_equal(run: Run, point: str, tmp_path: Path):
    path = run.checkpoint(*POINTS[point])
    run.resume(tmp_path, TwoRates(), path)
    # With the switch off the end is another one, so that the factors do come from the checkpoint.
    off = TwoRates()
    callback = CompreSSMCallback(**run.settings | {"learning_speed": False})
    trainer(tmp_path, callback, max_epochs=EPOCHS).fit(
        off, StatefulLoader(), loader(1), ckpt_path=path
    )
    assert not same(off.state_dict(), run.model.state_dict())


@pytest.mark.parametrize(
    "saved",
    [{"net.first.nu_log": [24]}, {"net.first.nu_log": [6, 24]}, {"net.first.nu_log": [24, 0]}, []],
    ids=str,
)
def test_a_damaged_state_is_refused(run: Run, saved: Any):
    callback = CompreSSMCallback()
    state = run.callback.state_dict() | {"speed": saved}
    with pytest.raises(Exception, match="damaged in 'speed'"):
        callback.load_state_dict(state)
    assert callback.history == []


@pytest.mark.filterwarnings("ignore:CompreSSMCallback took the last reduction back")
def test_a_rollback_takes_the_factors_back(tmp_path: Path):
    class Judged(TwoRates):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            epoch = 0 if self.trainer.sanity_checking else self.trainer.current_epoch
            self.log("score", [1.0, 2.0, 1.0][epoch])

    models, losses = [], []
    for speed in (True, False):
        models.append(model := Judged())
        callback = CompreSSMCallback(
            state_dim=6, window=(0, BATCHES), monitor="score", learning_speed=speed, verbose=False
        )
        trainer(tmp_path, callback, max_epochs=3).fit(model, loader(), loader(1))
        assert [e["action"] for e in callback.history] == ["reduce"] * 2 + ["rollback"] * 2
        assert callback.state_dict()["speed"] == {}
        losses.append(model.losses)
    between = slice(BATCHES, 2 * BATCHES)  # where the states were gone
    assert losses[0][between] != losses[1][between]
    assert losses[0][2 * BATCHES :] == losses[1][2 * BATCHES :]
    assert same(models[0].state_dict(), models[1].state_dict())


class _BatchError(Exception):
    pass


def test_an_exception_leaves_no_hooks_behind(tmp_path: Path):
    class Failing(TwoRates):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if batch_idx == CUT + 1:
                raise _BatchError
            return super().training_step(batch, batch_idx)

    fitted = trainer(tmp_path, CompreSSMCallback(**OPTIONS))
    with pytest.raises(_BatchError):
        fitted.fit(Failing(), loader())
    (optimizer,) = fitted.optimizers
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


@pytest.mark.filterwarnings("ignore:CompreSSMCallback.*swap failed")
def test_a_swap_that_fails_changes_no_factor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fails(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr("lightning_compressm.callbacks._strategy.change", fails)
    callback = CompreSSMCallback(**OPTIONS)
    trainer(tmp_path, callback, max_epochs=1).fit(TwoRates(), loader())
    assert [e["action"] for e in callback.history] == ["skip"] * 2
    assert callback.state_dict()["speed"] == {}
