"""The step-time benchmark runs; what it measures is no business of a test."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("rich")

from benchmarks import step_ratio

OPTIONS = {"large": 4, "small": 2, "batch": 2, "length": 9, "width": 2, "repeats": 2, "steps": 1}
SMALL = [f"--{name}={value}" for name, value in OPTIONS.items()]


@pytest.fixture(autouse=True)
def _same_threads_afterwards():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_prints_both_clocks(capsys: pytest.CaptureFixture[str]):
    assert step_ratio.main(SMALL) == 0
    printed = capsys.readouterr().out
    assert "median" in printed
    assert "cpu" in printed
    assert "wall" in printed


def test_missed_target_fails(capsys: pytest.CaptureFixture[str]):
    assert step_ratio.main([*SMALL, "--target", "1e9"]) == 1
    assert "below the target" in capsys.readouterr().out


def test_needs_repeats():
    with pytest.raises(SystemExit):
        step_ratio.main(["--repeats", "1"])
