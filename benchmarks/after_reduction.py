"""Cut finished networks in several ways, train no further, and compare what is left.

`python -m benchmarks.after_reduction` trains the classifier once for each seed (the weights are
kept in the output folder, so that a second call goes on where the first one ended) and then reduces
copies of it. `--task delay` does the same where memory counts and the last step is read out.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

from benchmarks.data.sequences import SequenceDataModule
from benchmarks.models import ClassifierModule
from benchmarks.tables import make_console, markdown_table
from benchmarks.training import (
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


@dataclass(frozen=True)
class Cut:
    """One network after one reduction.

    Attributes:
        seed: Of the network.
        recipe: Of the reduction.
        state_dim: States left; `STATE_DIM` for the network as trained.
        accuracy: On the test set, in [0, 1].
        loss: Cross-entropy on the test set.
    """

    seed: int
    recipe: str
    state_dim: int
    accuracy: float
    loss: float


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
        cuts.append(Cut(seed, "", STATE_DIM, *evaluate(module, sequences, classes)))
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
    if path.exists():
        module.load_state_dict(torch.load(path, weights_only=True))
        return module.eval(), data
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task(f"training, seed {seed}", total=settings.steps)
        callback = EpochProgress(lambda step: progress.update(bar, completed=step))
        make_trainer(settings.steps, [callback]).fit(module, data)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Renamed when it is complete: an interrupted run leaves nothing half written.
    partial = path.with_suffix(".part")
    torch.save(module.state_dict(), partial)
    partial.replace(path)
    return module.eval(), data


def weights_path(settings: Settings, seed: int, module: ClassifierModule, task: Task) -> Path:
    """A name that changes with everything that decides the weights, but for the code itself."""
    recipe = {
        "model": repr(module.model),
        "hparams": dict(module.hparams),
        "pool": task.pool,
        "steps": settings.steps,
        "torch": torch.__version__,
    }
    text = json.dumps(recipe, sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode()).hexdigest()[:10]
    return settings.output / "weights" / f"{settings.task}-seed{seed}-{digest}.pt"


@torch.no_grad()
def evaluate(model: nn.Module, sequences: Tensor, classes: Tensor) -> tuple[float, float]:
    """Accuracy and cross-entropy."""
    model.eval()
    logits = torch.cat([model(batch) for batch in sequences.split(250)])
    accuracy = (logits.argmax(1) == classes).double().mean().item()
    return accuracy, F.cross_entropy(logits, classes).item()


HEADER = ("recipe", "states", "accuracy", "each seed", "points lost", "loss")


def make_rows(cuts: Iterable[Cut]) -> list[tuple[str, ...]]:
    """One row for the networks as trained, then one for each number of states and recipe."""
    groups: dict[tuple[int, str], list[Cut]] = {}
    for cut in cuts:
        groups.setdefault((cut.state_dim, cut.recipe), []).append(cut)
    full = mean(cut.accuracy for cut in groups[STATE_DIM, ""])
    return [
        (
            recipe or "as trained",
            str(state_dim),
            f"{mean(c.accuracy for c in members):.3f}",
            " ".join(f"{c.accuracy:.3f}" for c in members),
            f"{100 * (full - mean(c.accuracy for c in members)):.1f}" if recipe else "",
            f"{mean(c.loss for c in members):.3f}",
        )
        for (state_dim, recipe), members in groups.items()
    ]


def points_lost(cuts: Iterable[Cut], recipe: str, state_dim: int) -> float:
    """Points of mean test accuracy between the networks as trained and cut to `state_dim`."""
    accuracy: dict[int, list[float]] = {STATE_DIM: [], state_dim: []}
    for cut in cuts:
        if (cut.recipe == recipe and cut.state_dim == state_dim) or cut.state_dim == STATE_DIM:
            accuracy[cut.state_dim].append(cut.accuracy)
    return 100 * (mean(accuracy[STATE_DIM]) - mean(accuracy[state_dim]))


def print_table(rows: Iterable[tuple[str, ...]], settings: Settings, console: Console) -> None:
    table = Table(title=f"{settings.task}: right after one reduction, on the CPU")
    for name in HEADER:
        table.add_column(name)
    last = None
    for row in rows:
        if last not in (None, row[1]):
            table.add_section()
        table.add_row(*row)
        last = row[1]
    console.print(table)


def write_results(rows: list[tuple[str, ...]], cuts: list[Cut], settings: Settings) -> list[Path]:
    """Write the table as Markdown and all numbers as JSON."""
    settings.output.mkdir(parents=True, exist_ok=True)
    stem = settings.output / f"after_reduction_{settings.task}"
    markdown, numbers = stem.with_suffix(".md"), stem.with_suffix(".json")
    markdown.write_text(markdown_table(HEADER, rows) + f"\n{note(settings)}\n", encoding="utf-8")
    content = {
        "settings": {**asdict(settings), "output": str(settings.output)},
        "cuts": [asdict(cut) for cut in cuts],
    }
    numbers.write_text(json.dumps(content, indent=1), encoding="utf-8")
    return [markdown, numbers]


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
    print_table(rows, settings, console)
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
