"""The committed page of results still says what the project claims: by its own figures."""

from __future__ import annotations

import re
from pathlib import Path
from statistics import mean

import pytest

from benchmarks.compare.methods_page import Report
from benchmarks.compare.results_page import OTHERS, make_results_page
from benchmarks.compare.tasks import TASKS
from benchmarks.compare.unit import Result

PAGE = Path(__file__).parents[2] / "docs" / "results.md"
LINEAR = ["digits", "delay", "pathfinder", "listops"]


def table(page: str, title: str) -> dict[str, list[list[float]]]:
    """First column -> the numbers in each other cell, of the table under a title."""
    section = page.split(f"## {title}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {
        name: [[float(x) for x in re.findall(r"-?\d+(?:\.\d+)?", cell)] for cell in cells]
        for name, *cells in rows
    }


@pytest.fixture(scope="module")
def page() -> str:
    return PAGE.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def gaps(page: str) -> dict[str, dict[str, list[float]]]:
    """Task -> other arm -> points ahead of it, standard error."""
    found = table(page, "Accuracy against the others")
    return {task: dict(zip(OTHERS, cells, strict=True)) for task, cells in found.items()}


def test_all_tasks_and_five_seeds(page: str) -> None:
    assert list(table(page, "Size and time")) == LINEAR
    assert "Seeds 0, 1, 2, 3, 4;" in page


@pytest.mark.parametrize("task", LINEAR)
def test_as_accurate_within_noise(task: str, gaps: dict) -> None:
    ahead, error = gaps[task]["full"]
    assert ahead >= -error
    ahead, error = gaps[task]["published-as-bare"]
    assert ahead >= -error


def test_ahead_of_small_from_scratch(gaps: dict) -> None:
    for task in ("delay", "pathfinder", "listops"):
        ahead, error = gaps[task]["small-as-bare"]
        assert ahead > 2 * error, task
    assert gaps["delay"]["small-as-bare"][0] >= 15


def test_size_and_time(page: str) -> None:
    found = table(page, "Size and time")
    for task, (_, largest, to_full, to_small, share) in found.items():
        assert largest[0] <= 0.5, task
        assert to_full[0] <= 0.85, task
        assert to_small[0] <= 1.15, task
        assert share[0] < 8, task
    assert mean(cells[0][0] for cells in found.values()) <= 0.25


def test_the_page_is_made_of_the_results() -> None:
    def result(arm: str, seed: int, accuracy: float, states: int, cpu: float) -> Result:
        return Result(
            "digits", seed, arm, None, [states], accuracy, 0.1, [], cpu, full_cpu=10, small_cpu=6,
            analysis=0.3,
        )  # fmt: skip

    results = [
        result(arm, seed, accuracy + 0.01 * seed, states, cpu)
        for arm, accuracy, states, cpu in (
            ("full", 0.9, 128, 10.0), ("bare", 0.92, 16, 7.5), ("small-as-bare", 0.8, 16, 6.0)
        )
        for seed in (0, 1)
    ]  # fmt: skip
    made = make_results_page(Report([TASKS["digits"]], results, "a command", {"torch": "2"}))
    sizes = table(made, "Size and time")["digits"]
    assert [cell[0] for cell in sizes] == [0.12, 0.12, 0.75, 1.25, 4.0]
    ahead = table(made, "Accuracy against the others")["digits"]
    assert ahead[:3] == [[2.0, 0.0], [12.0, 0.0], []]
