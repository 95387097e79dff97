"""The scan as one Triton kernel, for CUDA. Only :mod:`._forms` imports this, when it needs it."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_compressm._precision import wide_dtype

__all__ = ["adjoint_scan_", "powers_of", "scan_"]

# One warp scans a tile of STEPS x STATES, one state a lane: steps then follow one another in
# registers, and all loads of a tile are under way at once. Longer tiles spill registers (seen in
# the code compiled for 8.0 and 9.0).
STEPS = 16
STATES = 32


@triton.jit
def _compose(  # type: ignore[no-untyped-def]
    a_re, a_im, x_re, x_im, b_re, b_im, y_re, y_im
):
    """The map s -> a s + x, and after it s -> b s + y."""
    return (
        b_re * a_re - b_im * a_im,
        b_re * a_im + b_im * a_re,
        b_re * x_re - b_im * x_im + y_re,
        b_re * x_im + b_im * x_re + y_im,
    )


# Numbers are loaded as they lie, real and imaginary part side by side, and taken apart in
# registers. Rows of a tile are contiguous then, which tells every version of Triton to give
# neighbouring states to neighbouring lanes; where each part has a load of its own, 3.6 gives them
# neighbouring steps, far apart in memory. Pairs are known to be aligned, and no more is, as `count`
# may be odd: so a lane has just one state.
@triton.jit(do_not_specialize=["length", "count"])  # type: ignore[untyped-decorator]
def _scan_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # (M, L, N, 2): inputs, overwritten by states
    powers_ptr,  # (STEPS, N, 2): lambda ** (1, ..., STEPS)
    other_ptr,  # (M, L, N, 2): the states of the forward pass, read only for products
    product_ptr,  # (M, N, 2): sum over k of x_k other_{k-1}
    length,
    count,
    REVERSE: tl.constexpr,
    PRODUCT: tl.constexpr,
    STEPS: tl.constexpr,
    STATES: tl.constexpr,
):
    # Offsets of more than 2^31 elements are common.
    row = tl.program_id(0).to(tl.int64)
    number = tl.program_id(1) * 2 * STATES + tl.arange(0, 2 * STATES)
    step = tl.arange(0, STEPS)
    known = (number < 2 * count)[None, :]
    SIZE: tl.constexpr = x_ptr.dtype.element_ty.primitive_bitwidth // 8
    table = powers_ptr + step[:, None] * (2 * count) + number[None, :]
    table = tl.multiple_of(table, (SIZE, 2 * SIZE))
    powers = tl.load(table, mask=known, other=0.0)
    power_re, power_im = tl.split(tl.reshape(powers, (STEPS, STATES, 2)))
    # A combination always multiplies by the first power; sums pick single rows of a tile.
    first, last = (step == 0)[:, None], (step == STEPS - 1)[:, None]
    a_re = tl.broadcast_to(tl.sum(tl.where(first, power_re, 0.0), 0)[None, :], (STEPS, STATES))
    a_im = tl.broadcast_to(tl.sum(tl.where(first, power_im, 0.0), 0)[None, :], (STEPS, STATES))
    carry_re = tl.zeros((STATES,), x_ptr.dtype.element_ty)
    carry_im, sum_re, sum_im = carry_re, carry_re, carry_re
    for start in range(0, length, STEPS):
        done = start + step
        time = length - 1 - done if REVERSE else done
        mask = (done < length)[:, None] & known
        offset = (row * length + time)[:, None] * (2 * count) + number[None, :]
        place = tl.multiple_of(x_ptr + offset, (SIZE, 2 * SIZE))
        u = tl.load(place, mask=mask, other=0.0)
        u_re, u_im = tl.split(tl.reshape(u, (STEPS, STATES, 2)))
        _, _, x_re, x_im = tl.associative_scan((a_re, a_im, u_re, u_im), 0, _compose)
        # The state before the tile comes in by powers that were rounded once.
        x_re += power_re * carry_re[None, :] - power_im * carry_im[None, :]
        x_im += power_re * carry_im[None, :] + power_im * carry_re[None, :]
        carry_re = tl.sum(tl.where(last, x_re, 0.0), 0)
        carry_im = tl.sum(tl.where(last, x_im, 0.0), 0)
        if PRODUCT:
            earlier = mask & (time > 0)[:, None]
            before = tl.multiple_of(other_ptr + offset - 2 * count, (SIZE, 2 * SIZE))
            y = tl.load(before, mask=earlier, other=0.0)
            y_re, y_im = tl.split(tl.reshape(y, (STEPS, STATES, 2)))
            sum_re += tl.sum(x_re * y_re - x_im * y_im, 0)
            sum_im += tl.sum(x_re * y_im + x_im * y_re, 0)
        # No lane may overwrite what another has yet to read.
        tl.debug_barrier()
        x = tl.reshape(tl.join(x_re, x_im), (STEPS, 2 * STATES))
        tl.store(place, x, mask=mask)
    if PRODUCT:
        total = tl.reshape(tl.join(sum_re, sum_im), (2 * STATES,))
        place = tl.multiple_of(product_ptr + row * (2 * count) + number, 2 * SIZE)
        tl.store(place, total, mask=number < 2 * count)


def powers_of(eigenvalues: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """Return ``eigenvalues ** (1, ..., STEPS)``, (STEPS, N), rounded only once to ``dtype``.

    The length plays no part: every tile has the same number of steps.
    """
    wide = eigenvalues.to(wide_dtype(eigenvalues.device).to_complex())
    return wide.expand(STEPS, -1).cumprod(0).to(dtype).contiguous()


def scan_(states: Tensor, powers: Tensor, *, reverse: bool = False) -> None:
    r"""Overwrite inputs :math:`u` by states :math:`x_k = \lambda x_{k-1} + u_k`, zero before.

    One program for each sequence and block of states walks along the sequence, tile by tile.

    Args:
        states: (M, L, N) complex64 or complex128, contiguous; overwritten.
        powers: from :func:`powers_of`, of the same dtype.
        reverse: run from the last step to the first, :math:`x_k = \lambda x_{k+1} + u_k`.
    """
    _launch(states, powers, None, None, reverse)


def adjoint_scan_(adjoint: Tensor, states: Tensor, powers: Tensor) -> Tensor:
    r"""Scan ``adjoint`` in reverse and return :math:`\sum_{m, k \ge 1} g_{m,k} x_{m,k-1}`, (N,)."""
    products = adjoint.new_empty(adjoint.shape[0], adjoint.shape[2])
    _launch(adjoint, powers, states, products, True)
    return products.sum(0)


def _launch(
    states: Tensor, powers: Tensor, other: Tensor | None, products: Tensor | None, reverse: bool
) -> None:
    rows, length, count = states.shape
    if rows == 0:
        return
    # Kernels get pointers, and would read another layout as this one.
    for tensor in (states, powers, other):
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"the scan needs contiguous tensors, got strides {tensor.stride()}")
    kernel: Any = _scan_kernel
    x, table = torch.view_as_real(states), torch.view_as_real(powers)
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device_of(states):  # type: ignore[no-untyped-call]
        kernel[(rows, triton.cdiv(count, STATES))](
            x,
            table,
            x if other is None else torch.view_as_real(other),
            x if products is None else torch.view_as_real(products),
            length,
            count,
            REVERSE=reverse,
            PRODUCT=products is not None,
            STEPS=STEPS,
            STATES=STATES,
            num_warps=1,
        )
