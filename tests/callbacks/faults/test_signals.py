"""Ranks that die or hang in a reduction, interrupts, and signals: real processes, real signals."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from ...processes import start, start_pair
from ..helpers import BATCHES, same
from .catalogue import LINEAR, REWRAP, SELECTIVE, SWAP, Fault
from .signal_worker import EPOCHS, train
from .worker import run


def _first(faults: list[Fault], function: str, *, after: bool = False) -> Fault:
    return next(f for f in faults if f.target.endswith(function) and f.after == after)


STAGES = {
    "analysis": _first(LINEAR, ":svd"),
    "statistics": _first(SELECTIVE, ":_statistics"),
    "swap": _first(SWAP, ":_set_tensor"),
    "optimizer": _first(SWAP, ":_swap", after=True),
    "rewrap": _first(REWRAP, "configure_ddp"),
}

DEATHS = [
    ("analysis", "kill", 0),
    ("analysis", "kill", 1),
    ("statistics", "kill", 1),
    ("statistics", "exit", 0),
    ("swap", "kill", 1),
    ("optimizer", "exit", 0),
    ("rewrap", "kill", 1),
    ("rewrap", "exit", 0),
    ("statistics", "interrupt", 1),
    ("swap", "system-exit", 0),
]


@pytest.fixture
def _interruptible() -> Iterator[None]:
    """Lightning leaves SIGINT ignored after an interrupt."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


def _survivor(out: Path, stage: str, rank: int) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(
        out / f"rank {rank}--{STAGES[stage].name}.{1 - rank}.pt", weights_only=True
    )
    assert found["error"], "the other rank went on"
    assert all(found["untouched"].values()), found["untouched"]
    assert found["untouched"]
    assert found["history"] == []
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "end", "rank"), DEATHS)
def test_a_rank_that_dies_ends_the_other_within_seconds(
    stage: str, end: str, rank: int, tmp_path: Path
) -> None:
    case = f"rank {rank}/{STAGES[stage].name}"
    pair = start_pair("faults.worker", tmp_path, 600, end, case)
    ended = [process.wait(120) for process in pair]
    status = {"kill": -signal.SIGKILL, "exit": 3, "interrupt": 7, "system-exit": 7}[end]
    assert ended[rank][0] == status, ended[rank][1]
    assert ended[1 - rank][0] == 7, ended[1 - rank][1]
    assert _survivor(tmp_path, stage, rank)["waited"] < 30


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["statistics", "swap"])
def test_a_rank_that_hangs_ends_the_other_after_the_timeout(stage: str, tmp_path: Path) -> None:
    pair = start_pair("faults.worker", tmp_path, 10, "stop", f"rank 1/{STAGES[stage].name}")
    try:
        status, output = pair[0].wait(120)
    finally:
        pair[1].wait(0)  # it hangs: this ends it
    assert status == 7, output
    found = _survivor(tmp_path, stage, 1)
    assert "ExchangeError" in found["error"]
    assert 9 < found["waited"] < 60


@pytest.mark.slow
@pytest.mark.parametrize("where", ["rank 1", "all"])
def test_sigterm_on_ranks(where: str, tmp_path: Path) -> None:
    """Lightning's handler exchanges: if not all ranks are at the same point, they time out."""
    fault = STAGES["statistics"]
    pair = start_pair("faults.worker", tmp_path, 10, "terminate", f"{where}/{fault.name}")
    for status, output in [process.wait(120) for process in pair]:
        assert status == 7, output
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{where}--{fault.name}.{rank}.pt")
        wanted = "SIGTERMException" if where == "all" else "ExchangeError"
        assert found["error"].startswith(wanted)
        assert all(found["untouched"].values()), found["untouched"]
        assert found["waited"] < 60


@pytest.mark.usefixtures("_interruptible")
@pytest.mark.parametrize("end", ["interrupt", "system-exit"])
@pytest.mark.parametrize("stage", ["analysis", "statistics", "swap", "optimizer"])
def test_an_interrupt_leaves_everything_as_it_was(stage: str, end: str, tmp_path: Path) -> None:
    result = run(f"alone/{STAGES[stage].name}", tmp_path, devices=1, end=end)
    assert result["fired"]
    assert result["error"].startswith("SystemExit")  # Lightning's answer to KeyboardInterrupt too
    assert result["untouched"]
    assert all(result["untouched"].values()), result["untouched"]
    assert result["history"] == []


@cache
def _undisturbed(stage: str, tmp: Path) -> dict[str, Any]:
    return train(tmp / f"undisturbed-{stage}", STAGES[stage])


@pytest.mark.slow
@pytest.mark.parametrize("end", ["kill", "terminate"])
@pytest.mark.parametrize("stage", ["analysis", "statistics", "swap", "optimizer"])
def test_a_run_that_was_ended_resumes_bitwise(
    stage: str, end: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    status, output = start("faults.signal_worker", tmp_path, end, STAGES[stage].name).wait()
    assert status == (-signal.SIGKILL if end == "kill" else 0), output
    whole = _undisturbed(stage, tmp_path_factory.getbasetemp())
    assert {event["action"] for event in whole["history"]} == {"reduce"}
    last = tmp_path / "last.ckpt"
    saved = torch.load(last, weights_only=True)
    # SIGTERM waits for the end of what Lightning is doing: in the analysis, that of the epoch.
    epochs = 2 if end == "terminate" or stage in ("swap", "optimizer") else 1
    assert saved["global_step"] == epochs * BATCHES
    (state,) = (v for k, v in saved["callbacks"].items() if k.startswith("CompreSSM"))
    assert state["pending"] is not None
    resumed = train(tmp_path / "resumed", STAGES[stage], ckpt_path=last)
    assert len(whole["losses"]) == EPOCHS * BATCHES
    assert resumed["losses"] == whole["losses"][epochs * BATCHES :]
    for part in ("state_dict", "optimizer", "history"):
        assert same(resumed[part], whole[part]), part
