"""Recurrences in plain operations: while exporting or tracing, and under function transforms.

The fast forms work in place, in loops as long as the sequence wants them, with backward passes of
their own; exporters and ``torch.func`` can follow none of that. Here everything is out of place and
real, and the number of operations does not depend on the length, so that it may stay symbolic:
matrix products within chunks, and doubling over the chunk ends.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_compressm._precision import wide_dtype
from lightning_compressm.nn._powers import powers_by_doubling

__all__ = [
    "CHUNK",
    "doublings",
    "in_chunks",
    "is_exporting",
    "out_of_chunks",
    "plain_diagonal",
    "plain_linear_recurrence",
    "plain_recurrence",
    "plain_scan",
    "states_before",
    "steps_back",
    "wants_plain_operations",
]

CHUNK = 32
# For lengths that stay symbolic: chunks of 2^31 steps, the most that most exported formats count.
_MOST_DOUBLINGS = 26

Pair = tuple[Tensor, Tensor]


def wants_plain_operations() -> bool:
    """Whether what runs now is recorded, or transformed, and not just computed."""
    return is_exporting() or torch._C._is_tracing() or torch._C._are_functorch_transforms_active()


def is_exporting() -> bool:
    """Whether ``torch.export`` runs; below torch 2.13 also whether ``torch.compile`` does.

    The two can't be told apart there: the function came with 2.7, and Dynamo takes it for true.
    """
    known = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)
    return bool(known())


def doublings(count: int) -> int:
    """How often 1 is doubled to reach ``count``, or enough for any count where it is symbolic."""
    # Within Dynamo symbolic numbers pass for integers.
    known = type(count) is int and not torch.compiler.is_dynamo_compiling()
    return (count - 1).bit_length() if known else _MOST_DOUBLINGS


def steps_back(like: Tensor, distance: int) -> Pair:
    """The index of the entry ``distance`` before each along dimension 0, and whether there is one.

    The latter is shaped so that it multiplies tensors like ``like``.
    """
    steps = torch.arange(like.shape[0], device=like.device) - distance
    return steps.clamp(min=0), (steps >= 0).reshape(-1, *[1] * (like.ndim - 1))


def plain_scan(power: Pair, states: Pair) -> Pair:
    r"""Return :math:`x_k = \mu x_{k-1} + u_k` along dimension 0, zero before.

    Args:
        power: real and imaginary part of mu, in the widest dtype; broadcast with ``states[0]``.
        states: real and imaginary part of u.

    Source:
        Hillis & Steele (1986), "Data Parallel Algorithms".
    """
    (p_re, p_im), (re, im) = power, states
    for level in range(doublings(re.shape[0])):
        source, known = steps_back(re, 1 << level)
        # Not the product is masked: powers of unstable eigenvalues overflow where nothing is known.
        f_re, f_im = (torch.where(known, p.to(re.dtype), 0) for p in (p_re, p_im))
        s_re, s_im = re.index_select(0, source), im.index_select(0, source)
        re, im = re + f_re * s_re - f_im * s_im, im + f_re * s_im + f_im * s_re
        p_re, p_im = p_re.square() - p_im.square(), 2 * p_re * p_im
    return re, im


def states_before(states: Tensor) -> Tensor:
    """Shift by one along dimension 0, with zeros in front."""
    source, known = steps_back(states, 1)
    return torch.where(known, states.index_select(0, source), 0)


# Cutting and joining know no more about the length than exporters do: rounding it up and comparing
# would make them ask for lengths of one kind only.
def in_chunks(sequence: Tensor) -> Tensor:
    """Cut (L, ...) into (count, Q, ...), with zeros at the end and two chunks at least."""
    padded = F.pad(sequence, (0, 0) * (sequence.ndim - 1) + (0, 2 * CHUNK - 1))
    return padded.unfold(0, CHUNK, CHUNK).movedim(-1, 1)


def out_of_chunks(chunks: Tensor, length: int) -> Tensor:
    """Join (count, Q, ...) to the first L steps."""
    steps = torch.arange(length, device=chunks.device)
    return chunks.contiguous().flatten(0, 1).index_select(0, steps)


def plain_recurrence(eigenvalues: Pair, inputs: Tensor) -> Tensor:
    r"""Return the states of :math:`x_k = \lambda x_{k-1} + u_k`, zero before the first.

    Args:
        eigenvalues: real and imaginary part, (N,), in the widest dtype.
        inputs: (M, L, N, 2), as pairs of real and imaginary part.

    Returns:
        Like ``inputs``.
    """
    length = inputs.shape[1]
    chunks = in_chunks(inputs.movedim(1, 0)).permute(3, 0, 2, 1, 4)
    states, count, batch = chunks.shape[:3]
    rows = chunks.contiguous().flatten(3).flatten(1, 2)
    re, im, top_re, top_im = powers_by_doubling(*eigenvalues, CHUNK)
    within, carried = _products(re, im, top_re, top_im)
    local = rows @ within.to(rows.dtype)
    ends = local[..., -2:].reshape(states, count, batch, 2).transpose(0, 1)
    top = (top_re.unsqueeze(-1), top_im.unsqueeze(-1))
    after = torch.stack(plain_scan(top, (ends[..., 0], ends[..., 1])), -1)
    before = states_before(after).transpose(0, 1).contiguous().flatten(1, 2)
    result = (local + before @ carried.to(rows.dtype)).reshape(states, count, batch, CHUNK, 2)
    return out_of_chunks(result.permute(1, 3, 2, 0, 4), length).movedim(0, 1)


def _products(re: Tensor, im: Tensor, top_re: Tensor, top_im: Tensor) -> Pair:
    """What the inputs of a chunk (N, 2Q, 2Q), and the state before it (N, 2, 2Q), add to states."""
    steps = torch.arange(CHUNK, device=re.device)
    lag = steps - steps.unsqueeze(-1)  # row: the step of the input, column: that of the state
    index, causal = lag.clamp(min=0), lag >= 0
    within = _as_real_products(*(torch.where(causal, part[:, index], 0) for part in (re, im)))
    later = (torch.cat((p[:, 1:], t.unsqueeze(-1)), 1) for p, t in ((re, top_re), (im, top_im)))
    carried = _as_real_products(*(part.unsqueeze(1) for part in later))
    return within, carried


def _as_real_products(re: Tensor, im: Tensor) -> Tensor:
    """Complex matrices (N, J, I) that rows of pairs are multiplied with, (N, 2J, 2I)."""
    from_re, from_im = torch.stack((re, im), -1), torch.stack((-im, re), -1)
    blocks = torch.stack((from_re, from_im), 2)
    return blocks.flatten(3, 4).flatten(1, 2)


def plain_diagonal(
    inputs: Tensor,
    eigenvalues: Pair,
    input_weight: Tensor,
    output_weight: Tensor,
    feedthrough: Tensor,
) -> Tensor:
    """What :func:`~lightning_compressm.nn._fused.fused_diagonal` computes."""
    driven = torch.unflatten(inputs @ input_weight, -1, (-1, 2))
    states = plain_recurrence(eigenvalues, driven).flatten(-2)
    return states @ output_weight.t() + feedthrough * inputs


def plain_linear_recurrence(
    eigenvalues: Tensor, inputs: Tensor, initial_state: Tensor | None
) -> Tensor:
    """What :func:`~lightning_compressm.nn.linear_recurrence` computes."""
    wide = wide_dtype(inputs.device)
    pair = (eigenvalues.real.to(wide), eigenvalues.imag.to(wide))
    if initial_state is not None:
        first = (torch.arange(inputs.shape[-2], device=inputs.device) == 0).unsqueeze(-1)
        before = (eigenvalues * initial_state).to(inputs.dtype).unsqueeze(-2)
        inputs = inputs + torch.where(first, before, 0)
    parts = torch.stack((inputs.real, inputs.imag), -1)
    *batch, length, states, _ = parts.shape
    flat = plain_recurrence(pair, parts.reshape(math.prod(batch), length, states, 2))
    result = flat.reshape(*batch, length, states, 2)
    return torch.complex(result[..., 0], result[..., 1])
