"""Train nets of Mamba layers to recall, cut copies of them, and train those a little more."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from rich.console import Console
from torch import nn

from benchmarks.common.command import check_least, one_of
from benchmarks.common.cuts import AS_TRAINED, Cut, kept_path, load_or_train
from benchmarks.data import MQARDataModule
from benchmarks.models.language import Kind, LanguageModel, RecallModule, evaluate_recall
from benchmarks.train.trainer import fit_with_bar
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
OTHERS = tuple(name for name in CRITERIA if name != DEFAULT)
CALIBRATION_BATCHES = 8
CLIP = 1.0
TARGET_DIM = 16


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
        kind: Of the layers.
        seeds: Each fixes initialisation and the order of the batches.
        steps: Optimizer steps of every training; the kind's own if not given.
        states: Numbers of states to cut to.
        output: Folder of weights and results.
        criteria: Compare the default with these.
        target: Fail if at 16 states mamba1 keeps less than 0.95 of its accuracy, or mamba2's loss
            grows by more than a factor of 1.15.
    """

    kind: Literal["mamba1", "mamba2", "both"] = "both"
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int | None = None
    states: tuple[int, ...] = (TARGET_DIM, 6)
    output: Path = Path("results")
    criteria: tuple[str, ...] = one_of(OTHERS, OTHERS)
    target: bool = False

    def __post_init__(self) -> None:
        check_least("--steps", 1, [] if self.steps is None else [self.steps])
        check_least("--states", 1, self.states)
        if self.target and TARGET_DIM not in self.states:
            raise ValueError(f"--target is about {TARGET_DIM} states; add them to --states")

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """One after the other."""
        return KINDS if self.kind == "both" else (self.kind,)


@dataclass(frozen=True)
class Sizes:
    """Of the networks.

    Attributes:
        d_model: Channels.
        d_state: States as trained.
        head_dim: Channels of a head; Mamba-2 only.
    """

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
        sizes: Of the networks.
        cuts: Filled by `measure`.
    """

    kind: Kind
    settings: Settings
    console: Console
    sizes: Sizes = Sizes()
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
            for state_dim in self.settings.states:
                self._cut_each_way(module.model, data, seed, state_dim)
        # By size, so that a table has one section for each.
        self.cuts.sort(key=lambda cut: -cut.state_dim)
        return self.cuts

    def trained(self, seed: int) -> tuple[RecallModule, MQARDataModule]:
        """The network of a seed: from the output folder if it was trained before."""
        recipe = self.recipe
        torch.manual_seed(seed)
        data = self._data(seed)
        model = LanguageModel(recipe.n_tokens, self.kind, **asdict(self.sizes))
        module = RecallModule(model, lr=recipe.lr)
        decisive = {
            "model": repr(model),
            "hparams": dict(module.hparams),
            "recipe": asdict(recipe),
            "steps": self.steps,
            "batch_size": data.batch_size,
            "clip": CLIP,
        }
        path = kept_path(self.settings.output, f"mqar-{self.kind}-seed{seed}", decisive)
        label = f"seed {seed}: training"
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
        fit_with_bar(module, data, steps, f"{self.kind}, {label}", self.console, CLIP)

    def _cut_each_way(
        self, model: LanguageModel, data: MQARDataModule, seed: int, state_dim: int
    ) -> None:
        tokens, _ = data.tensors("train")
        sample = list(tokens[: CALIBRATION_BATCHES * data.batch_size].split(data.batch_size))
        for name in (DEFAULT, *self.settings.criteria):
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
        self._fit(module, order, max(1, self.steps // 10), f"seed {seed}: going on")
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
        self.cuts.append(Cut(seed, recipe, state_dim or self.sizes.d_state, *result))
