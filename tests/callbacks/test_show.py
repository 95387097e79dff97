"""What a user sees of a run that is reduced."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger

from lightning_compressm import CompreSSMCallback
from lightning_compressm.callbacks import _show
from lightning_compressm.callbacks._show import StepClock

from ..features import from_lightning
from .helpers import BATCHES, Classifier, loader

BARS: dict[str, Callable[[], list[Any]]] = {
    "tqdm": lambda: [TQDMProgressBar()],
    "rich": lambda: [RichProgressBar()],
    "none": list,
}

RICH_BAR = from_lightning("2.6", "its Rich bar fails by itself with a newer rich")
EACH_BAR = [pytest.param(bar, marks=[RICH_BAR] if bar == "rich" else []) for bar in BARS]


@pytest.fixture
def said(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """All that was printed or logged."""
    logged: list[str] = []
    monkeypatch.setattr(_show.pl, "rank_zero_info", logged.append)
    monkeypatch.setenv("COLUMNS", "100")
    return lambda: "".join((*capfd.readouterr(), *(f"{text}\n" for text in logged)))


def run(tmp: Path, bar: str, **options: Any) -> tuple[pl.Trainer, CompreSSMCallback]:
    callback = CompreSSMCallback(state_dim=6, window=(0, BATCHES), **options)
    run = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=3,
        default_root_dir=tmp,
        logger=False,
        callbacks=[callback, *BARS[bar]()],
        enable_progress_bar=bar != "none",
        enable_model_summary=False,
    )
    run.fit(Classifier(), loader())
    return run, callback


@pytest.mark.parametrize("bar", EACH_BAR)
def test_events_and_a_summary_are_printed(bar: str, tmp_path, said) -> None:
    trainer, _ = run(tmp_path, bar)
    told = said()
    assert re.search(r"CompreSSM after step 6\n", told)
    assert re.search(r"net\.first +24 -> 6 +\d+\.\d%", told)
    assert re.search(r"CompreSSM: 36 -> 12 states in 2 layers, 715 -> 259 parameters", told)
    assert re.search(r"a batch took \S+ ms before the first cut and \S+ ms", told)
    assert "looks and swaps took" in told
    assert f"{tmp_path}" in told.replace("\n", "")
    assert trainer.progress_bar_metrics["compressm/total_state_dim"] == 12


@pytest.mark.parametrize("bar", EACH_BAR)
def test_quiet(bar: str, tmp_path, said) -> None:
    trainer, callback = run(tmp_path, bar, verbose=False)
    assert callback.state_dims == {"net.first": 6, "net.second": 6}
    assert "CompreSSM" not in said()
    assert "compressm/total_state_dim" not in trainer.progress_bar_metrics
    assert trainer.callback_metrics["compressm/total_state_dim"] == 12


def test_a_run_that_loses_nothing_has_no_summary(tmp_path, said) -> None:
    callback = CompreSSMCallback(state_dim=24, window=(0, BATCHES))
    options: dict[str, Any] = {"accelerator": "cpu", "max_epochs": 2, "logger": False}
    trainer = pl.Trainer(**options, default_root_dir=tmp_path, callbacks=[callback])
    trainer.fit(Classifier(), loader())
    told = said()
    assert "after step 6" in told
    assert "looks and swaps took" not in told


def test_without_rich_the_table_is_plain(tmp_path, said, monkeypatch) -> None:
    monkeypatch.setattr(_show, "find_spec", lambda name: None)
    run(tmp_path, "none")
    assert "layer       family  action" in said()


def test_only_whole_batches_of_one_size_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 1.0, 3.0, 100.0, 104.0, 200.0, 208.0, 300.0, 316.0])
    monkeypatch.setattr(_show.time, "perf_counter", lambda: next(times))
    clock = StepClock()
    for _ in range(3):
        clock.tick()
    clock.pause()  # a validation
    clock.tick()
    clock.tick()
    clock.cut()
    clock.tick()
    clock.tick()
    assert (list(clock.before), list(clock.after)) == ([1.0, 2.0, 4.0], [8.0])
    clock.cut()
    clock.tick()
    clock.tick()
    assert (list(clock.before), list(clock.after)) == ([1.0, 2.0, 4.0], [16.0])


def test_dimensions_are_logged_for_every_epoch_and_looks_once(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    callback = CompreSSMCallback(state_dim=6, window=(0, BATCHES), verbose=False)
    options: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "max_epochs": 4}
    trainer = pl.Trainer(
        **options, logger=logger, callbacks=[callback], default_root_dir=tmp_path,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Classifier(), loader())
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    dims = [row["compressm/state_dim/net.first"] for row in rows]
    assert dims == ["24.0", "6.0", "6.0", "6.0"]
    assert [bool(row["compressm/energy_kept/net.first"]) for row in rows] == [1, 1, 0, 0]
    assert 0 < trainer.callback_metrics["compressm/energy_kept/net.first"] < 1
