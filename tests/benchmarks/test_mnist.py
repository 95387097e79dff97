"""Sequential MNIST by one command: the published recipe, an interrupted run, the table."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.data import SMNISTDataModule
from benchmarks.mnist import command, run, steps
from benchmarks.mnist.arms import ARMS, build
from benchmarks.mnist.run import Result
from benchmarks.speed.timing import Rounds

from .tiny_files import write_mnist

STEPS = 30


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    sums = write_mnist(tmp_path / "data", train=112, test=20, packed=True)
    monkeypatch.setattr(SMNISTDataModule, "checksums", sums)
    monkeypatch.setattr(run, "CHUNK", 5)
    return tmp_path / "data"


def test_the_arms_are_the_published_recipe(root: Path) -> None:
    module, data = build(ARMS["full"], 0, root)
    assert (module.lr, module.ssm_lr_factor, module.schedule) == (4e-4, 1.0, "constant")
    assert data.batch_size == 50
    options = ARMS["published2"].options
    assert options is not None
    assert options(200_000) == {
        "tolerance": 0.02, "window": (0, 20_000), "every_n_steps": 10_000, "balance": "complex",
        "horizon": None,
    }  # fmt: skip


@pytest.mark.slow
def test_an_interrupted_run_goes_on(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run.train("tau4", 0, STEPS, root, tmp_path / "whole")
    after_step = run._Clock.after_step

    def fails(clock, trainer, module) -> None:
        after_step(clock, trainer, module)
        if trainer.global_step == 17:
            raise RuntimeError("the machine went down")

    with monkeypatch.context() as patch:
        patch.setattr(run._Clock, "after_step", fails)
        with pytest.raises(RuntimeError, match="went down"):
            run.train("tau4", 0, STEPS, root, tmp_path / "parts")
    parts = run.train("tau4", 0, STEPS, root, tmp_path / "parts")
    assert [chunk[:2] for chunk in parts.chunks] == [chunk[:2] for chunk in whole.chunks]
    assert [at for at, _, _ in whole.chunks] == list(range(5, STEPS + 1, 5))
    assert [e["new_state_dim"] for e in parts.history] == [
        e["new_state_dim"] for e in whole.history
    ]
    assert [at for at, _ in parts.validation] == [at for at, _ in whole.validation]
    monkeypatch.setattr(run, "build", None)  # what is done is read, not trained again
    again = run.train("tau4", 0, STEPS, root, tmp_path / "whole")
    assert again.accuracy == whole.accuracy
    assert command.rows_of([again])[0][0] == "energy rule, 4%"


def test_steps_of_what_is_left_are_compared(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "ROUNDS", Rounds(least=2, most=2, seconds=1))
    results = [run.train(name, 0, STEPS, root, tmp_path) for name in ("full", "small13")]

    def last(result: Result) -> Path:
        return run.folder_of(tmp_path, result.arm, 0, STEPS) / "last.ckpt"

    ratios = steps.step_ratios(results, root, last)
    assert ratios["full"] == (1.0, 1.0, 1.0)
    middle, low, high = ratios["small13"]
    assert 0 < low <= middle <= high


def test_the_table_compares_with_full() -> None:
    full = Result("full", 0, 200, [(100, 256, 4.0), (200, 256, 4.0)], accuracy=0.97)
    cut = Result("tau2", 0, 200, [(100, 256, 4.0), (200, 28, 1.0)], accuracy=0.9651)
    cut.history = [{"new_state_dim": n, "seconds": 0.05} for n in (100, 28)]
    first, second = command.rows_of([cut, full], {"tau2": (4.0, 3.5, 4.25)})
    assert first == ("full", "256", "97.0", "", "97.3", "1.00", "", "")
    assert second == (
        "energy rule, 2%", "256 → 100 → 28", "96.5", "", "96.9", "0.62",
        "4.00 (3.50 to 4.25)", "2.0%",
    )  # fmt: skip
