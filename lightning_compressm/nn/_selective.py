"""The selective recurrence itself: chunked in time, states recomputed where gradients need them."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_compressm.nn._two_level import full_precision, row_blocks

__all__ = ["CHUNK", "selective_recurrence"]

# Measured with 12 to 128 states: shorter chunks keep more states, longer ones leave the cache.
CHUNK = 32


def selective_recurrence(
    inputs: Tensor, steps: Tensor, A: Tensor, B: Tensor, C: Tensor, initial: Tensor
) -> tuple[Tensor, Tensor]:
    r"""Run :math:`x_t = e^{\Delta_t A} x_{t-1} + \Delta_t u_t B_t`, :math:`y_t = C_t x_t`.

    Time comes first in every tensor, so that one step of a chunk is one block of memory. Of the
    forward pass only the states at the start of each chunk are kept.

    Args:
        inputs: u, (L, batch, G, W), float32 or float64; dim = G W channels in G groups.
        steps: Delta, like ``inputs``.
        A: (G, W, N), real.
        B: (L, batch, G, N), or (1, 1, G, N) where it is the same at every step.
        C: like ``B``.
        initial: (batch, G, W, N), the state before the first step.

    Returns:
        Outputs, like ``inputs``, and the last state, like ``initial``.
    """
    outputs, last = _apply(inputs, steps, A, B, C, initial)
    return outputs, last


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _apply(*tensors: Tensor) -> Any:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return _SelectiveRecurrence.apply(*tensors)
    outputs, last, _ = _forward(*tensors, keep=False)
    return outputs, last


def _spans(length: int) -> list[slice]:
    return [slice(start, min(start + CHUNK, length)) for start in range(0, length, CHUNK)]


def _blocks(initial: Tensor) -> list[slice]:
    return row_blocks(len(initial), CHUNK * initial[:1].nbytes, initial.device)


def _cut(tensor: Tensor, span: slice, rows: slice) -> Tensor:
    """Return a chunk of some rows; what is constant in time is constant over the batch as well."""
    return tensor if tensor.shape[:2] == (1, 1) else tensor[span, rows]


def _states(dt: Tensor, u: Tensor, A: Tensor, B: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """Return decays and states, both (Q, rows, G, W, N), of one chunk."""
    decays = (dt.unsqueeze(-1) * A).exp_()
    states = (dt * u).unsqueeze(-1) * B.unsqueeze(-2)
    previous = start
    for decay, state in zip(decays.unbind(0), states.unbind(0), strict=True):
        previous = state.addcmul_(decay, previous)
    return decays, states


def _forward(
    inputs: Tensor, steps: Tensor, A: Tensor, B: Tensor, C: Tensor, initial: Tensor, *, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return outputs, last state, and the states at chunk starts (chunks, batch, G, W, N)."""
    spans = _spans(len(inputs))
    outputs, last = torch.empty_like(inputs), torch.empty_like(initial)
    starts = initial.new_empty(len(spans) if keep else 0, *initial.shape)
    with full_precision(inputs.device):
        for rows in _blocks(initial):
            state = initial[rows]
            for index, span in enumerate(spans):
                if keep:
                    starts[index, rows] = state
                dt, u = steps[span, rows], inputs[span, rows]
                _, states = _states(dt, u, A, _cut(B, span, rows), state)
                read = states @ _cut(C, span, rows).unsqueeze(-1)
                outputs[span, rows] = read.squeeze(-1)
                state = states[-1]
            last[rows] = state
    return outputs, last, starts


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
    grad_inputs, grad_steps = torch.empty_like(inputs), torch.empty_like(steps)
    grad_A, grad_B, grad_C = (torch.zeros_like(t) for t in (A, B, C))
    grad_initial = torch.empty_like(grad_last)
    spans = _spans(len(inputs))
    for rows in _blocks(starts[0]):
        carry = grad_last[rows]
        for index in reversed(range(len(spans))):
            span, start = spans[index], starts[index, rows]
            dt, u, dy = steps[span, rows], inputs[span, rows], grad[span, rows]
            b, c = _cut(B, span, rows), _cut(C, span, rows)
            decays, states = _states(dt, u, A, b, start)
            _add(grad_C, span, rows, dy.unsqueeze(-2) @ states)

            adjoint = dy.unsqueeze(-1) * c.unsqueeze(-2)
            adjoint[-1] += carry
            backwards = itertools.pairwise(adjoint.unbind(0)[::-1])
            for decay, (later, earlier) in zip(decays.unbind(0)[:0:-1], backwards, strict=True):
                earlier.addcmul_(decay, later)
            carry = decays[0] * adjoint[0]

            _add(grad_B, span, rows, (dt * u).unsqueeze(-2) @ adjoint)
            grad_drive = (adjoint @ b.unsqueeze(-1)).squeeze(-1)
            # From here on `decays` holds the gradient of Delta A: g_t x_{t-1} exp(Delta_t A).
            decays.mul_(adjoint)
            decays[1:] *= states[:-1]
            decays[0] *= start
            grad_inputs[span, rows] = grad_drive * dt
            grad_steps[span, rows] = (decays * A).sum(-1).addcmul_(grad_drive, u)
            grad_A += decays.mul_(dt.unsqueeze(-1)).sum((0, 1))
        grad_initial[rows] = carry
    return grad_inputs, grad_steps, grad_A, grad_B, grad_C, grad_initial


def _add(total: Tensor, span: slice, rows: slice, part: Tensor) -> None:
    """Put (Q, rows, G, 1, N) into its place, or sum it where all steps share one tensor."""
    if total.shape[:2] == (1, 1):
        total += part.squeeze(-2).sum((0, 1))
    else:
        total[span, rows] = part.squeeze(-2)
