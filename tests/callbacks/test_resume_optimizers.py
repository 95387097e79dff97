"""A resumed run ends as the uninterrupted one, to the bit, whatever the optimizer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ..features import optimizers
from .checkpointing import EPOCHS, OPTIMIZERS, Run, make
from .helpers import BATCHES

POINTS = {
    "pending": ("epoch", 0, -1),  # a plan is committed to, but not carried out
    "not yet looked": ("validated", 0, -1),  # written before the epoch's look
    "before": ("step", 0, 2),
    "between": ("step", 1, 1),
    "last": ("epoch", 1, -1),
    "after": ("step", 2, 4),
}


@pytest.fixture(scope="module", params=optimizers([*OPTIMIZERS, "muon"]))
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    torch.manual_seed(0)
    return Run(tmp_path_factory.mktemp("run"), make(request.param))


def test_the_run_was_reduced(run: Run):
    reduced = {e["epoch"] for e in run.callback.history if e["action"] == "reduce"}
    assert reduced >= {0}
    assert len(run.model.losses) >= EPOCHS * BATCHES


def test_the_points_are_what_they_are_called(run: Run):
    pending = {}
    for name, point in POINTS.items():
        states = torch.load(run.checkpoint(*point), weights_only=True)["callbacks"]
        (state,) = (v for k, v in states.items() if k.startswith("CompreSSMCallback"))
        pending[name] = state["pending"] is not None and bool(state["pending"]["plan"]["edits"])
    assert pending.pop("pending")
    pending.pop("last")
    assert not any(pending.values())


@pytest.mark.parametrize("point", POINTS.values(), ids=POINTS)
def test_resume_is_bitwise_equal(run: Run, point: tuple[str, int, int], tmp_path: Path):
    path = run.checkpoint(*point)
    run.resume(tmp_path, make(run.model.hparams["optimizer"]), path)
