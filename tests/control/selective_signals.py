"""Random selective recurrences and plain loops over them, for the tests of their statistics."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_compressm.control.calibration import SelectiveSignals

F64 = torch.float64


def random_signals(
    batch: int = 2,
    length: int = 21,
    groups: int = 2,
    channels: int = 3,
    states: int = 4,
    *,
    scalar: bool = False,
    seed: int = 0,
) -> SelectiveSignals:
    """21 steps do not divide into chunks of 16."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=F64)

    shape = (batch, length, groups)
    rates = 0.2 + 2 * torch.rand(groups, channels, 1 if scalar else states, generator=g, dtype=F64)
    return SelectiveSignals(
        dt=0.05 + torch.rand(*shape, channels, generator=g, dtype=F64),
        A=-rates,
        B=normal(*shape, states),
        C=normal(*shape, states),
        x=normal(*shape, channels),
        weight=normal(*shape, channels),
    )


def walk(s: SelectiveSignals) -> Iterator[tuple[int, int, int, int, Tensor]]:
    """Sequence, step, group, channel and the states (N,) after that step; one at a time."""
    batch, length, groups, channels = s.x.shape
    for b in range(batch):
        for g in range(groups):
            for d in range(channels):
                h = torch.zeros(s.n_states, dtype=F64)
                for k in range(length):
                    dt = s.dt[b, k, g, d]
                    h = torch.exp(dt * s.A[g, d]) * h + dt * s.x[b, k, g, d] * s.B[b, k, g]
                    yield b, k, g, d, h


def expanded(s: SelectiveSignals) -> SelectiveSignals:
    """A decay rate for each state where all of a channel share one."""
    A = s.A.expand(*s.A.shape[:2], s.n_states).contiguous()
    return SelectiveSignals(s.dt, A, s.B, s.C, s.x, s.weight)


def time_invariant(length: int = 400, states: int = 4, seed: int = 0) -> SelectiveSignals:
    """One channel with constant step, B and C."""
    g = torch.Generator().manual_seed(seed)
    one = torch.ones(1, length, 1, 1, dtype=F64)
    B = torch.randn(states, generator=g, dtype=F64)
    C = torch.randn(states, generator=g, dtype=F64)
    A = -torch.linspace(0.3, 2.0, states, dtype=F64).view(1, 1, -1)
    x = torch.randn(1, length, 1, 1, generator=g, dtype=F64)
    return SelectiveSignals(0.5 * one, A, one * B, one * C, x, one)
