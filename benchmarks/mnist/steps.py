"""How much faster the networks that are left train: steps of all of them, taken in turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from benchmarks.mnist.arms import ARMS, build
from benchmarks.mnist.run import Result
from benchmarks.speed.timing import Rounds, interleave, local
from lightning_compressm import load_compressed

ROUNDS = Rounds(least=9, most=9, seconds=60)


def step_ratios(
    results: Sequence[Result], root: Path, checkpoint: Callable[[Result], Path]
) -> dict[str, tuple[float, float, float]]:
    """A step of the full network over one of an arm's in the end: median, smallest, largest.

    Args:
        results: Of one seed, the full network's among them.
        root: Folder with MNIST/raw.
        checkpoint: Where an arm's last weights are.
    """
    steps = {result.arm: _step(result, root, checkpoint(result)) for result in results}
    found = interleave({name: local(step, 1) for name, step in steps.items()}, ROUNDS)
    ratios = {
        name: [full / own for full, own in zip(found["full"], times, strict=True)]
        for name, times in found.items()
    }
    return {name: (median(r), min(r), max(r)) for name, r in ratios.items()}


def _step(result: Result, root: Path, checkpoint: Path) -> Callable[[], None]:
    """One training step on one batch of the training data."""
    module, data = build(ARMS[result.arm], result.seed, root)
    load_compressed(module, checkpoint)
    data.setup("fit")
    sequences, classes = (tensor[: data.batch_size] for tensor in data.tensors("train"))
    optimizer = torch.optim.AdamW(module.parameters(), lr=module.lr, weight_decay=0.0)
    return partial(_train, module.train(), optimizer, sequences, classes)


def _train(
    module: nn.Module, optimizer: torch.optim.Optimizer, sequences: Tensor, classes: Tensor
) -> None:
    optimizer.zero_grad()
    nn.functional.cross_entropy(module(sequences), classes).backward()
    optimizer.step()
