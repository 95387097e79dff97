"""What remains of a network after a cut: rows of a table, and the files that hold them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.console import Console
from torch import nn

from benchmarks.common.command import write_numbers
from benchmarks.common.tables import markdown_table, rich_table

HEADER = ("recipe", "states", "accuracy", "each seed", "points lost", "loss")
AS_TRAINED = ""


@dataclass(frozen=True)
class Cut:
    """One network after one reduction.

    Attributes:
        seed: Of the network.
        recipe: Of the reduction; `AS_TRAINED` for none.
        state_dim: States left.
        accuracy: On the test set, in [0, 1].
        loss: Cross-entropy on the test set.
    """

    seed: int
    recipe: str
    state_dim: int
    accuracy: float
    loss: float


def select(cuts: Iterable[Cut], recipe: str, state_dim: int | None = None) -> list[Cut]:
    """Those of one recipe, and of one size where it is given."""
    return [c for c in cuts if c.recipe == recipe and state_dim in (None, c.state_dim)]


def make_rows(cuts: Sequence[Cut]) -> list[tuple[str, ...]]:
    """One row for each number of states and recipe, in the order in which they first came."""
    groups: dict[tuple[int, str], list[Cut]] = {}
    for cut in cuts:
        groups.setdefault((cut.state_dim, cut.recipe), []).append(cut)
    full = mean(cut.accuracy for cut in select(cuts, AS_TRAINED))
    return [
        (
            recipe or "as trained",
            str(state_dim),
            f"{mean(c.accuracy for c in members):.3f}",
            " ".join(f"{c.accuracy:.3f}" for c in members),
            f"{100 * (full - mean(c.accuracy for c in members)):.1f}" if recipe else "",
            f"{mean(c.loss for c in members):.4f}",
        )
        for (state_dim, recipe), members in groups.items()
    ]


def points_lost(cuts: Sequence[Cut], recipe: str, state_dim: int) -> float:
    """Points of mean test accuracy between the networks as trained and cut to `state_dim`."""
    full, cut = select(cuts, AS_TRAINED), select(cuts, recipe, state_dim)
    return 100 * (mean(c.accuracy for c in full) - mean(c.accuracy for c in cut))


def print_table(rows: Sequence[tuple[str, ...]], title: str, console: Console) -> None:
    """A section for each number of states."""
    table = rich_table(HEADER, rows, words=len(HEADER), title=title)
    for row, (this, following) in zip(table.rows, pairwise(rows), strict=False):
        row.end_section = this[1] != following[1]
    console.print(table)


def write_files(
    stem: Path,
    rows: Iterable[tuple[str, ...]],
    cuts: Iterable[Cut],
    settings: Mapping[str, Any],
    note: str,
) -> list[Path]:
    """Write the table as Markdown and all numbers as JSON, named after `stem`."""
    content = {"settings": settings, "cuts": [asdict(cut) for cut in cuts]}
    numbers = write_numbers(stem.with_suffix(".json"), content)
    markdown = stem.with_suffix(".md")
    markdown.write_text(markdown_table(HEADER, rows) + f"\n{note}\n", encoding="utf-8")
    return [markdown, numbers]


def kept_path(folder: Path, name: str, recipe: Mapping[str, Any]) -> Path:
    """Where weights lie: the name changes with everything in `recipe` and with torch."""
    text = json.dumps({**recipe, "torch": torch.__version__}, sort_keys=True, default=str)
    return folder / "weights" / f"{name}-{sha256(text.encode()).hexdigest()[:10]}.pt"


def load_or_train(path: Path, module: nn.Module, train: Callable[[], None]) -> None:
    """Fill the module with the weights at `path`; where there are none, train and keep them."""
    if path.exists():
        module.load_state_dict(torch.load(path, weights_only=True))
        return
    train()
    path.parent.mkdir(parents=True, exist_ok=True)
    # Renamed when it is complete: an interrupted run leaves nothing half written.
    partial = path.with_suffix(".part")
    torch.save(module.state_dict(), partial)
    partial.replace(path)
