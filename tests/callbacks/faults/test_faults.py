"""A reduction that fails changes nothing, wherever it fails, and never leaves a rank waiting."""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_compressm import CompreSSMCallback

from ...processes import run_pair, start_pair
from ..helpers import BATCHES, Classifier, loader, same, trainer
from .catalogue import BREAKING, FAULTS, LINEAR, REWRAP, WHERE, Fault, Injection, Where, fits
from .worker import SETUPS, run

CASES = [(fault, where) for where in WHERE for fault in FAULTS if fits(fault, where)]
TOGETHER = [(f, w) for f, w in CASES if w != "alone"] + [(fault, "all") for fault in REWRAP]


def _id(value: Any) -> str:
    return value.name if isinstance(value, Fault) else str(value).replace(" ", "")


def _check(fault: Fault, here: dict[str, Any], setup: tuple[dict[str, Any], dict[str, Any]]):
    """What must hold on each rank, whether the failure was here or elsewhere."""
    reference, undisturbed = setup
    actions = [event["action"] for event in here["history"]]
    if fault.outcome == "error":
        assert here["error"], "the run went on"
        assert here["untouched"]
        assert all(here["untouched"].values()), here["untouched"]
        assert here["history"] == []
        return
    assert not here["error"]
    compared = reference
    if fault.outcome == "skip":
        (event,) = here["history"]
        assert event["action"] == "skip"
        assert event["old_state_dim"] == event["new_state_dim"]
        assert str(fault.make()).splitlines()[0] in event["reason"]
    elif fault.outcome == "cpu":
        compared = undisturbed
        assert actions == ["reduce"]
        assert "analysed on the CPU" in here["history"][0]["reason"]
        strip = [{**e, "reason": ""} for e in here["history"]]
        assert strip == [{**e, "reason": ""} for e in undisturbed["history"]]
    else:
        assert actions == ["skip", "reduce"]
        assert here["history"][1] == undisturbed["history"][1]
        return
    assert here["losses"] == compared["losses"]
    assert same(here["state_dict"], compared["state_dict"])
    assert same(here["optimizer"], compared["optimizer"])


def _warned(result: dict[str, Any]) -> bool:
    words = ("is left as it is", "no reduction, the swap failed")
    return any(word in message for message in result["warnings"] for word in words)


@cache
def _alone(case: str, tmp: Path) -> dict[str, Any]:
    return run(case, tmp, devices=1)


@pytest.mark.parametrize("fault", [f for f, where in CASES if where == "alone"], ids=_id)
def test_one_process(fault: Fault, tmp_path_factory: pytest.TempPathFactory) -> None:
    tmp = tmp_path_factory.getbasetemp()
    setup = tuple(_alone(f"{kind}/{fault.setup}", tmp) for kind in ("reference", "undisturbed"))
    result = run(f"alone/{fault.name}", tmp, devices=1)
    assert result["fired"], "the failure was never met"
    _check(fault, result, setup)  # type: ignore[arg-type]
    if fault.outcome in ("skip", "reduce second"):
        assert _warned(result)


def launch(out: Path, timeout: float, *cases: str) -> None:
    """Run cases in one pair of processes."""
    run_pair("faults.worker", out, timeout, "raise", *cases, timeout=580)


def _load(out: Path, case: str) -> list[dict[str, Any]]:
    return [torch.load(out / f"{case.replace('/', '--')}.{rank}.pt") for rank in (0, 1)]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("faults")
    cases = [f"{kind}/{name}" for name in SETUPS for kind in ("reference", "undisturbed")]
    launch(out, 60, *cases, *(f"{where}/{fault.name}" for fault, where in TOGETHER))
    return out


@pytest.mark.slow
@pytest.mark.timeout(600)  # the first one waits for a launch that all share
@pytest.mark.parametrize(("fault", "where"), TOGETHER, ids=_id)
def test_two_processes(fault: Fault, where: Where, two_ranks: Path) -> None:
    ranks = _load(two_ranks, f"{where}/{fault.name}")
    reference = _load(two_ranks, f"reference/{fault.setup}")
    undisturbed = _load(two_ranks, f"undisturbed/{fault.setup}")
    for rank, here in enumerate(ranks):
        # Linear layers are one rank's work, rank 0's unless another one is to fail.
        met = where == f"rank {rank}" or (where == "all" and (rank == 0 or fault not in LINEAR))
        if met or where != "all":
            assert bool(here["fired"]) == met
        _check(fault, here, (reference[rank], undisturbed[rank]))
    first, second = ranks
    assert first["history"] == second["history"]
    assert len(first["gradients"]) == len(second["gradients"])
    assert all(map(torch.equal, first["gradients"], second["gradients"])), "DDP is out of step"
    if fault.outcome in ("skip", "reduce second"):
        assert _warned(first)


class Worse(Classifier):
    """Its metric gets worse all the time."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("worse", float(self.trainer.global_step))


def test_a_swap_that_failed_is_not_judged(tmp_path: Path) -> None:
    """Nothing was reduced, so that a worse metric must not roll training back."""
    losses = []
    fault = next(f for f in FAULTS if f.target.endswith(":_swap") and f.outcome == "skip")
    callback = CompreSSMCallback(state_dim=6, window=(0, BATCHES), monitor="worse", verbose=False)
    for callbacks in ([], [callback]):
        model, injection = Worse("adamw"), Injection(fault)
        injection.enabled = True
        fit = trainer(tmp_path, *callbacks, max_epochs=4)
        with injection.installed(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fit.fit(model, loader(), loader(1))
        losses.append(model.losses)
    assert injection.fired == 1
    assert [event["action"] for event in callback.history] == ["skip", "skip"]
    assert losses[0] == losses[1]


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "where"), BREAKING, ids=_id)
def test_one_rank_fails_during_an_exchange(fault: Fault, where: Where, tmp_path: Path) -> None:
    """The other rank waits for it; when the failed one ends, it stops with an error as well."""
    pair = start_pair("faults.worker", tmp_path, 120, "raise", f"{where}/{fault.name}")
    for status, output in [process.wait() for process in pair]:
        assert status == 7, output
    results = _load(tmp_path, f"{where}/{fault.name}")
    for rank, here in enumerate(results):
        assert bool(here["fired"]) == (where == f"rank {rank}")
        assert here["error"]
        assert all(here["untouched"].values()), here["untouched"]
        assert here["history"] == []
        assert here["waited"] < 60
    failed = results[int(where[-1])]["error"]
    assert ("ExchangeError" in failed) == (fault.stage == "exchange")


def test_the_table_is_as_long_as_it_says() -> None:
    """Names are unique, and the number of injected failures is known."""
    names = [fault.name for fault in (*FAULTS, *REWRAP)]
    assert len(set(names)) == len(names)
    assert (len(FAULTS), len(CASES), len(REWRAP), len(BREAKING)) == (67, 266, 2, 8)
