"""The selective recurrence in plain operations: while exporting, and under function transforms."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_compressm.nn._plain import CHUNK, doublings, in_chunks, out_of_chunks, steps_back

__all__ = ["plain_selective"]


def plain_selective(
    inputs: Tensor, steps: Tensor, A: Tensor, B: Tensor, C: Tensor, initial: Tensor
) -> tuple[Tensor, Tensor]:
    """What :func:`~lightning_compressm.nn._selective.selective_recurrence` computes.

    All states of the sequence are in memory at once, several times.
    """
    # Steps of size zero, at the end, change nothing: the last state stays the last.
    decay = (in_chunks(steps).unsqueeze(-2) * A).exp()
    drive = in_chunks((steps * inputs).unsqueeze(-2) * B.unsqueeze(-1))
    decay, states = _within(decay, drive)
    total, ends = _across(decay[:, -1], states[:, -1])
    after = ends + total * initial
    source, known = steps_back(after, 1)
    before = torch.where(known, after.index_select(0, source), initial)
    states = out_of_chunks(states + decay * before.unsqueeze(1), inputs.shape[0])
    outputs = C.unsqueeze(-2) @ states
    return outputs.squeeze(-2), after[-1]


def _within(decay: Tensor, drive: Tensor) -> tuple[Tensor, Tensor]:
    """Products of decays, and states, since the start of each chunk; steps are dimension 1."""
    distance = 1
    while distance < CHUNK:
        later = drive[:, distance:] + decay[:, distance:] * drive[:, :-distance]
        drive = torch.cat((drive[:, :distance], later), 1)
        decay = torch.cat((decay[:, :distance], decay[:, distance:] * decay[:, :-distance]), 1)
        distance *= 2
    return decay, drive


def _across(decay: Tensor, drive: Tensor) -> tuple[Tensor, Tensor]:
    """The same along dimension 0 from the first entry on, whose number may be symbolic."""
    for level in range(doublings(decay.shape[0])):
        source, known = steps_back(decay, 1 << level)
        drive = drive + torch.where(known, decay, 0) * drive.index_select(0, source)
        decay = torch.where(known, decay * decay.index_select(0, source), decay)
    return decay, drive
