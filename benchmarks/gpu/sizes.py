"""How big everything is that is timed: as published on a card, tiny in a rehearsal."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.speed.suites import StepCase
from benchmarks.speed.timing import Rounds


@dataclass(frozen=True)
class DualCase:
    """A stack of Mamba-2 blocks, cut from states[0] to each of the others."""

    blocks: int
    width: int
    batch: int
    length: int
    states: tuple[int, ...]
    head: int = 64


@dataclass(frozen=True)
class LookCase:
    """One layer, looked at and cut; `on_cpu`: there as well, where that takes seconds at most."""

    layer: str
    width: int
    states: int
    kept: int
    batch: int = 4
    length: int = 256
    on_cpu: bool = True


@dataclass(frozen=True)
class Sizes:
    """All of it; `rounds` is how often everything is measured."""

    steps: tuple[StepCase, ...]
    dual: DualCase
    looks: tuple[LookCase, ...]
    rounds: Rounds


# Steps of an optimizer at the sizes of the published runs, and at N that these ended with.
CARD = Sizes(
    steps=(
        StepCase("LRU", 50, 784, 8, (256, 47, 28, 13), 0.1, "sequential MNIST"),
        StepCase("LRU", 50, 1024, 512, (384, 161, 93, 57), 0.1, "sequential CIFAR-10"),
        StepCase("LRU", 32, 2048, 128, (256, 64, 16), 0.0, "ListOps"),
        StepCase("S5", 50, 1024, 512, (384, 93), 0.1, "sequential CIFAR-10"),
        StepCase("S4D", 50, 1024, 512, (64, 16, 4), 0.1, "sequential CIFAR-10"),
        StepCase("Mamba", 64, 256, 256, (128, 12), 0.0, "associative recall"),
    ),
    dual=DualCase(6, 768, 8, 2048, (128, 64, 32, 16)),
    looks=(
        LookCase("LRU", 8, 256, 28),
        LookCase("LRU", 512, 384, 93),
        LookCase("S5", 512, 384, 93),
        LookCase("S4D", 128, 64, 16),
        LookCase("Mamba", 64, 128, 12),
        LookCase("Mamba-2", 256, 128, 32, on_cpu=False),
    ),
    rounds=Rounds(3, 9, 40),
)

REHEARSAL = Sizes(
    steps=(
        StepCase("LRU", 2, 20, 2, (8, 3), 0.1, "rehearsal"),
        StepCase("LRU", 2, 20, 16, (8, 3), 0.0, "rehearsal"),
        StepCase("S5", 2, 20, 16, (8, 3)),
        StepCase("S4D", 2, 20, 4, (8, 3)),
        StepCase("Mamba", 2, 20, 4, (8, 3)),
    ),
    dual=DualCase(1, 16, 2, 20, (8, 4), head=8),
    looks=(
        LookCase("LRU", 4, 16, 4),
        LookCase("S5", 4, 16, 4),
        LookCase("S4D", 4, 8, 3),
        LookCase("Mamba", 4, 8, 3),
        LookCase("Mamba-2", 8, 8, 3),
    ),
    rounds=Rounds(2, 2, 0),
)
