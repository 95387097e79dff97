"""Cut Mamba layers that recall pairs by their states, by every criterion, and compare.

`python -m benchmarks.mqar` trains a net of two layers for each kind and seed (the weights are kept
in the output folder, so that a second call goes on where the first one ended), cuts copies of it,
and trains the cut ones and the uncut one for a tenth of the steps more. It needs mamba-ssm.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import lightning as L
import torch
from rich.console import Console
from rich.progress import Progress
from torch import nn

from benchmarks.common.cuts import (
    AS_TRAINED,
    Cut,
    kept_path,
    load_or_train,
    make_rows,
    print_table,
    select,
    write_files,
)
from benchmarks.common.tables import make_console
from benchmarks.data import MQARDataModule
from benchmarks.models.language import Kind, LanguageModel, RecallModule, evaluate_recall
from benchmarks.train.trainer import StepProgress, make_trainer, quiet, use_one_thread
from lightning_compressm import compress

KINDS: tuple[Kind, ...] = ("mamba1", "mamba2")
DEFAULT = "default of the package"
LATER = ", a tenth later"
# Every recipe cuts to the same size: none may keep more states to stay near the old output.
UNLIMITED: dict[str, Any] = {"max_output_error": None}
CRITERIA: dict[str, dict[str, Any]] = {
    DEFAULT: {},
    "averaged_lti": {"criterion": "averaged_lti", "refit": False},
    "empirical": {"criterion": "empirical", "refit": False},
    "greedy": {"criterion": "greedy", "refit": False},
    "random": {"criterion": "random", "refit": False},
    "smallest": {"criterion": "smallest", "refit": False},
}
CALIBRATION_BATCHES = 8
CLIP = 1.0
TARGET_DIM = 16
KEPT_ACCURACY = 0.95
LOSS_RATIO = 1.15


@dataclass(frozen=True)
class Recipe:
    """How one kind is trained: as much to recall as it learns in minutes on one core.

    Attributes:
        n_tokens: Size of the vocabulary.
        pairs: Pairs to recall.
        length: Steps of a sequence.
        lr: Peak learning rate.
        steps: Optimizer steps.
    """

    n_tokens: int
    pairs: int
    length: int
    lr: float
    steps: int


RECIPES: dict[Kind, Recipe] = {
    "mamba1": Recipe(n_tokens=32, pairs=8, length=24, lr=5e-3, steps=2000),
    "mamba2": Recipe(n_tokens=32, pairs=8, length=24, lr=3e-3, steps=1000),
}


@dataclass(frozen=True)
class Settings:
    """What the command line decides.

    Attributes:
        kinds: Of the layers.
        seeds: Each fixes initialisation and the order of the batches.
        steps: Optimizer steps of every training; None for the kind's own.
        state_dims: Numbers of states to cut to.
        output: Where weights and results go.
        criteria: Keys of `CRITERIA`.
        check: Fail where a kind misses its target.
        d_model: Channels of the network.
        d_state: States as trained.
        head_dim: Channels of a head; Mamba-2 only.
    """

    kinds: tuple[Kind, ...] = KINDS
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int | None = None
    state_dims: tuple[int, ...] = (TARGET_DIM, 6)
    output: Path = Path("results")
    criteria: tuple[str, ...] = tuple(CRITERIA)
    check: bool = False
    d_model: int = 64
    d_state: int = 64
    head_dim: int = 32


@dataclass
class Run:
    """One kind: its recipe, the console, and what has been measured.

    Attributes:
        kind: Of the layers.
        settings: From the command line.
        console: For the progress.
        cuts: Filled by `measure`.
    """

    kind: Kind
    settings: Settings
    console: Console
    cuts: list[Cut] = field(default_factory=list)

    @property
    def recipe(self) -> Recipe:
        return RECIPES[self.kind]

    @property
    def steps(self) -> int:
        return self.settings.steps or self.recipe.steps

    def measure(self) -> list[Cut]:
        """Train or load every seed's network, cut copies of it and train those a little."""
        for seed in self.settings.seeds:
            module, data = self.trained(seed)
            self._note(module.model, data, seed, AS_TRAINED)
            self._note(self._continued(module.model, data, seed), data, seed, "uncut" + LATER)
            for state_dim in self.settings.state_dims:
                self._cut_each_way(module.model, data, seed, state_dim)
        # By size, so that a table has one section for each.
        self.cuts.sort(key=lambda cut: -cut.state_dim)
        return self.cuts

    def trained(self, seed: int) -> tuple[RecallModule, MQARDataModule]:
        """The network of a seed: from the output folder if it was trained before."""
        recipe, settings = self.recipe, self.settings
        torch.manual_seed(seed)
        data = self._data(seed)
        sizes = (settings.d_model, settings.d_state)
        model = LanguageModel(recipe.n_tokens, self.kind, *sizes, head_dim=settings.head_dim)
        module = RecallModule(model, lr=recipe.lr)
        decisive = {
            "model": repr(model),
            "hparams": dict(module.hparams),
            "recipe": asdict(recipe),
            "steps": self.steps,
            "batch_size": data.batch_size,
            "clip": CLIP,
        }
        path = kept_path(settings.output, f"mqar-{self.kind}-seed{seed}", decisive)
        label = f"{self.kind}, seed {seed}: training"
        load_or_train(path, module, lambda: self._fit(module, data, self.steps, label))
        return module, data

    def _data(self, seed: int) -> MQARDataModule:
        recipe = self.recipe
        data = MQARDataModule(
            seed=seed, n_tokens=recipe.n_tokens, pairs=recipe.pairs, length=recipe.length
        )
        data.setup()
        return data

    def _fit(self, module: L.LightningModule, data: MQARDataModule, steps: int, label: str) -> None:
        with Progress(console=self.console, transient=True) as progress:
            bar = progress.add_task(label, total=steps)
            callback = StepProgress(lambda step: progress.update(bar, completed=step))
            make_trainer(steps, [callback], clip=CLIP).fit(module, data)

    def _cut_each_way(
        self, model: LanguageModel, data: MQARDataModule, seed: int, state_dim: int
    ) -> None:
        tokens, _ = data.tensors("train")
        sample = list(tokens[: CALIBRATION_BATCHES * data.batch_size].split(data.batch_size))
        for name in self.settings.criteria:
            small = copy.deepcopy(model)
            self.console.log(f"{self.kind}, seed {seed}: {name}, {state_dim} states")
            compress(small, state_dim=state_dim, sample=sample, **UNLIMITED, **CRITERIA[name])
            self._note(small, data, seed, name, state_dim)
            if name == DEFAULT:
                small = self._continued(small, data, seed)
                self._note(small, data, seed, name + LATER, state_dim)

    def _continued(self, model: LanguageModel, data: MQARDataModule, seed: int) -> LanguageModel:
        """A copy trained for a tenth of the steps more, with a fifth of the learning rate."""
        module = RecallModule(copy.deepcopy(model).train(), lr=self.recipe.lr / 5)
        # Another order of batches than the one before, the same for every copy.
        order = self._data(seed + 1000)
        self._fit(module, order, max(1, self.steps // 10), f"{self.kind}, seed {seed}: going on")
        return module.model

    def _note(
        self,
        model: nn.Module,
        data: MQARDataModule,
        seed: int,
        recipe: str,
        state_dim: int | None = None,
    ) -> None:
        result = evaluate_recall(model, *data.tensors("test"))
        self.cuts.append(Cut(seed, recipe, state_dim or self.settings.d_state, *result))


def note(run: Run) -> str:
    recipe, settings = run.recipe, run.settings
    return (
        f"CPU. Two {run.kind} layers, N={settings.d_state}, H={settings.d_model}; {recipe.pairs} "
        f"pairs in {recipe.length} steps, {recipe.n_tokens} tokens; {run.steps} steps of training. "
        f"Rows but the default: without refit. Every row with max_output_error=None, so that none "
        f"keeps more states than it shows. Test accuracy and loss over all queries: means over "
        f"seeds {', '.join(map(str, settings.seeds))}."
    )


def verdict(kind: Kind, cuts: Sequence[Cut]) -> tuple[bool, str]:
    """Whether the default meets the kind's target at `TARGET_DIM` states, and a line about it."""
    full, cut = select(cuts, AS_TRAINED), select(cuts, DEFAULT, TARGET_DIM)
    if kind == "mamba1":
        kept = mean(c.accuracy for c in cut) / mean(c.accuracy for c in full)
        return kept >= KEPT_ACCURACY, (
            f"mamba1: {kept:.1%} of the accuracy kept; the target is {KEPT_ACCURACY:.0%}"
        )
    ratio = mean(c.loss for c in cut) / mean(c.loss for c in full)
    return ratio <= LOSS_RATIO, (
        f"mamba2: {ratio:.2f} times the loss of the uncut; the target is {LOSS_RATIO:g}"
    )


def parse(arguments: Iterable[str] | None = None) -> Settings:
    default = Settings()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.mqar", description=(__doc__ or "").split("\n", 1)[0]
    )
    parser.add_argument("--kind", choices=[*KINDS, "both"], default="both")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(default.seeds))
    parser.add_argument("--steps", type=int, help="steps of every training (by kind)")
    parser.add_argument("--states", type=int, nargs="+", default=list(default.state_dims))
    parser.add_argument("--output", type=Path, default=default.output, help="folder for results")
    parser.add_argument(
        "--criteria",
        nargs="+",
        choices=[name for name in CRITERIA if name != DEFAULT],
        default=[name for name in CRITERIA if name != DEFAULT],
        help="compare the default with these",
    )
    parser.add_argument(
        "--target",
        action="store_true",
        help=f"fail if at {TARGET_DIM} states mamba1 keeps less than {KEPT_ACCURACY:g} of its "
        f"accuracy, or mamba2's loss grows by more than a factor of {LOSS_RATIO:g}",
    )
    options = parser.parse_args(None if arguments is None else list(arguments))
    for name, values in (
        ("--steps", [1 if options.steps is None else options.steps]),
        ("--states", options.states),
    ):
        if min(values) < 1:
            parser.error(f"{name} must be at least 1, got {min(values)}")
    if options.target and TARGET_DIM not in options.states:
        parser.error(f"--target is about {TARGET_DIM} states; add them to --states")
    return Settings(
        kinds=KINDS if options.kind == "both" else (options.kind,),
        seeds=tuple(options.seeds),
        steps=options.steps,
        state_dims=tuple(options.states),
        output=options.output,
        criteria=(DEFAULT, *options.criteria),
        check=options.target,
    )


def main(arguments: Iterable[str] | None = None) -> int:
    settings = parse(arguments)
    console = make_console()
    quiet()
    use_one_thread()
    missed = 0
    for kind in settings.kinds:
        run = Run(kind, settings, console)
        cuts = run.measure()
        rows = make_rows(cuts)
        print_table(rows, f"{kind}: recall right after one cut, on the CPU", console)
        console.print(note(run))
        stem = settings.output / f"mqar_{kind}"
        for path in write_files(stem, rows, cuts, asdict(settings), note(run)):
            console.print(f"Wrote {path}")
        if settings.check:
            met, line = verdict(kind, cuts)
            console.print(line)
            missed += not met
    return int(missed > 0)
