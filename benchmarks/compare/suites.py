"""Which tasks, arms and seeds go together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

from benchmarks.arms import Arm, all_arms
from benchmarks.compare.methods_page import Report, make_methods_page
from benchmarks.compare.results_page import make_results_page
from benchmarks.compare.tasks import TASKS, CompareTask


@dataclass(frozen=True)
class Suite:
    """One comparison.

    Attributes:
        name: On the command line.
        about: For the help text.
        tasks: In the order of the page.
        seeds: Each fixes initialisation, order of the batches and dropout.
        takes: Whether an arm belongs to it.
        page: Makes its page.
    """

    name: str
    about: str
    tasks: tuple[CompareTask, ...]
    seeds: tuple[int, ...]
    takes: Callable[[Arm], bool]
    page: Callable[[Report], str] = make_methods_page

    def arms(self) -> list[str]:
        """Names of its arms."""
        return [name for name, arm in all_arms().items() if self.takes(arm)]


def _all(*names: str) -> tuple[CompareTask, ...]:
    return tuple(TASKS[name] for name in names)


_USUAL = ("full", "small", "ours")


def _about_bare(arm: Arm) -> bool:
    return "bare" in arm.name


SUITES = {
    suite.name: suite
    for suite in (
        Suite(
            "cpu", "the callback without arguments, its parts, and others at the size it chooses",
            _all("digits", "delay", "pathfinder", "listops"), (0, 1, 2, 3, 4),
            lambda arm: _about_bare(arm) or arm.name in ("full", "defaults"), make_results_page,
        ),
        Suite(
            "methods", "all ways to a small model, at the same sizes; an hour on two cores",
            tuple(TASKS.values()), (0, 1, 2, 3, 4), lambda arm: not arm.choice,
        ),
        Suite(
            "choices", "what the package's defaults are chosen by: variants of ours",
            _all("digits", "delay", "pathfinder", "listops"), (0, 1, 2, 3, 4),
            lambda arm: (arm.choice and not _about_bare(arm)) or arm.name in _USUAL,
        ),
        Suite(
            "smoke", "every arm, one seed, a few steps: whether everything runs",
            tuple(TASKS[name].shortened(50, 4) for name in ("digits", "recall-mamba2")), (0,),
            lambda arm: True,
        ),
    )
}  # fmt: skip


def without_missing(tasks: tuple[CompareTask, ...]) -> tuple[list[CompareTask], list[str]]:
    """Tasks that can be run here, and a line about each that can't."""
    if find_spec("mamba_ssm") is not None:
        return list(tasks), []
    kept = [task for task in tasks if task.kind == "linear"]
    lines = [
        f"{task.name} is left out: it needs mamba-ssm (docs/supported.md says how to install it)"
        for task in tasks
        if task.kind != "linear"
    ]
    return kept, lines
