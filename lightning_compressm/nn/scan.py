"""Diagonal linear recurrences along a sequence, with exact and memory-bounded gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_compressm.nn._forms import form_for
from lightning_compressm.nn._once import once_differentiable
from lightning_compressm.nn._plain import plain_linear_recurrence, wants_plain_operations
from lightning_compressm.nn._row_blocks import row_blocks

__all__ = ["linear_recurrence"]

_COMPLEX = (torch.complex64, torch.complex128)


def linear_recurrence(
    eigenvalues: Tensor, inputs: Tensor, initial_state: Tensor | None = None
) -> Tensor:
    r"""Run :math:`x_k = \lambda \odot x_{k-1} + u_k` along a sequence.

    On a CPU a two-level scan in about :math:`2\sqrt{L}` steps: chunks side by side, then their
    ends, then a correction by powers of :math:`\lambda`. On CUDA one Triton kernel, where Triton
    works; on other devices a scan in about :math:`2 \log_2 L` steps. Powers are computed in double
    precision where the device has it. Any length works and nothing is padded. The backward pass
    is the same scan in reverse with :math:`\bar\lambda`; of the forward pass it keeps the states,
    once.

    Gradients flow to all three arguments, once: differentiating a gradient raises
    ``RuntimeError`` unless ``torch.func`` took it. Autocast leaves complex numbers alone. Under
    ``torch.compile`` the scan runs eagerly at a graph break, because compiled complex scans are
    slower. While it is exported or traced, and under the transforms of ``torch.func``, it runs in
    plain operations.

    Args:
        eigenvalues: (N,) complex64 or complex128; not restricted to the unit disc, but outside it
            powers must not overflow: up to :math:`\lambda^{L/2}` on devices that are neither CPU
            nor CUDA.
        inputs: (..., L, N) complex64 or complex128, L >= 1.
        initial_state: (..., N) complex, the state before the first step; None means zero.

    Returns:
        The states after each step, (..., L, N), in the dtype of ``inputs``.

    Raises:
        TypeError: an argument is not complex.
        ValueError: the shapes do not fit together, or L is 0.

    Source:
        The recurrence is that of Orvieto et al. (2023), "Resurrecting Recurrent Neural Networks
        for Long Sequences", arXiv 2303.06349, section 3; two-level scans are described by
        Blelloch (1990), "Prefix Sums and Their Applications".

    Example:
        >>> import torch
        >>> half, ones = torch.tensor([0.5 + 0j]), torch.ones(4, 1, dtype=torch.complex64)
        >>> linear_recurrence(half, ones).real.flatten()
        tensor([1.0000, 1.5000, 1.7500, 1.8750])
        >>> linear_recurrence(half, ones[:2], torch.tensor([1.5 + 0j])).real.flatten()
        tensor([1.7500, 1.8750])
    """
    _check(eigenvalues, inputs, initial_state)
    if wants_plain_operations():
        return plain_linear_recurrence(eigenvalues, inputs, initial_state)
    states: Tensor = _apply(eigenvalues, inputs, initial_state)
    return states


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _apply(eigenvalues: Tensor, inputs: Tensor, initial_state: Tensor | None) -> Any:
    return _LinearRecurrence.apply(eigenvalues, inputs, initial_state)


class _LinearRecurrence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, eigenvalues: Tensor, inputs: Tensor, initial_state: Tensor | None
    ) -> Tensor:
        form = form_for(inputs.device, inputs.dtype)
        powers = form.powers_of(eigenvalues, inputs.shape[-2], inputs.dtype)
        states = inputs.clone(memory_format=torch.contiguous_format).resolve_conj()
        if initial_state is not None:
            states[..., 0, :].addcmul_(powers[0], initial_state.to(inputs.dtype))
        rows = states.view(-1, *states.shape[-2:])
        for block in _blocks(rows):
            form.scan_(rows[block], powers)
        ctx.save_for_backward(eigenvalues, powers, states, initial_state)
        return states

    @staticmethod
    @torch.compiler.disable  # type: ignore[untyped-decorator]  # a compiled step gets here too
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:
        eigenvalues, powers, states, initial_state = ctx.saved_tensors
        form = form_for(states.device, states.dtype)
        # The conjugate h of the adjoint obeys the recurrence with lambda itself, and then
        # conj(d lambda) = sum_k h_k x_{k-1} needs no conjugated copy of the states.
        adjoint = torch.conj_physical(grad.contiguous())
        total = torch.zeros_like(eigenvalues, dtype=powers.dtype)
        adjoint_rows, state_rows = (t.view(-1, *t.shape[-2:]) for t in (adjoint, states))
        for block in _blocks(adjoint_rows):
            if ctx.needs_input_grad[0]:
                total += form.adjoint_scan_(adjoint_rows[block], state_rows[block], powers)
            else:
                form.scan_(adjoint_rows[block], powers, reverse=True)
        grad_initial = None
        if initial_state is not None:
            first = adjoint[..., 0, :]
            grad_initial = (powers[0] * first).conj_physical_().to(initial_state.dtype)
            total += (first * initial_state).reshape(-1, total.shape[0]).sum(0)
        return total.conj_physical_().to(eigenvalues.dtype), adjoint.conj_physical_(), grad_initial


def _blocks(rows: Tensor) -> list[slice]:
    return row_blocks(rows.shape[0], rows[0:1].nbytes or rows.element_size(), rows.device)


def _check(eigenvalues: Tensor, inputs: Tensor, initial_state: Tensor | None) -> None:
    named = {"eigenvalues": eigenvalues, "inputs": inputs}
    if initial_state is not None:
        named["initial_state"] = initial_state
    for name, tensor in named.items():
        if tensor.dtype not in _COMPLEX:
            raise TypeError(
                f"{name} must be complex64 or complex128, got {tensor.dtype}; "
                "convert it, for example by torch.complex(x, torch.zeros_like(x))"
            )
    if inputs.ndim < 2 or inputs.shape[-2] == 0:
        raise ValueError(
            f"inputs must have shape (..., L, N) with at least one step (L >= 1), "
            f"got {tuple(inputs.shape)}"
        )
    states = inputs.shape[-1]
    if eigenvalues.shape != (states,) or states == 0:
        raise ValueError(
            f"eigenvalues must have shape (N,) with N = {states} >= 1, the last dimension of "
            f"inputs {tuple(inputs.shape)}, got {tuple(eigenvalues.shape)}"
        )
    start = (*inputs.shape[:-2], states)
    if initial_state is not None and initial_state.shape != start:
        raise ValueError(
            f"initial_state must have shape (..., N) = {start} to fit inputs "
            f"{tuple(inputs.shape)}, got {tuple(initial_state.shape)}"
        )
