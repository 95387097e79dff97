"""Cut finished networks in several ways, train no further, and compare what is left.

`python -m benchmarks.after_reduction` trains the classifier once for each seed (the weights are
kept in the output folder, so that a second call goes on where the first one ended) and then reduces
copies of it. `--task delay` does the same where memory counts and the last step is read out.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

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
from benchmarks.common.tables import make_console
from benchmarks.data.sequences import SequenceDataModule
from benchmarks.models.classifier import ClassifierModule
from benchmarks.train.trainer import (
    TASKS,
    EpochProgress,
    Task,
    TaskName,
    build,
    make_trainer,
    quiet,
    use_one_thread,
)
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
        task: One of `TASKS`.
        seeds: Each fixes initialisation, order of the batches and dropout.
        steps: Optimizer steps of every training.
        state_dims: Numbers of states to cut to.
        output: Where weights and results go.
        target: Most points of accuracy that the default may lose at `TARGET_DIM` states.
    """

    task: TaskName = "digits"
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = TASKS["digits"].steps
    state_dims: tuple[int, ...] = (16, 8, 32)
    output: Path = Path("results")
    target: float | None = None


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
        cuts.append(Cut(seed, AS_TRAINED, STATE_DIM, *evaluate(module, sequences, classes)))
        sample = data.tensors("train")[0][: data.batch_size]
        for state_dim in settings.state_dims:
            for recipe, arguments in recipes(data.length).items():
                model = copy.deepcopy(module.model)
                compress(model, state_dim=state_dim, sample=sample, **arguments)
                cuts.append(Cut(seed, recipe, state_dim, *evaluate(model, sequences, classes)))
    return cuts


def trained(
    settings: Settings, seed: int, console: Console
) -> tuple[ClassifierModule, SequenceDataModule]:
    """The network of a seed: from the output folder if it was trained before."""
    task = TASKS[settings.task]
    module, data = build(task, seed, STATE_DIM, D_MODEL)
    path = weights_path(settings, seed, module, task)

    def train() -> None:
        with Progress(console=console, transient=True) as progress:
            bar = progress.add_task(f"training, seed {seed}", total=settings.steps)
            callback = EpochProgress(lambda step: progress.update(bar, completed=step))
            make_trainer(settings.steps, [callback]).fit(module, data)

    load_or_train(path, module, train)
    return module.eval(), data


def weights_path(settings: Settings, seed: int, module: ClassifierModule, task: Task) -> Path:
    """A name that changes with everything that decides the weights, but for the code itself."""
    recipe = {
        "model": repr(module.model),
        "hparams": dict(module.hparams),
        "pool": task.pool,
        "steps": settings.steps,
    }
    return kept_path(settings.output, f"{settings.task}-seed{seed}", recipe)


@torch.no_grad()
def evaluate(model: nn.Module, sequences: Tensor, classes: Tensor) -> tuple[float, float]:
    """Accuracy and cross-entropy."""
    model.eval()
    logits = torch.cat([model(batch) for batch in sequences.split(250)])
    accuracy = (logits.argmax(1) == classes).double().mean().item()
    return accuracy, F.cross_entropy(logits, classes).item()


def write_results(rows: list[tuple[str, ...]], cuts: list[Cut], settings: Settings) -> list[Path]:
    """Write the table as Markdown and all numbers as JSON."""
    content = {**asdict(settings), "output": str(settings.output)}
    stem = settings.output / f"after_reduction_{settings.task}"
    return write_files(stem, rows, cuts, content, note(settings))


def note(settings: Settings) -> str:
    return (
        f"CPU. One LRU block, N={STATE_DIM}, H={D_MODEL}, {settings.steps} steps; no training "
        f"after the cut. Test accuracy and loss: means over seeds "
        f"{', '.join(map(str, settings.seeds))}."
    )


def parse(arguments: Iterable[str] | None = None) -> Settings:
    default = Settings()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.after_reduction",
        description=(__doc__ or "").split("\n", 1)[0],
    )
    parser.add_argument("--task", choices=list(TASKS), default=default.task)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(default.seeds))
    parser.add_argument("--steps", type=int, help="steps of every training (by task)")
    parser.add_argument("--states", type=int, nargs="+", default=list(default.state_dims))
    parser.add_argument("--output", type=Path, default=default.output, help="folder for results")
    parser.add_argument(
        "--target", type=float, help=f"fail if the default loses more points at {TARGET_DIM} states"
    )
    options = parser.parse_args(None if arguments is None else list(arguments))
    steps = TASKS[options.task].steps if options.steps is None else options.steps
    for name, values in (("--steps", [steps]), ("--states", options.states)):
        if min(values) < 1:
            parser.error(f"{name} must be at least 1, got {min(values)}")
    if options.target is not None and TARGET_DIM not in options.states:
        parser.error(f"--target is about {TARGET_DIM} states; add them to --states")
    return Settings(
        options.task,
        tuple(options.seeds),
        steps,
        tuple(options.states),
        options.output,
        options.target,
    )


def main(arguments: Iterable[str] | None = None) -> int:
    settings = parse(arguments)
    console = make_console()
    quiet()
    use_one_thread()
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
