from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.common.command import parse
from benchmarks.demo import command as demo
from benchmarks.demo import report as demo_report
from benchmarks.demo import runs as demo_runs
from benchmarks.demo.runs import ARMS, STATE_DIM, ArmRun, Settings

LAYER = "model.blocks.0.layer"


def fake(arm: str, seed: int, after: int, cpu: float, accuracy: float) -> ArmRun:
    before = after if arm == "small" else 128
    return ArmRun(
        "digits",
        arm,
        seed,
        before={LAYER: before},
        after={LAYER: after},
        accuracy=accuracy,
        wall=2 * cpu,
        cpu=cpu,
        dims=[(0, before), (25, after), (50, after)],
        spectra=[(0, [2.0, 1.0]), (25, [2.0]), (50, [3.0])] if arm == "compressed" else [],
        curve=[(0.0, 0.1), (cpu, accuracy)],
        looks=[{"step": 25}] if arm == "compressed" else [],
    )


@pytest.fixture
def runs() -> list[ArmRun]:
    return [
        fake("full", 0, 128, 10, 0.96),
        fake("compressed", 0, 20, 5, 0.95),
        fake("small", 0, 20, 4, 0.90),
        fake("full", 1, 128, 20, 0.98),
        fake("compressed", 1, 22, 12, 0.97),
        fake("small", 1, 22, 8, 0.94),
    ]


def test_rows(runs: list[ArmRun]) -> None:
    rows = demo_report.make_rows(runs)
    assert rows == [
        ("digits", "full", "0.970 ± 0.014", f"{LAYER}: 128", "1"),
        ("digits", "compressed", "0.960 ± 0.014", f"{LAYER}: 128 -> 20/22", "0.55 (0.50 to 0.60)"),
        ("digits", "small", "0.920 ± 0.028", f"{LAYER}: 20/22", "0.40 (0.40 to 0.40)"),
    ]


def test_one_seed_has_no_spread(runs: list[ArmRun]) -> None:
    assert demo_report.make_rows(runs[:3])[0][2] == "0.960 ± 0.000"


def test_the_note_says_what_the_figures_are(runs: list[ArmRun]) -> None:
    note = demo_report.make_note(runs, Settings(seeds=(0, 1)), 60)
    for part in (
        "CPU",
        "standard deviation over seeds 0, 1",
        "median",
        "CompreSSMCallback()",
        "2000 steps in 15.0 s",
    ):
        assert part in note


def test_the_note_names_a_chosen_tolerance(runs: list[ArmRun]) -> None:
    note = demo_report.make_note(runs, Settings(seeds=(0, 1), tolerance=0.1), 60)
    assert "CompreSSMCallback(tolerance=0.1)" in note


def test_report_files(runs: list[ArmRun], tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=100)
    settings = Settings(seeds=(0, 1), output=tmp_path / "new")
    paths = demo_report.write_report(runs, settings, 60, console)
    assert [path.name for path in paths] == ["demo.md", "demo.json", "demo.png"]
    markdown, numbers, picture = paths
    assert markdown.read_text().startswith("| task | arm | test accuracy |")
    assert f"| {LAYER}: 128 -> 20/22 |" in markdown.read_text()
    assert len(json.loads(numbers.read_text())["runs"]) == len(runs)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_spectra_shown_hold_every_size_and_the_end() -> None:
    spectra = [(25 * k, [1.0] * size) for k, size in enumerate([8, 8, 5, 4] + [4] * 30)]
    shown = demo_report.choose_spectra(spectra, limit=6)
    assert [step for step, _ in shown][:3] == [0, 50, 75]
    assert len(shown) == 6
    assert shown[-1] == spectra[-1]
    assert demo_report.choose_spectra(spectra[:1]) == spectra[:1]


def test_command_line() -> None:
    words = ["--tasks", "digits", "--seeds", "3", "4", "--steps", "60", "--tolerance", "0.1"]
    words += ["--output", "here"]
    assert parse(Settings, "demo", None, words) == Settings(
        ("digits",), (3, 4), 60, 0.1, Path("here")
    )
    assert parse(Settings, "demo", None, []) == Settings()
    with pytest.raises(SystemExit):
        demo.main(["--steps", "10"])


def test_a_failure_in_one_arm_ends_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(watcher: demo_runs.Watcher, *_: object) -> None:
        if watcher.run.arm == "compressed":
            raise RuntimeError("broken")

    monkeypatch.setattr(demo_runs, "train_arm", fail)
    with pytest.raises(RuntimeError, match="broken"):
        demo_runs.run_seed("digits", 0, Settings())


@pytest.mark.slow
def test_the_demo_from_end_to_end(tmp_path: Path) -> None:
    assert demo.main(["--seeds", "0", "--steps", "50", "--output", str(tmp_path)]) == 0
    runs = json.loads((tmp_path / "demo.json").read_text())["runs"]
    assert [run["task"] for run in runs] == ["delay"] * 3 + ["digits"] * 3
    for task in (runs[:3], runs[3:]):
        full, compressed, small = sorted(task, key=lambda run: ARMS.index(run["arm"]))
        assert full["after"] == full["before"] == {LAYER: STATE_DIM}
        assert compressed["before"] == {LAYER: STATE_DIM}
        assert compressed["after"][LAYER] < STATE_DIM
        assert small["before"] == small["after"] == compressed["after"]
        assert [event["action"] for event in compressed["looks"]][:1] == ["reduce"]
        assert all(len(run["curve"]) > 1 for run in task)
        assert full["curve"][-1][1] == pytest.approx(full["accuracy"])
    assert all(run["cpu"] > 0 for run in runs)
    assert (tmp_path / "demo.png").exists()
