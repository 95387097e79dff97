"""Two real gloo processes against each other and against one process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ..features import needs_ema, needs_strict_ranks
from ..processes import run_pair
from .ddp_worker import run

CASES = [
    "sgd/plain",
    "adamw/plain",
    "adamw_fused/plain",
    "adamw/static_graph",
    "adamw/bucket_view",
    "adamw/find_unused",
    "adamw/frozen",
    "adamw/manual_static",
    "adamw/ema",
    "adamw/average",
    "adamw/rollback",
    "adamw/budget",
    "adamw/two_rates",
]
LATE = {"adamw/manual_static": needs_strict_ranks, "adamw/ema": needs_ema}


def _launch(out: Path, *cases: str) -> None:
    """As users start them: Lightning runs the program again for the second rank."""
    command = [sys.executable, "-m", "tests.callbacks.ddp_worker", str(out), *cases]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=240
        )
    except subprocess.TimeoutExpired as late:
        # What the ranks said until then tells which one was lost, and why.
        pytest.fail(f"{late}\n{late.stdout!r}\n{late.stderr!r}")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]


def _load(out: Path, case: str, rank: int) -> dict[str, Any]:
    result: dict[str, Any] = torch.load(out / f"{case.replace('/', '-')}.{rank}.pt")
    return result


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ddp")
    skipped = {case for case, mark in LATE.items() if mark.args[0]}
    _launch(out, *(case for case in CASES if case not in skipped), "adamw/power_sgd")
    return out


@pytest.mark.filterwarnings("ignore:CompreSSMCallback took the last reduction back")
@pytest.mark.parametrize("case", [pytest.param(c, marks=LATE.get(c, ())) for c in CASES])
def test_ranks_agree_with_each_other_and_with_one_process(
    case: str, results: Path, tmp_path: Path
) -> None:
    first, second = (_load(results, case, rank) for rank in (0, 1))
    single = run(case, tmp_path, devices=1)
    assert first["history"] == second["history"]
    assert any(event["action"] == "reduce" for event in first["history"])
    rolled_back = any(event["action"] == "rollback" for event in first["history"])
    assert rolled_back == case.endswith("rollback")
    assert first["d_state"] == single["d_state"]
    assert (first["d_state"] == 24) == rolled_back
    for name, value in first["state_dict"].items():
        assert torch.equal(value, second["state_dict"][name]), f"{name} differs between ranks"
        assert value.dtype == torch.float64
        # Bases of states that hardly count are a matter of rounding, and Adam goes by the basis.
        if case != "adamw/budget":
            torch.testing.assert_close(value, single["state_dict"][name], rtol=1e-6, atol=1e-6)


def test_two_processes_try_cuts_on_the_loss_that_one_has(results: Path, tmp_path: Path) -> None:
    two, one = _load(results, "adamw/budget", 0), run("adamw/budget", tmp_path, devices=1)
    first = [[e for e in result["history"] if e["step"] == 2] for result in (two, one)]
    assert [e["reason"] for e in first[0]] == [e["reason"] for e in first[1]]
    for ours, theirs in zip(*first, strict=True):
        assert ours["loss_change"] == pytest.approx(theirs["loss_change"], rel=1e-6)


def test_compressed_gradients_start_anew_after_a_reduction(results: Path) -> None:
    """PowerSGD keeps remainders and factors in the shapes of the buckets."""
    first, second = (_load(results, "adamw/power_sgd", rank) for rank in (0, 1))
    steps = [event["step"] for event in first["history"] if event["action"] == "reduce"]
    assert first["exchanges"] == len(first["losses"]) - max(steps)
    assert first["compressed"] == 1  # one bucket
    assert first["d_state"] == second["d_state"] < 24
    for name, value in first["state_dict"].items():
        assert torch.equal(value, second["state_dict"][name]), f"{name} differs between ranks"
    assert sum(first["losses"][-6:]) < sum(first["losses"][:6])


def test_failure_on_one_rank_stops_all_and_changes_nothing(tmp_path: Path) -> None:
    run_pair("ddp_worker", tmp_path, "failing")
    first, second = (_load(tmp_path, "failing", rank) for rank in (0, 1))
    assert first["error"].startswith("OtherRankError")
    assert second["error"].startswith("UnsupportedOptimizerError")
    assert first["d_state"] == second["d_state"] == 24
