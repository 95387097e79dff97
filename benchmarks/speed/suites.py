"""How big everything is: sizes of the published models, and smaller ones for a quick look."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.speed.timing import Rounds


@dataclass(frozen=True)
class StepCase:
    """Training steps of one kind of block at several numbers of states.

    Attributes:
        layer: "LRU", "S4D", "S5", "Mamba" or "Mamba-2".
        batch, length, width: B, L and H.
        states: N, descending: the first one is what the others are compared with.
        dropout: Of the block.
        name: What the sizes stand for.
        gains: Pairs of N and how many times less a step has to take than one with the largest N;
            such a step is also to take at most `NEAR_FLOOR` times that of a block without states.
    """

    layer: str
    batch: int
    length: int
    width: int
    states: tuple[int, ...]
    dropout: float = 0.0
    name: str = ""
    gains: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class LayerCase:
    """The recurrence alone; `target` is how many times the published layer has to be slower."""

    batch: int
    length: int
    width: int
    states: int
    target: float | None = None


@dataclass(frozen=True)
class SelectiveCase:
    """A Mamba layer; states[0] for the scan, and states[0] against states[-1] for whole blocks.

    `target` is how many times transformers' slow path has to be slower than our scan.
    """

    batch: int
    length: int
    width: int
    states: tuple[int, ...]
    target: float | None = None


@dataclass(frozen=True)
class ShareCase:
    """A whole training run, for the share of it that the looks take."""

    blocks: int
    states: int
    width: int
    length: int
    batch: int
    measured_batch: int
    steps: int
    looks: int
    target: float | None = None


@dataclass(frozen=True)
class AnalysisCase:
    """One layer to be analysed and reduced to half its states; `pymor`: by pyMOR as well."""

    states: int
    width: int
    pymor: bool = False
    target: float | None = None


@dataclass(frozen=True)
class Suite:
    """All sizes and how often they are measured; of `penalties`, states[0] is penalized."""

    steps: tuple[StepCase, ...]
    layers: tuple[LayerCase, ...]
    selective: tuple[SelectiveCase, ...]
    analysis: tuple[AnalysisCase, ...]
    share: ShareCase
    memory: tuple[LayerCase, ...]
    penalties: tuple[StepCase, ...]
    rounds: Rounds
    seeds: int
    mamba_ssm: bool


# What a reduced block may take, over the same block without any state.
NEAR_FLOOR = 1.15
# Ratios of the recurrence to the published layer that were promised; of an analysis to sqrtm's.
FULL = Suite(
    steps=(
        StepCase("LRU", 50, 784, 8, (256, 64, 16), 0.1, "as for sequential MNIST", ((16, 3.5),)),
        StepCase("LRU", 50, 784, 8, (256, 16), 0.0, "the same without dropout", ((16, 3.5),)),
        StepCase(
            "LRU", 2, 1024, 512, (384, 161, 93, 57), 0.1, "as for sequential CIFAR", ((93, 1.6),)
        ),
        StepCase("LRU", 16, 1024, 128, (384, 93, 32), gains=((32, 3.0),)),
        StepCase("S5", 16, 1024, 128, (384, 93, 32)),
        StepCase("S4D", 16, 1024, 128, (64, 16, 4)),
        StepCase("Mamba", 4, 256, 64, (128, 64, 12), gains=((12, 6.5),)),
        StepCase("Mamba-2", 4, 256, 64, (128, 64, 12)),
    ),
    layers=(
        LayerCase(50, 784, 8, 256, 20),
        LayerCase(16, 1024, 128, 384, 5),
        LayerCase(8, 4096, 64, 64, 4),
    ),
    selective=(SelectiveCase(4, 256, 64, (128, 12), 50),),
    analysis=(
        AnalysisCase(32, 512, pymor=True),
        AnalysisCase(96, 512, pymor=True),
        AnalysisCase(192, 512),
        AnalysisCase(384, 512, target=2.5),
    ),
    share=ShareCase(6, 384, 512, 1024, 50, 1, 180_000, 5, target=0.01),
    memory=(
        LayerCase(50, 784, 8, 256),
        LayerCase(50, 784, 8, 64),
        LayerCase(50, 784, 8, 16),
        LayerCase(4, 1024, 128, 384),
        LayerCase(4, 1024, 128, 93),
        LayerCase(4, 1024, 128, 32),
    ),
    penalties=(
        StepCase("LRU", 50, 784, 8, (256, 47, 13), 0.1, "as for sequential MNIST"),
        StepCase("LRU", 50, 1024, 512, (384, 161, 57), 0.1, "as for sequential CIFAR"),
    ),
    rounds=Rounds(3, 7, 12),
    seeds=3,
    mamba_ssm=True,
)

QUICK = Suite(
    steps=(
        StepCase("LRU", 10, 784, 8, (256, 16), 0.0, "a fifth of the batch for sequential MNIST"),
        StepCase("S5", 4, 256, 64, (128, 16)),
        StepCase("S4D", 4, 256, 64, (64, 8)),
        StepCase("Mamba", 2, 128, 32, (64, 12)),
        StepCase("Mamba-2", 2, 128, 32, (64, 12)),
    ),
    layers=(LayerCase(5, 784, 8, 256), LayerCase(2, 512, 64, 192)),
    selective=(SelectiveCase(2, 128, 32, (64, 12)),),
    analysis=(AnalysisCase(16, 64, pymor=True), AnalysisCase(96, 64)),
    share=ShareCase(6, 96, 128, 256, 50, 1, 180_000, 5),
    memory=(LayerCase(5, 784, 8, 256), LayerCase(5, 784, 8, 16)),
    penalties=(StepCase("LRU", 10, 784, 8, (96, 16), 0.0, "small"),),
    rounds=Rounds(2, 3, 1),
    seeds=1,
    mamba_ssm=False,
)

SUITES = {"quick": QUICK, "full": FULL}
