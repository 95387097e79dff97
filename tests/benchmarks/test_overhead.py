"""The benchmark of the callback's own cost runs; how much it is, is no business of a test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("rich")

from rich.console import Console

from benchmarks.overhead import command, cuts, steps
from benchmarks.overhead.models import EPOCH, SIZES
from benchmarks.overhead.steps import PHASES, run

STEPS = 8 * EPOCH
SMALL = ["--sizes", "tiny", "--seeds", "2", "--steps", str(STEPS)]


@pytest.fixture(autouse=True)
def _same_threads_afterwards() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("size", ["tiny", "mamba"])
def test_times_every_step_but_the_first_ones_and_those_around_the_look(size: str) -> None:
    callback = run(SIZES[size], 0, STEPS)
    looked = {event["step"] for event in callback.history}
    assert looked == {STEPS // 2}
    for phase in PHASES:
        hooks, steps = callback.hooks[phase], callback.steps[phase]
        assert len(hooks) == len(steps) > 2 * EPOCH - 5
        assert all(0 < hook < step for hook, step in zip(hooks, steps, strict=True))
        assert callback.epochs[phase]
    # Selective layers are listened to as long as a look may come, and no longer.
    during, after = (callback.listened[phase] for phase in PHASES)
    assert all(during) == (size == "mamba")
    assert not any(after)


def test_prints_a_line_for_each_phase(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(SMALL) == 0
    printed = capsys.readouterr().out
    assert all(phase in printed for phase in PHASES)
    assert str(SIZES["tiny"]) in " ".join(printed.split())
    assert "look and swap" in printed


def test_the_history_accounts_for_looks_and_swaps() -> None:
    console = Console(quiet=True)
    found = cuts.measure_cuts(["medium"], 1, STEPS, console)
    assert 0.8 < found["medium"].accounted[0] <= 1


def test_a_missed_target_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = steps.Costs(step=[1.0, 1.0, 1.0], hooks=[0.01, 0.02, 0.4], epochs=[0.1] * 3)
    costs = {("medium", phase): measured for phase in PHASES}
    monkeypatch.setattr(command, "measure", lambda *_: costs)
    monkeypatch.setattr(command, "measure_cuts", lambda *_: {})
    assert command.main(["--sizes", "medium", "--target", "1.9"]) == 1
    assert "above the target" in capsys.readouterr().out
    assert command.main(["--sizes", "medium", "--target", "2"]) == 0


def test_needs_steps_to_time() -> None:
    with pytest.raises(SystemExit):
        command.main(["--steps", "10"])
