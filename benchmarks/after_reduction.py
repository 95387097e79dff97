"""Cut finished networks in several ways, train no further, and compare what is left.

`python -m benchmarks.after_reduction` trains the classifier once for each seed (the weights are
kept in the output folder, so that a second call goes on where the first one ended) and then reduces
copies of it. `--task delay` does the same where memory counts and the last step is read out.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.common.command import check_least, make_console, parse, prepare
from benchmarks.common.cuts import (
    AS_TRAINED,
    Cut,
    kept_path,
    load_or_train,
    make_rows,
    points_lost,
    print_table,
    write_files,
)
from benchmarks.data.sequences import SequenceDataModule
from benchmarks.models.classification import ClassifierModule, evaluate_classes
from benchmarks.train.trainer import TASKS, Task, TaskName, build, fit_with_bar
from lightning_compressm import compress

STATE_DIM = 128
D_MODEL = 16
PUBLISHED = "complex, infinite (published)"
DEFAULT = "default of the package"
TARGET_DIM = 16


@dataclass(frozen=True)
class Settings:
    """What the command line decides.

    Attributes:
        task: What is classified.
        seeds: Each fixes initialisation, order of the batches and dropout.
        steps: Optimizer steps of every training; the task's own if not given.
        states: Numbers of states to cut to.
        output: Folder of weights and results.
        target: Fail if the default loses more points of accuracy at 16 states.
    """

    task: TaskName = "digits"
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int | None = None
    states: tuple[int, ...] = (16, 8, 32)
    output: Path = Path("results")
    target: float | None = None

    def __post_init__(self) -> None:
        check_least("--steps", 1, [self.planned_steps])
        check_least("--states", 1, self.states)
        if self.target is not None and TARGET_DIM not in self.states:
            raise ValueError(f"--target is about {TARGET_DIM} states; add them to --states")

    @property
    def planned_steps(self) -> int:
        """The task's own, unless others are asked for."""
        return TASKS[self.task].steps if self.steps is None else self.steps


def recipes(length: int) -> dict[str, dict[str, Any]]:
    """Label -> arguments of `compress`, for sequences of `length` steps."""
    return {
        PUBLISHED: {"balance": "complex", "horizon": None},
        "folded, infinite": {"balance": "folded", "horizon": None},
        "real, infinite": {"balance": "real", "horizon": None},
        f"folded, {length} steps": {"balance": "folded", "horizon": length},
        f"real, {length} steps": {"balance": "real", "horizon": length},
        DEFAULT: {},
    }


def run(settings: Settings, console: Console) -> list[Cut]:
    """Train or load the network of every seed and cut copies of it in every way."""
    cuts: list[Cut] = []
    for seed in settings.seeds:
        module, data = trained(settings, seed, console)
        sequences, classes = data.tensors("test")
        cuts.append(Cut(seed, AS_TRAINED, STATE_DIM, *evaluate_classes(module, sequences, classes)))
        sample = data.tensors("train")[0][: data.batch_size]
        for state_dim in settings.states:
            for recipe, arguments in recipes(data.length).items():
                model = copy.deepcopy(module.model)
                compress(model, state_dim=state_dim, sample=sample, **arguments)
                result = evaluate_classes(model, sequences, classes)
                cuts.append(Cut(seed, recipe, state_dim, *result))
    return cuts


def trained(
    settings: Settings, seed: int, console: Console
) -> tuple[ClassifierModule, SequenceDataModule]:
    """The network of a seed: from the output folder if it was trained before."""
    task = TASKS[settings.task]
    module, data = build(task, seed, STATE_DIM, D_MODEL)
    path = weights_path(settings, seed, module, task)

    def train() -> None:
        fit_with_bar(module, data, settings.planned_steps, f"training, seed {seed}", console)

    load_or_train(path, module, train)
    return module.eval(), data


def weights_path(settings: Settings, seed: int, module: ClassifierModule, task: Task) -> Path:
    """A name that changes with everything that decides the weights, but for the code itself."""
    recipe = {
        "model": repr(module.model),
        "hparams": dict(module.hparams),
        "pool": task.pool,
        "steps": settings.planned_steps,
    }
    return kept_path(settings.output, f"{settings.task}-seed{seed}", recipe)


def write_results(rows: list[tuple[str, ...]], cuts: list[Cut], settings: Settings) -> list[Path]:
    """Write the table as Markdown and all numbers as JSON."""
    content = {**asdict(settings), "steps": settings.planned_steps}
    stem = settings.output / f"after_reduction_{settings.task}"
    return write_files(stem, rows, cuts, content, note(settings))


def note(settings: Settings) -> str:
    return (
        f"CPU. One LRU block, N={STATE_DIM}, H={D_MODEL}, {settings.planned_steps} steps; no "
        "training after the cut. Test accuracy and loss: means over seeds "
        f"{', '.join(map(str, settings.seeds))}."
    )


def main(arguments: Iterable[str] | None = None) -> int:
    settings = parse(Settings, "after_reduction", __doc__, arguments)
    console = make_console()
    prepare()
    cuts = run(settings, console)
    rows = make_rows(cuts)
    print_table(rows, f"{settings.task}: right after one reduction, on the CPU", console)
    console.print(note(settings))
    for path in write_results(rows, cuts, settings):
        console.print(f"Wrote {path}")
    if settings.target is None:
        return 0
    lost = points_lost(cuts, DEFAULT, TARGET_DIM)
    console.print(f"the default loses {lost:.1f} points; the target is {settings.target:g}")
    return int(lost > settings.target)


if __name__ == "__main__":
    sys.exit(main())
