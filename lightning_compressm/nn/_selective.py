"""The selective recurrence itself: chunked in time, states recomputed where gradients need them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_compressm.nn._autocast import full_precision
from lightning_compressm.nn._once import once_differentiable
from lightning_compressm.nn._plain import wants_plain_operations
from lightning_compressm.nn._plain_selective import plain_selective
from lightning_compressm.nn._row_blocks import row_blocks

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
    if wants_plain_operations():
        return plain_selective(inputs, steps, A, B, C, initial)
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
    """Decays, states and adjoints of one chunk of some rows, in memory that every chunk uses again.

    Attributes:
        decays: (Q, rows, G, N, W).
        states: (Q, rows, G, N, W), after each step.
        before: like ``states``, before each step.
        adjoint: like ``states``.
    """

    def __init__(self, state: Tensor, length: int, *, backward: bool = False) -> None:
        size = min(CHUNK, length)
        self._decays = state.new_empty(size, *state.shape)
        self._states = state.new_empty(size + 1, *state.shape)
        self._adjoint = state.new_empty(size if backward else 0, *state.shape)
        # One view for each step, made once: for small states that is as slow as a step itself.
        self._decay_at = self._decays.unbind(0)
        self._state_at = self._states.unbind(0)
        self._adjoint_at = self._adjoint.unbind(0) if backward else ()

    def run(self, dt: Tensor, drive: Tensor, rates: Tensor, B: Tensor, start: Tensor) -> None:
        """Compute the states.

        Args:
            dt: (Q, rows, G, W).
            drive: Delta u, like ``dt``.
            rates: A over log 2, (G, N, W).
            B: (Q, rows, G, N), or with ones for Q and rows.
            start: (rows, G, N, W), the state before the first.
        """
        size = len(dt)
        # Before anything else: it may be the last state of the chunk that lies here.
        previous = self._state_at[0].copy_(start)
        self.decays, self.before = self._decays[:size], self._states[:size]
        self.states = self._states[1 : size + 1]
        torch.mul(dt.unsqueeze(-2), rates, out=self.decays)
        # Faster than exp, above all where the result underflows.
        self.decays.exp2_()
        torch.mul(drive.unsqueeze(-2), B.unsqueeze(-1), out=self.states)
        for decay, state in zip(self._decay_at, self._state_at[1 : size + 1], strict=False):
            previous = state.addcmul_(decay, previous)

    def run_back(self, dy: Tensor, C: Tensor, carry: Tensor) -> Tensor:
        """Compute the adjoints from the gradients of the outputs, after the states.

        Args:
            dy: (Q, rows, G, W).
            C: (Q, rows, G, N), or with ones for Q and rows.
            carry: (rows, G, N, W), the gradient of the last state.

        Returns:
            The gradient of the state before the chunk.
        """
        size = len(dy)
        self.adjoint = self._adjoint[:size]
        torch.mul(dy.unsqueeze(-2), C.unsqueeze(-1), out=self.adjoint)
        later = self._adjoint_at[size - 1].add_(carry)
        for step in range(size - 1, 0, -1):
            later = self._adjoint_at[step - 1].addcmul_(self._decay_at[step], later)
        return self._decay_at[0] * later


def _forward(
    inputs: Tensor, steps: Tensor, A: Tensor, B: Tensor, C: Tensor, initial: Tensor, *, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return outputs, last state, and the states at chunk starts (chunks, batch, G, N, W)."""
    spans = _spans(len(inputs))
    outputs, last = torch.empty_like(inputs), torch.empty_like(initial)
    starts = initial.new_empty(len(spans) if keep else 0, *initial.shape)
    with full_precision(inputs.device):
        # Whatever has no states is done for all chunks at once: with few states, every chunk's
        # share of it takes as long as a pass over the states.
        drive, rates = steps * inputs, A * _LOG2_E
        for rows in _blocks(initial):
            state = initial[rows]
            chunk = _Chunk(state, len(inputs))
            for index, span in enumerate(spans):
                if keep:
                    starts[index, rows] = state
                b = _cut(B, span, rows)
                chunk.run(steps[span, rows], drive[span, rows], rates, b, state)
                outputs[span, rows] = _sum_over_states(_cut(C, span, rows), chunk.states)
                state = chunk.states[-1]
            last[rows] = state
    return outputs, last, starts


def _sum_over_states(weights: Tensor, states: Tensor) -> Tensor:
    """(Q, rows, G, N) and (Q, rows, G, N, W) to (Q, rows, G, W)."""
    outer = states.shape[:-2]
    # A plain bmm: finding out that it is one costs matmul as much as multiplying does.
    flat = weights.expand(*outer, -1).reshape(-1, 1, weights.shape[-1])
    return torch.bmm(flat, states.flatten(0, 2)).view(*outer, -1)


def _sum_over_channels(weights: Tensor, states: Tensor) -> Tensor:
    """(Q, rows, G, W) and (Q, rows, G, N, W) to (Q, rows, G, N)."""
    flat = weights.reshape(-1, 1, weights.shape[-1])
    return torch.bmm(flat, states.flatten(0, 2).mT).view(*states.shape[:-1])


class _SelectiveRecurrence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        outputs, last, starts = _forward(*tensors, keep=True)
        ctx.save_for_backward(*tensors[:-1], starts)
        return outputs, last

    @staticmethod
    @torch.compiler.disable  # type: ignore[untyped-decorator]  # a compiled step gets here too
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
    grad_drive, grad_steps = torch.empty_like(inputs), torch.empty_like(steps)
    grad_A, grad_B, grad_C = (torch.zeros_like(t) for t in (A, B, C))
    grad_initial = torch.empty_like(grad_last)
    drive, rates = steps * inputs, A * _LOG2_E
    spans = _spans(len(inputs))
    for rows in _blocks(starts[0]):
        carry = grad_last[rows]
        chunk = _Chunk(carry, len(inputs), backward=True)
        for index in reversed(range(len(spans))):
            span = spans[index]
            dt, driven, dy = steps[span, rows], drive[span, rows], grad[span, rows]
            b = _cut(B, span, rows)
            chunk.run(dt, driven, rates, b, starts[index, rows])
            _add(grad_C, span, rows, _sum_over_channels(dy, chunk.states))
            carry = chunk.run_back(dy, _cut(C, span, rows), carry)
            _add(grad_B, span, rows, _sum_over_channels(driven, chunk.adjoint))
            grad_drive[span, rows] = _sum_over_states(b, chunk.adjoint)
            # From here on the decays hold the gradient of Delta A, g_t x_{t-1} exp(Delta_t A).
            rate = chunk.decays.mul_(chunk.adjoint).mul_(chunk.before)
            torch.sum(torch.mul(rate, A, out=chunk.adjoint), -2, out=grad_steps[span, rows])
            grad_A += rate.mul_(dt.unsqueeze(-2)).sum((0, 1))
        grad_initial[rows] = carry
    grad_steps.addcmul_(grad_drive, inputs)
    return grad_drive.mul_(steps), grad_steps, grad_A, grad_B, grad_C, grad_initial


def _add(total: Tensor, span: slice, rows: slice, part: Tensor) -> None:
    """Put (Q, rows, G, N) into its place, or sum it where all steps share one tensor."""
    if total.shape[:2] == (1, 1):
        total += part.sum((0, 1))
    else:
        total[span, rows] = part
