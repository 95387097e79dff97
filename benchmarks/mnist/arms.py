"""The arms: full size, cut by the published rule, small from scratch, and the bare callback."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.data import SMNISTDataModule
from benchmarks.data.sequences import SequenceDataModule
from benchmarks.models.classification import ClassifierModule
from benchmarks.models.classifier import SequenceClassifier
from benchmarks.train.published import TASKS
from lightning_compressm import CompreSSMCallback
from lightning_compressm.nn import LRU

PUBLISHED = TASKS["smnist"]
D_MODEL, D_STATE, _ = PUBLISHED.full.sizes
# What the published runs end with at 1%, 2% and 4%, and what their small twins have.
SMALL_SIZES = (47, 28, 13)


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        name: Key in files and on the command line.
        label: In tables.
        d_state: States at the start.
        options: Arguments of the callback; None for no callback.
        published: Reported test accuracy in percent, if there is one (arXiv 2510.02823).
    """

    name: str
    label: str
    d_state: int = D_STATE
    options: Callable[[int], dict[str, Any]] | None = None
    published: float | None = field(default=None, kw_only=True)

    def callback(self, steps: int) -> CompreSSMCallback | None:
        """The arm's own callback in a run of so many steps."""
        return None if self.options is None else CompreSSMCallback(**self.options(steps))


def _energy(tolerance: float, steps: int) -> dict[str, Any]:
    """The energy rule with the package's defaults: five looks in the first tenth."""
    every = max(1, steps // 50)
    return {"tolerance": tolerance, "window": (0, 5 * every), "every_n_steps": every}


def _published(tolerance: float, steps: int) -> dict[str, Any]:
    """As published: complex Gramians without horizon, two looks in the first tenth."""
    full = PUBLISHED.full
    window = tuple(max(1, step * steps // full.steps) if step else 0 for step in full.window)
    every = max(1, full.every * steps // full.steps)
    return {
        "tolerance": tolerance,
        "window": window,
        "every_n_steps": every,
        "balance": "complex",
        "horizon": None,
    }


def _bare(steps: int) -> dict[str, Any]:
    return {}


ARMS = {
    arm.name: arm
    for arm in (
        Arm("full", "full", published=97.3),
        Arm("tau2", "energy rule, 2%", options=partial(_energy, 0.02), published=96.9),
        Arm("bare", "`CompreSSMCallback()`", options=_bare),
        Arm("small28", "28 states from scratch", 28),
        Arm("published2", "as published, 2%", options=partial(_published, 0.02), published=96.9),
        Arm("tau4", "energy rule, 4%", options=partial(_energy, 0.04), published=95.9),
        Arm("small13", "13 states from scratch", 13),
        Arm("tau1", "energy rule, 1%", options=partial(_energy, 0.01), published=96.9),
        Arm("small47", "47 states from scratch", 47),
    )
}


def build(
    arm: Arm, seed: int, root: Path, make_data: Callable[..., SequenceDataModule] = SMNISTDataModule
) -> tuple[ClassifierModule, SequenceDataModule]:
    """Network and data by the published recipe; the seed fixes both and dropout to come."""
    torch.manual_seed(seed)
    data = make_data(root=str(root), batch_size=PUBLISHED.full.data[1]["batch_size"], seed=seed)
    network = SequenceClassifier(
        1,
        PUBLISHED.classes,
        d_model=D_MODEL,
        d_state=arm.d_state,
        layer=partial(LRU, r_min=0.9, r_max=0.999),
        dropout=PUBLISHED.dropout,
    )
    module = ClassifierModule(network, PUBLISHED.classes, lr=PUBLISHED.full.lr, **PUBLISHED.recipe)
    return module, data
