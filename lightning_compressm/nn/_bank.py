"""A bank of independent single-input, single-output systems in chunks: matrix products, no FFT."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_compressm.nn._adjoint import conjugating_sign
from lightning_compressm.nn._autocast import full_precision
from lightning_compressm.nn._once import once_differentiable
from lightning_compressm.nn._plain import (
    in_chunks,
    out_of_chunks,
    plain_scan,
    states_before,
    wants_plain_operations,
)
from lightning_compressm.nn._powers import powers_by_doubling

__all__ = ["bank_chunk", "chunked_bank"]

# Measured on a CPU with 4 to 128 states, 1 to 50 sequences of 128 to 8192 steps.
_CHUNK = 32
# Work on the weights does not shrink with the sequences: they have to fill so many chunks.
_FEWEST_CHUNKS = 32
# With so many states products cost as much as an FFT does; what the kernel of a convolution costs
# more than the weights of a chunk is what the states of so many sequences cost.
_STATES_OF_FFT, _SEQUENCES_OF_KERNEL = 32, 2


def bank_chunk(batch: int, length: int, states: int) -> int | None:
    """The chunk length Q on a CPU, or ``None`` where a convolution by FFT is faster."""
    if batch * length < _FEWEST_CHUNKS * _CHUNK:
        return None
    if states * (batch - _SEQUENCES_OF_KERNEL) > _STATES_OF_FFT * batch:
        return None
    return min(_CHUNK, length)


def chunked_bank(
    chunk: int,
    inputs: Tensor,
    eigenvalues: tuple[Tensor, Tensor],
    read_out: tuple[Tensor, Tensor],
    feedthrough: Tensor,
) -> Tensor:
    r"""Run :math:`x_k = \lambda x_{k-1} + u_k`, :math:`y_k = \mathrm{Re}(c x_k) + d u_k`.

    Every channel has states of its own. Outputs within a chunk of Q steps are a product with the
    impulse response, and states are touched once in Q steps, as in
    :func:`~lightning_compressm.nn._chunked.chunked_diagonal`.

    Args:
        chunk: Q >= 1; any length L works.
        inputs: (batch, L, H) float32 or float64, batch and L >= 1.
        eigenvalues: real and imaginary part, (H, N); float64 where the device has it.
        read_out: real and imaginary part of c, (H, N).
        feedthrough: (H,).

    Returns:
        (batch, L, H) in the dtype of ``inputs``.
    """
    length, dtype = inputs.shape[1], inputs.dtype
    count = -(-length // chunk)
    *powers, top_re, top_im = powers_by_doubling(*eigenvalues, chunk)
    into = torch.stack(powers, 2).flip(-1).flatten(1, 2).to(dtype)
    # The weights c lambda^q for q = 0 ... Q: all but the last give the response, all but the
    # first read the state before the chunk.
    p_re, p_im = (
        torch.cat((power, top.unsqueeze(-1)), -1).to(dtype)
        for power, top in zip(powers, (top_re, top_im), strict=True)
    )
    c_re, c_im = (part.to(dtype).unsqueeze(-1) for part in read_out)
    seen = torch.stack((c_re * p_re - c_im * p_im, -(c_re * p_im + c_im * p_re)), 2)
    response = seen[:, :, 0, :-1].sum(1)
    weights = (_toeplitz(response, feedthrough.to(dtype)), into, seen[..., 1:].flatten(1, 2))
    if wants_plain_operations():
        return _plain_product(inputs, (top_re, top_im), *weights)
    padded = F.pad(inputs, (0, 0, 0, count * chunk - length))
    outputs: Tensor = _apply(padded, torch.stack((top_re, top_im), -1).to(dtype), *weights)
    return outputs[:, :length]


def _plain_product(
    inputs: Tensor, power: tuple[Tensor, Tensor], within: Tensor, into: Tensor, out: Tensor
) -> Tensor:
    """What :class:`_BankProduct` computes, in plain operations and for chunks as long as theirs."""
    length, states = inputs.shape[1], power[0].shape[1]
    chunks = in_chunks(inputs.movedim(1, 0)).permute(3, 0, 2, 1)
    width, count, batch, _ = chunks.shape
    rows = chunks.contiguous().flatten(1, 2)
    ends = (rows @ into.mT).reshape(width, count, batch, states, 2).transpose(0, 1)
    factor = (power[0].unsqueeze(1), power[1].unsqueeze(1))
    after = torch.stack(plain_scan(factor, (ends[..., 0], ends[..., 1])), -1)
    before = states_before(after).transpose(0, 1).contiguous().flatten(3).flatten(1, 2)
    outputs = (rows @ within + before @ out).reshape(width, count, batch, within.shape[1])
    return out_of_chunks(outputs.permute(1, 3, 2, 0), length).movedim(0, 1)


# Complex numbers only in here: torch.compile can't generate code for them.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _apply(*tensors: Tensor) -> Any:
    return _BankProduct.apply(*tensors)


class _BankProduct(torch.autograd.Function):
    """y = f T + s Z and s' = power s + f W^T for chunks f of a channel, zero state before them.

    Shapes: inputs (batch, L, H), power (H, N, 2), T (H, Q, Q), W and Z (H, 2N, Q). Inside, chunks
    are rows (H, count batch, Q), those of one time side by side: one step of the scan is then a
    block of memory, and the states before all chunks but the first are those after all but the
    last.
    """

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, power: Tensor, within: Tensor, into: Tensor, out: Tensor
    ) -> Tensor:
        batch, chunk = len(inputs), within.shape[1]
        with full_precision(inputs.device):
            rows = _to_rows(inputs, chunk)
            states = rows @ into.mT
            _scan_(states, power, batch)
            outputs = rows @ within
            if rows.shape[1] > batch:
                outputs[:, batch:].baddbmm_(states[:, :-batch], out)
        ctx.save_for_backward(rows, power, within, into, out, states)
        ctx.batch = batch
        return _from_rows(outputs, batch)

    @staticmethod
    @torch.compiler.disable  # type: ignore[untyped-decorator]  # a compiled step gets here too
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        rows, power, within, into, out, states = ctx.saved_tensors
        batch = ctx.batch
        with full_precision(grad.device):
            dy = _to_rows(grad, within.shape[1])
            # Row k: the adjoint of the state after chunk k. Its conjugate obeys the recurrence
            # with `power` itself; conjugating is a sign on every second weight.
            sign = conjugating_sign(out, out.shape[1]).unsqueeze(-1)
            adjoint = torch.zeros_like(states)
            torch.bmm(dy[:, batch:], (out * sign).mT, out=adjoint[:, :-batch])
            _scan_(adjoint, power, batch, reverse=True)
            d_rows = torch.baddbmm(dy @ within.mT, adjoint, into * sign)
            d_into = (adjoint.mT @ rows) * sign
            before, after = states[:, :-batch], adjoint[:, batch:]
            d_within, d_out = rows.mT @ dy, before.mT @ dy[:, batch:]
            d_power = (_as_complex(before) * _as_complex(after)).sum(1).conj_physical_()
        d_inputs = _from_rows(d_rows, batch)
        return d_inputs, torch.view_as_real(d_power), d_within, d_into, d_out


def _to_rows(sequence: Tensor, chunk: int) -> Tensor:
    """Bring (batch, L, H) to (H, count batch, Q)."""
    batch, _, width = sequence.shape
    # Two copies: the first is a plain transposition, the second moves whole chunks.
    channels = sequence.reshape(-1, width).t().contiguous()
    return channels.view(width, batch, -1, chunk).transpose(1, 2).reshape(width, -1, chunk)


def _from_rows(rows: Tensor, batch: int) -> Tensor:
    """Bring (H, count batch, Q) back to (batch, L, H)."""
    width, _, chunk = rows.shape
    channels = rows.view(width, -1, batch, chunk).transpose(1, 2).reshape(width, -1)
    return channels.t().contiguous().view(batch, -1, width)


def _scan_(states: Tensor, power: Tensor, batch: int, *, reverse: bool = False) -> None:
    """Turn what chunks add to the states (H, count batch, 2N) into the states after them."""
    steps = torch.unflatten(_as_complex(states), 1, (-1, batch)).unbind(1)
    factor = torch.view_as_complex(power).unsqueeze(1).expand(-1, batch, -1).contiguous()
    for previous, current in itertools.pairwise(steps[::-1] if reverse else steps):
        current.addcmul_(factor, previous)


def _toeplitz(response: Tensor, feedthrough: Tensor) -> Tensor:
    """Entry (j, i) of (H, Q, Q) is the response after i - j steps, zero for i < j."""
    width, chunk = response.shape
    first = response[:, :1] + feedthrough.unsqueeze(-1)
    lags = torch.cat((response.new_zeros(width, chunk - 1), first, response[:, 1:]), 1)
    return lags.unfold(1, chunk, 1).flip(1)


def _as_complex(pairs: Tensor) -> Tensor:
    return torch.view_as_complex(torch.unflatten(pairs, -1, (-1, 2)))
