"""The selective recurrence itself: chunked in time, states recomputed where gradients need them."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_compressm.nn._two_level import full_precision, row_blocks

__all__ = ["CHUNK", "selective_recurrence"]

# Measured with 12 to 128 states: shorter chunks keep more states, longer ones leave the cache.
CHUNK = 32
_LOG2_E = math.log2(math.e)


def selective_recurrence(
    inputs: Tensor, steps: Tensor, A: Tensor, B: Tensor, C: Tensor, initial: Tensor
) -> tuple[Tensor, Tensor]:
    r"""Run :math:`x_t = e^{\Delta_t A} x_{t-1} + \Delta_t u_t B_t`, :math:`y_t = C_t x_t`.

    Time comes first in every tensor, so that one step of a chunk is one block of memory; channels
    come last, because there are more of them than states after a reduction. Of the forward pass
    only the states at the start of each chunk are kept.

    Args:
        inputs: u, (L, batch, G, W), float32 or float64; dim = G W channels in G groups.
        steps: Delta, like ``inputs``.
        A: (G, N, W), real.
        B: (L, batch, G, N), or (1, 1, G, N) where it is the same at every step.
        C: like ``B``.
        initial: (batch, G, N, W), the state before the first step.

    Returns:
        Outputs, like ``inputs``, and the last state, like ``initial``.
    """
    outputs, last = _apply(inputs, steps, A, B, C, initial)
    return outputs, last


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _apply(*tensors: Tensor) -> Any:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return _SelectiveRecurrence.apply(*tensors)
    with torch.no_grad():
        outputs, last, _ = _forward(*tensors, keep=False)
    return outputs, last


def _spans(length: int) -> list[slice]:
    return [slice(start, min(start + CHUNK, length)) for start in range(0, length, CHUNK)]


def _blocks(initial: Tensor) -> list[slice]:
    return row_blocks(len(initial), CHUNK * initial[:1].nbytes, initial.device)


def _cut(tensor: Tensor, span: slice, rows: slice) -> Tensor:
    """Return a chunk of some rows; what is constant in time is constant over the batch as well."""
    return tensor if tensor.shape[:2] == (1, 1) else tensor[span, rows]


class _Chunk:
    """Decays and states of one chunk of some rows, in memory that every chunk uses again.

    Attributes:
        room: (at least Q, rows, G, N, W), what the decays lie in.
        decays: (Q, rows, G, N, W).
        states: (Q, rows, G, N, W), after each step.
        before: like ``states``, before each step.
    """

    def __init__(self, state: Tensor, length: int) -> None:
        size = min(CHUNK, length)
        self.room = state.new_empty(size, *state.shape)
        self._states = state.new_empty(size + 1, *state.shape)
        self._slots = self._states.unbind(0)
        self._factors = self.room.unbind(0)

    def run(self, dt: Tensor, u: Tensor, A: Tensor, B: Tensor, start: Tensor) -> None:
        """Fill the chunk; dt and u (Q, rows, G, W), ``start`` the state before its first step."""
        size = len(dt)
        self.decays, self.before = self.room[:size], self._states[:size]
        self.states = self._states[1 : size + 1]
        # Before anything else: it may be the last state of the chunk that lies here.
        previous = self._slots[0].copy_(start)
        torch.mul(dt.unsqueeze(-2), A * _LOG2_E, out=self.decays)
        # Faster than exp, above all where the result underflows.
        self.decays.exp2_()
        torch.mul((dt * u).unsqueeze(-2), B.unsqueeze(-1), out=self.states)
        for decay, state in zip(self._factors[:size], self._slots[1 : size + 1], strict=True):
            previous = state.addcmul_(decay, previous)


def _forward(
    inputs: Tensor, steps: Tensor, A: Tensor, B: Tensor, C: Tensor, initial: Tensor, *, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return outputs, last state, and the states at chunk starts (chunks, batch, G, N, W)."""
    spans = _spans(len(inputs))
    outputs, last = torch.empty_like(inputs), torch.empty_like(initial)
    starts = initial.new_empty(len(spans) if keep else 0, *initial.shape)
    with full_precision(inputs.device):
        for rows in _blocks(initial):
            state = initial[rows]
            chunk = _Chunk(state, len(inputs))
            for index, span in enumerate(spans):
                if keep:
                    starts[index, rows] = state
                dt, u = steps[span, rows], inputs[span, rows]
                chunk.run(dt, u, A, _cut(B, span, rows), state)
                outputs[span, rows] = _sum_over_states(_cut(C, span, rows), chunk.states)
                state = chunk.states[-1]
            last[rows] = state
    return outputs, last, starts


def _sum_over_states(weights: Tensor, states: Tensor) -> Tensor:
    """(Q, rows, G, N) and (Q, rows, G, N, W) to (Q, rows, G, W)."""
    return (weights.unsqueeze(-2) @ states).squeeze(-2)


def _sum_over_channels(weights: Tensor, states: Tensor) -> Tensor:
    """(Q, rows, G, W) and (Q, rows, G, N, W) to (Q, rows, G, N)."""
    return (weights.unsqueeze(-2) @ states.mT).squeeze(-2)


class _SelectiveRecurrence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        outputs, last, starts = _forward(*tensors, keep=True)
        ctx.save_for_backward(*tensors[:-1], starts)
        return outputs, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_last: Tensor) -> tuple[Tensor, ...]:
        with full_precision(grad.device):
            return _backward(grad, grad_last, *ctx.saved_tensors)


def _backward(
    grad: Tensor,
    grad_last: Tensor,
    inputs: Tensor,
    steps: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    starts: Tensor,
) -> tuple[Tensor, ...]:
    r"""Run the adjoint :math:`g_t = e^{\Delta_{t+1} A} g_{t+1} + C_t \bar y_t` chunk by chunk."""
    grad_inputs, grad_steps = torch.empty_like(inputs), torch.empty_like(steps)
    grad_A, grad_B, grad_C = (torch.zeros_like(t) for t in (A, B, C))
    grad_initial = torch.empty_like(grad_last)
    spans = _spans(len(inputs))
    for rows in _blocks(starts[0]):
        carry = grad_last[rows]
        chunk = _Chunk(carry, len(inputs))
        memory = torch.empty_like(chunk.room)
        for index in reversed(range(len(spans))):
            span = spans[index]
            dt, u, dy = steps[span, rows], inputs[span, rows], grad[span, rows]
            b = _cut(B, span, rows)
            chunk.run(dt, u, A, b, starts[index, rows])
            _add(grad_C, span, rows, _sum_over_channels(dy, chunk.states))

            adjoint = memory[: len(dt)]
            torch.mul(dy.unsqueeze(-2), _cut(C, span, rows).unsqueeze(-1), out=adjoint)
            carry = _adjoint_(adjoint, chunk.decays, carry)
            _add(grad_B, span, rows, _sum_over_channels(dt * u, adjoint))
            grad_drive = _sum_over_states(b, adjoint)
            grad_inputs[span, rows] = grad_drive * dt
            # From here on the decays hold the gradient of Delta A, g_t x_{t-1} exp(Delta_t A).
            rate = chunk.decays.mul_(adjoint).mul_(chunk.before)
            by_step = torch.mul(rate, A, out=adjoint).sum(-2)
            grad_steps[span, rows] = by_step.addcmul_(grad_drive, u)
            grad_A += rate.mul_(dt.unsqueeze(-2)).sum((0, 1))
        grad_initial[rows] = carry
    return grad_inputs, grad_steps, grad_A, grad_B, grad_C, grad_initial


def _adjoint_(adjoint: Tensor, decays: Tensor, carry: Tensor) -> Tensor:
    """Overwrite C_t dy_t by the adjoint of each step; return what the step before the chunk gets.

    Args:
        adjoint: (Q, rows, G, N, W).
        decays: like ``adjoint``.
        carry: (rows, G, N, W), the return value of the chunk after this one.
    """
    adjoint[-1] += carry
    backwards = itertools.pairwise(adjoint.unbind(0)[::-1])
    for decay, (later, earlier) in zip(decays.unbind(0)[:0:-1], backwards, strict=True):
        earlier.addcmul_(decay, later)
    return decays[0] * adjoint[0]


def _add(total: Tensor, span: slice, rows: slice, part: Tensor) -> None:
    """Put (Q, rows, G, N) into its place, or sum it where all steps share one tensor."""
    if total.shape[:2] == (1, 1):
        total += part.sum((0, 1))
    else:
        total[span, rows] = part
