"""What training with a reduction is tested with: axes, what can't be combined, and the cells.

Every pair of values that is possible occurs in some cell (see `pairwise`). A cell is run by
`matrix_run`, and what it ended with is judged by `matrix_checks`. The page "Training" of the
documentation is made from here.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from .pairwise import Cell, Pair, complete, cover, pairs_of, possible_pairs

AXES: dict[str, tuple[str, ...]] = {
    "layer": ("LRU", "S4D", "mamba_ssm Mamba"),
    "strategy": ("single device", "ddp", "ddp_fork", "ddp_spawn"),
    "DDP option": ("none", "static_graph", "gradient_as_bucket_view", "find_unused_parameters"),
    "precision": ("32-true", "64-true", "bf16-mixed", "16-mixed", "bf16-true"),
    "optimizer": (
        "SGD, momentum",
        "AdamW",
        "AdamW, fused",
        "AdamW, amsgrad",
        "RMSprop",
        "Adagrad",
        "Adafactor",
        "Muon",
        "LBFGS",
    ),
    "training": (
        "plain",
        "accumulation",
        "GradientAccumulationScheduler",
        "clipping, norm",
        "clipping, value",
        "frozen parameters",
        "tied layers",
        "parameter groups",
        "manual optimization",
        "several optimizers",
    ),
    "learning rate": ("StepLR by step", "StepLR by epoch", "OneCycleLR"),
    "around": (
        "ModelCheckpoint",
        "EarlyStopping",
        "LearningRateMonitor",
        "TQDMProgressBar, ModelSummary",
        "RichProgressBar, RichModelSummary",
        "ModelPruning of other layers",
        "torch.compile, whole module",
        "torch.compile, child",
    ),
}
AVERAGES = ("EMAWeightAveraging", "StochasticWeightAveraging")

# A spawned process differs from others in how it gets its objects, not in what it then does with
# them; and each spawn imports torch twice.
SPAWN_MEETS = ("layer", "DDP option", "precision")
# What a value costs, for a choice between cells that hold as many new pairs.
COST = {"none": 0.5, "ddp": 3.0, "ddp_fork": 8.0, "ddp_spawn": 100.0, "mamba_ssm Mamba": 4.0}


def obstacle(cell: Mapping[str, str]) -> str | None:
    """Why a cell, or a part of one, can't be; `None` if it can."""
    training, optimizer = cell.get("training", ""), cell.get("optimizer")
    precision, around = cell.get("precision", ""), cell.get("around", "")
    if cell.get("strategy") == "single device" and cell.get("DDP option", "none") != "none":
        return "an option of DDP needs DDP"
    if cell.get("DDP option") == "static_graph" and "ccumulation" in training:
        return "a static graph needs a first batch whose gradients are exchanged"
    if cell.get("strategy") == "ddp_spawn" and around == "torch.compile, whole module":
        return "Lightning can't pickle a compiled module"
    if optimizer == "LBFGS" and "ccumulation" in training:
        return "LBFGS evaluates its closure several times, and each time adds the same gradients"
    if optimizer == "LBFGS" and training == "parameter groups":
        return "LBFGS takes one parameter group"
    if optimizer == "AdamW, fused" and "mixed" in precision and "clipping" in training:
        return "Lightning refuses to clip gradients that a fused optimizer would unscale"
    if around == "StochasticWeightAveraging" and training == "several optimizers":
        return "Lightning averages the weights of one optimizer"
    return None


def is_wanted(pair: Pair) -> bool:
    """Whether a possible pair must occur in a cell."""
    for (axis, value), (other, _) in (pair, pair[::-1]):
        if axis == "strategy" and value == "ddp_spawn":
            return other in SPAWN_MEETS
    return True


def wanted_pairs() -> list[Pair]:
    """Every pair that must occur."""
    return [pair for pair in possible_pairs(AXES, obstacle) if is_wanted(pair)]


@cache
def cells() -> tuple[Cell, ...]:
    """The cells that hold every wanted pair."""
    return tuple(cover(AXES, obstacle, wanted_pairs(), COST))


@cache
def averaged_cells() -> tuple[Cell, ...]:
    """Cells with averaged copies of the weights: each average with every value of every axis."""
    axes = {**AXES, "around": AVERAGES}
    pairs = possible_pairs(axes, obstacle)
    wanted = [pair for pair in pairs if "around" in dict(pair) and is_wanted(pair)]
    return tuple(cover(axes, obstacle, wanted, COST))


def processes(cell: Cell) -> int:
    """How many processes train it."""
    return 1 if cell["strategy"] == "single device" else 2


def key(cell: Cell) -> str:
    """A short name for files and test ids."""
    return "-".join(
        "".join(ch for ch in value if ch.isalnum() or ch == "_") for value in cell.values()
    )


@cache
def quick_cells() -> frozenset[str]:
    """Keys of a few cells that hold every value once or nearly, for `make test`."""
    left = {(axis, value) for axis, values in AXES.items() for value in values}
    quick = []
    for strategy in ("single device", "ddp"):
        for cell in sorted(cells(), key=lambda cell: -len(left & set(cell.items()))):
            new = left & set(cell.items())
            if cell["strategy"] == strategy and new and not _is_heavy(cell):
                quick.append(key(cell))
                left -= new
    return frozenset(quick)


def _is_heavy(cell: Cell) -> bool:
    return "torch.compile" in cell["around"] or cell["layer"] == "mamba_ssm Mamba"


__all__ = [
    "AVERAGES",
    "AXES",
    "averaged_cells",
    "cells",
    "complete",
    "is_wanted",
    "key",
    "obstacle",
    "pairs_of",
    "processes",
    "quick_cells",
    "wanted_pairs",
]
