"""Delayed recall: which of ten patterns came first, asked long after it is over."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.data.sequences import SequenceDataModule, Split

# The patterns and the noise are part of the task, so their seeds are fixed.
PATTERN_SEED = 0
NOISE_SEEDS: dict[Split, int] = {"train": 1, "val": 2, "test": 3}
SIZES: dict[Split, int] = {"train": 4000, "val": 500, "test": 4000}


def make_patterns(n_classes: int, steps: int) -> Tensor:
    """Random patterns (n_classes, steps), each of zero mean and unit variance over time."""
    generator = torch.Generator().manual_seed(PATTERN_SEED)
    patterns = torch.randn(n_classes, steps, generator=generator)
    patterns = patterns - patterns.mean(1, keepdim=True)
    return patterns / patterns.std(1, correction=0, keepdim=True)


def make_sequences(
    patterns: Tensor, delay: int, noise: float, size: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Draw `size` sequences: a noisy pattern, then `delay` steps of noise alone.

    Args:
        patterns: (n_classes, steps).
        delay: Steps of noise after the pattern.
        noise: Standard deviation of the noise; the patterns have 1.
        size: Number of sequences; the classes are equally frequent.
        seed: Fixes the noise and the order of the classes.

    Returns:
        Sequences (size, steps + delay, 1) and classes (size,).
    """
    generator = torch.Generator().manual_seed(seed)
    n_classes, steps = patterns.shape
    classes = torch.arange(size).remainder(n_classes)
    classes = classes[torch.randperm(size, generator=generator)]
    sequences = noise * torch.randn(size, steps + delay, generator=generator)
    sequences[:, :steps] += patterns[classes]
    return sequences.unsqueeze(-1), classes


class DelayDataModule(SequenceDataModule):
    """Ten fixed patterns of 32 noisy steps, then 200 steps of noise; the answer is read at the end.

    Unlike a mean over time, this read-out asks for nothing but the last state: it is the
    counterpart of the digits where memory counts.

    Args:
        batch_size: Sequences in a batch.
        seed: Fixes the order of the training batches.
        delay: Steps of noise after the pattern.
        noise: Standard deviation of the noise; the patterns have 1.

    Example:
        >>> data = DelayDataModule(delay=200)
        >>> data.length
        232
    """

    d_input = 1
    n_classes = 10
    pattern_steps = 32

    def __init__(
        self, batch_size: int = 50, seed: int = 0, delay: int = 200, noise: float = 0.5
    ) -> None:
        super().__init__(batch_size, seed)
        self.delay = delay
        self.noise = noise
        self.length = self.pattern_steps + delay

    def build_splits(self) -> dict[Split, tuple[Tensor, Tensor]]:
        patterns = make_patterns(self.n_classes, self.pattern_steps)
        return {
            name: make_sequences(patterns, self.delay, self.noise, size, NOISE_SEEDS[name])
            for name, size in SIZES.items()
        }
