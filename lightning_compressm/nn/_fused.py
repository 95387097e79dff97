"""The whole LRU recurrence as one autograd node: input map, scan and read-out, block by block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_compressm.nn._adjoint import conjugating_sign
from lightning_compressm.nn._autocast import full_precision
from lightning_compressm.nn._chunked import best_chunk, chunked_diagonal
from lightning_compressm.nn._forms import form_for
from lightning_compressm.nn._once import once_differentiable
from lightning_compressm.nn._plain import plain_diagonal, wants_plain_operations
from lightning_compressm.nn._row_blocks import row_blocks

__all__ = ["fused_diagonal", "fused_lru"]

# Up to this many channels BLAS is up to twice as fast on the transposed, wide result.
_NARROW = 8


def fused_lru(
    inputs: Tensor,
    decay: Tensor,
    phase: Tensor,
    input_weight: Tensor,
    output_weight: Tensor,
    feedthrough: Tensor,
) -> Tensor:
    r"""Run :math:`x_k = \lambda x_{k-1} + B u_k`, :math:`y_k = \mathrm{Re}(C x_k) + D u_k`.

    Complex numbers travel as interleaved (re, im) pairs, so both maps are real matrix products.
    With few channels for each state the work is done in chunks
    (:func:`~lightning_compressm.nn._chunked.chunked_diagonal`). Otherwise
    the batch goes through map, scan and map in blocks that fit into the cache. The states are
    kept, once, only where a gradient needs them; the backward pass has one block of its own.
    Weights are (H, 2N): with few channels, products with (2N, H) are several times slower.

    Args:
        inputs: (batch, L, H) float32 or float64, L >= 1.
        decay: (N,), positive, -log |lambda|; float64 where the device has it.
        phase: (N,), arg lambda in radians; dtype of ``decay``.
        input_weight: (H, 2N), columns Re B_1, Im B_1, Re B_2, ... (B transposed).
        output_weight: (H, 2N), columns Re C_1, -Im C_1, Re C_2, ...
        feedthrough: (H,), the diagonal of D.

    Returns:
        (batch, L, H) in the dtype of ``inputs``.
    """
    weights = (input_weight, output_weight, feedthrough)
    if wants_plain_operations():
        radius = torch.exp(-decay)
        return plain_diagonal(inputs, (radius * phase.cos(), radius * phase.sin()), *weights)
    outputs: Tensor = _apply(inputs, decay, phase, *weights)
    return outputs


def fused_diagonal(
    inputs: Tensor,
    real: Tensor,
    imag: Tensor,
    input_weight: Tensor,
    output_weight: Tensor,
    feedthrough: Tensor,
) -> Tensor:
    """The same for eigenvalues given by their real and imaginary parts, (N,) each."""
    weights = (input_weight, output_weight, feedthrough)
    if wants_plain_operations():
        return plain_diagonal(inputs, (real, imag), *weights)
    outputs: Tensor = _apply_cartesian(inputs, real, imag, *weights)
    return outputs


# Complex numbers only in here: torch.compile can't generate code for them.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _apply(inputs: Tensor, decay: Tensor, phase: Tensor, *weights: Tensor) -> Any:
    return _run(inputs, torch.complex(-decay, phase).exp(), *weights)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _apply_cartesian(inputs: Tensor, real: Tensor, imag: Tensor, *weights: Tensor) -> Any:
    return _run(inputs, torch.complex(real, imag), *weights)


def _run(inputs: Tensor, eigenvalues: Tensor, *weights: Tensor) -> Any:
    chunk = best_chunk(inputs.shape[1], inputs.shape[2], len(eigenvalues))
    if chunk is not None and len(inputs) > 0:
        return chunked_diagonal(chunk, inputs, eigenvalues, *weights)
    tensors = (inputs, eigenvalues, *weights)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return _FusedLRU.apply(*tensors)
    return _forward(*tensors, keep_states=False)[0]


def _forward(
    inputs: Tensor,
    eigenvalues: Tensor,
    input_weight: Tensor,
    output_weight: Tensor,
    feedthrough: Tensor,
    *,
    keep_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return outputs, states (M, L, 2N) (those of the last block unless kept) and powers."""
    batch, length, width = inputs.shape
    pairs = input_weight.shape[1]
    form = form_for(inputs.device, inputs.dtype.to_complex())
    powers = form.powers_of(eigenvalues, length, inputs.dtype.to_complex())
    inputs = inputs.contiguous()
    blocks = _blocks(inputs, pairs)
    rows = batch if keep_states else _longest(blocks)
    states = inputs.new_empty(rows, length, pairs)
    outputs = torch.empty_like(inputs)
    for block in blocks:
        x = states[block] if keep_states else states[: block.stop - block.start]
        torch.mm(inputs[block].view(-1, width), input_weight, out=x.view(-1, pairs))
        form.scan_(_as_complex(x), powers)
        _read_out(x, output_weight, inputs[block], feedthrough, out=outputs[block])
    return outputs, states, powers


class _FusedLRU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        inputs, eigenvalues, input_weight, output_weight, feedthrough = tensors
        with full_precision(inputs.device):
            outputs, states, powers = _forward(*tensors, keep_states=True)
        ctx.eigenvalue_dtype = eigenvalues.dtype
        ctx.save_for_backward(inputs, states, powers, input_weight, output_weight, feedthrough)
        return outputs

    @staticmethod
    @torch.compiler.disable  # type: ignore[untyped-decorator]  # a compiled step gets here too
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        with full_precision(grad.device):
            grads = _backward(grad, *ctx.saved_tensors)
        return (grads[0], grads[1].to(ctx.eigenvalue_dtype), *grads[2:])


def _backward(
    grad: Tensor,
    inputs: Tensor,
    states: Tensor,
    powers: Tensor,
    input_weight: Tensor,
    output_weight: Tensor,
    feedthrough: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of inputs, eigenvalues, input and output weight, feedthrough."""
    _, length, width = inputs.shape
    pairs = input_weight.shape[1]
    grad, inputs = grad.contiguous(), inputs.contiguous()
    # The conjugate h of the adjoint obeys the recurrence with lambda itself; conjugating is a
    # sign on every second column of the weights.
    sign = conjugating_sign(inputs, pairs)
    conjugate_out, conjugate_in = output_weight * sign, input_weight * sign
    grad_in, grad_out = torch.zeros_like(input_weight), torch.zeros_like(output_weight)
    grad_eigenvalues = torch.zeros_like(powers[0])
    grad_inputs = torch.empty_like(inputs)
    form = form_for(powers.device, powers.dtype)
    blocks = _blocks(inputs, pairs)
    workspace = inputs.new_empty(_longest(blocks), length, pairs)
    for block in blocks:
        h = workspace[: block.stop - block.start]
        flat_h, flat_x = h.view(-1, pairs), states[block].view(-1, pairs)
        flat_grad, flat_u = grad[block].view(-1, width), inputs[block].view(-1, width)
        torch.mm(flat_grad, conjugate_out, out=flat_h)
        grad_eigenvalues += form.adjoint_scan_(_as_complex(h), _as_complex(states[block]), powers)
        grad_out.addmm_(flat_grad.t(), flat_x)
        grad_in.addmm_(flat_u.t(), flat_h)
        _read_out(h, conjugate_in, grad[block], feedthrough, out=grad_inputs[block])
    grad_feedthrough = (grad * inputs).sum((0, 1))
    grad_in *= sign
    return grad_inputs, grad_eigenvalues.conj_physical_(), grad_in, grad_out, grad_feedthrough


def _read_out(
    states: Tensor, weight: Tensor, inputs: Tensor, feedthrough: Tensor, *, out: Tensor
) -> None:
    """Write ``states @ weight.t() + feedthrough * inputs`` into ``out``."""
    width, pairs = weight.shape
    flat_states, flat_out = states.view(-1, pairs), out.view(-1, width)
    if width <= _NARROW:
        product = torch.mm(weight, flat_states.t()).t()
    else:
        product = torch.mm(flat_states, weight.t(), out=flat_out)
    torch.addcmul(product, inputs.view(-1, width), feedthrough, out=flat_out)


def _as_complex(pairs: Tensor) -> Tensor:
    """View (M, L, 2N) real as (M, L, N) complex."""
    return torch.view_as_complex(pairs.view(*pairs.shape[:2], -1, 2))


def _blocks(inputs: Tensor, pairs: int) -> list[slice]:
    batch, length, _ = inputs.shape
    return row_blocks(batch, length * pairs * inputs.element_size(), inputs.device)


def _longest(blocks: list[slice]) -> int:
    return max((block.stop - block.start for block in blocks), default=0)
