"""Diagonal recurrences with a state only at the ends of chunks, and matrix products in between."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_compressm.nn._adjoint import conjugating_sign
from lightning_compressm.nn._autocast import full_precision
from lightning_compressm.nn._forms import form_for
from lightning_compressm.nn._once import once_differentiable

__all__ = ["best_chunk", "chunked_diagonal"]

# Touching a state in a scan takes as long as this many products; measured on CPUs, both passes.
_PRODUCTS_PER_STATE = 76
# Shorter chunks lose against the scan over all steps, for what they add in products.
_SHORTEST = 3
_LONGEST = 64


def best_chunk(length: int, width: int, states: int) -> int | None:
    """The chunk length Q with the least work for L steps, H channels and N states.

    ``Q H^2`` products a step and ``N / Q`` states touched balance at ``Q = sqrt(76 N) / H``.

    Returns:
        Q, or ``None`` where a scan over all steps is faster: with many channels for each state.
    """
    best = math.sqrt(_PRODUCTS_PER_STATE * states) / width
    if best < _SHORTEST or length < _SHORTEST:
        return None
    return min(round(best), _LONGEST, length)


def chunked_diagonal(
    chunk: int,
    inputs: Tensor,
    eigenvalues: Tensor,
    input_weight: Tensor,
    output_weight: Tensor,
    feedthrough: Tensor,
) -> Tensor:
    r"""Run :math:`x_k = \lambda x_{k-1} + B u_k`, :math:`y_k = \mathrm{Re}(C x_k) + D u_k`.

    Within a chunk of Q steps the outputs are a matrix product with the impulse response; with s the
    state before the chunk,

    .. math::
        y_i = \sum_{j \le i} \mathrm{Re}(C \lambda^{i-j} B) u_j + \mathrm{Re}(C \lambda^{i+1} s),
        \qquad s' = \lambda^Q s + \sum_j \lambda^{Q-1-j} B u_j .

    So N states are touched once in Q steps, for :math:`Q H^2` more products in each step. Only the
    states at chunk ends are kept for the backward pass.

    Args:
        chunk: Q >= 1; any length L works.
        inputs: (batch, L, H) float32 or float64, L >= 1.
        eigenvalues: (N,) complex; complex128 where the device has it.
        input_weight: (H, 2N), columns Re B_1, Im B_1, Re B_2, ... (B transposed).
        output_weight: (H, 2N), columns Re C_1, -Im C_1, Re C_2, ...
        feedthrough: (H,), the diagonal of D.

    Returns:
        (batch, L, H) in the dtype of ``inputs``.

    Source:
        The chunk-wise form of Dao & Gu (2024), "Transformers are SSMs", arXiv 2405.21060, section
        6, for a time-invariant system.
    """
    batch, length, width = inputs.shape
    count = -(-length // chunk)
    if count * chunk > length:
        inputs = F.pad(inputs, (0, 0, 0, count * chunk - length))
    powers = torch.cat((torch.ones_like(eigenvalues).unsqueeze(0), eigenvalues.expand(chunk, -1)))
    powers = powers.cumprod(0).to(inputs.dtype.to_complex())
    into, seen = _complex(input_weight), _complex(output_weight).conj() * powers.unsqueeze(1)
    response = (seen[:-1].flatten(0, 1) @ into.mT).real.reshape(chunk, width, width)
    outputs: Tensor = _ChunkedProduct.apply(
        inputs.reshape(batch, count, chunk * width),
        powers[-1],
        _toeplitz(response, feedthrough),
        _pairs(powers[:-1].flip(0).unsqueeze(1) * into),
        _pairs(seen[1:].conj().resolve_conj()),
    )
    return outputs.view(batch, count * chunk, width)[:, :length]


class _ChunkedProduct(torch.autograd.Function):
    """y = f T + s Z^T and s' = power s + f W for rows f of a sequence, zero state before the first.

    Shapes: f (batch, count, QH), power (N,) complex, T (QH, QH), W and Z (QH, 2N).
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, power: Tensor, within: Tensor, into: Tensor, out: Tensor
    ) -> Tensor:
        with full_precision(rows.device):
            batch, count, wide = rows.shape
            flat = rows.reshape(-1, wide)
            starts = _starts(flat, into, batch, count)
            form = form_for(power.device, power.dtype)
            powers = form.powers_of(power, count, power.dtype)
            form.scan_(_as_complex(starts), powers)
            outputs = torch.addmm(flat @ within, starts.flatten(0, 1), out.mT)
        ctx.save_for_backward(rows, powers, within, into, out, starts)
        return outputs.view_as(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        rows, powers, within, into, out, starts = ctx.saved_tensors
        batch, count, wide = rows.shape
        with full_precision(grad.device):
            flat, dy = rows.reshape(-1, wide), grad.reshape(-1, wide)
            # The conjugate h of the adjoint obeys the recurrence with `power` itself.
            sign = conjugating_sign(out, out.shape[1])
            adjoint = _ends(dy, out * sign, batch, count)
            form_for(powers.device, powers.dtype).scan_(_as_complex(adjoint), powers, reverse=True)
            h = adjoint.flatten(0, 1)
            d_rows = torch.addmm(dy @ within.mT, h, (into * sign).mT).view_as(rows)
            d_into = (flat.mT @ h) * sign
            # A chunk's adjoint is that of the state after it; the state before it pairs with both.
            product = _as_complex(adjoint) * _as_complex(starts)
            d_power = product.sum((0, 1)).conj_physical_()
            return d_rows, d_power, flat.mT @ dy, d_into, dy.mT @ starts.flatten(0, 1)


def _starts(flat: Tensor, into: Tensor, batch: int, count: int) -> Tensor:
    """What each chunk adds to the state, at the place of the next chunk: (batch, count, 2N)."""
    buffer = flat.new_empty(batch * count + 1, into.shape[1])
    torch.mm(flat, into, out=buffer[1:])
    starts = buffer[:-1].view(batch, count, into.shape[1])
    starts[:, 0] = 0
    return starts


def _ends(flat: Tensor, weight: Tensor, batch: int, count: int) -> Tensor:
    """What each chunk reads of the state before it, at the place of the chunk before."""
    buffer = flat.new_empty(batch * count + 1, weight.shape[1])
    torch.mm(flat, weight, out=buffer[:-1])
    ends = buffer[1:].view(batch, count, weight.shape[1])
    ends[:, -1] = 0
    return ends


def _toeplitz(response: Tensor, feedthrough: Tensor) -> Tensor:
    """Block (j, i) of (Q H, Q H) is the transposed response after i - j steps, zero for i < j."""
    chunk, width, _ = response.shape
    first = response[:1] + torch.diag(feedthrough)
    lags = torch.cat((response.new_zeros(chunk - 1, width, width), first, response[1:]))
    windows = lags.unfold(0, chunk, 1).flip(0)  # (j, H out, H in, i)
    return windows.permute(0, 2, 3, 1).reshape(chunk * width, chunk * width)


def _complex(pairs: Tensor) -> Tensor:
    return torch.view_as_complex(pairs.view(pairs.shape[0], -1, 2))


def _pairs(matrices: Tensor) -> Tensor:
    """Bring (Q, H, N) complex to (Q H, 2N)."""
    return torch.view_as_real(matrices).flatten(0, 1).flatten(1)


def _as_complex(pairs: Tensor) -> Tensor:
    return torch.view_as_complex(pairs.view(*pairs.shape[:2], pairs.shape[2] // 2, 2))
