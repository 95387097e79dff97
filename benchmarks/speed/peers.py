"""The same recurrence in other ways: what other packages and plain PyTorch would do.

Each takes an LRU and its inputs and computes what the layer computes; none shares code with it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_compressm.nn import LRU

Form = Callable[[LRU, Tensor], Tensor]


def python_loop(layer: LRU, inputs: Tensor) -> Tensor:
    """Step by step, on unbound tensors: indexing the sequence would make backward quadratic."""
    eigenvalues, drive = _driven(layer, inputs)
    state = torch.zeros_like(drive[:, 0])
    states = []
    for step in drive.unbind(1):
        state = eigenvalues * state + step
        states.append(state)
    return _read(layer, torch.stack(states, 1), inputs)


def convolution(layer: LRU, inputs: Tensor) -> Tensor:
    """Every state by its own impulse response, with the FFT."""
    eigenvalues, drive = _driven(layer, inputs)
    length = drive.shape[1]
    exponents = torch.arange(length, dtype=torch.float64)
    # In double precision: phases of high powers would lose their digits.
    powers = (eigenvalues.to(torch.complex128).log() * exponents.unsqueeze(-1)).exp()
    size = 1 << (2 * length - 1).bit_length()
    spectrum = torch.fft.fft(powers.to(drive.dtype), size, dim=0)
    states = torch.fft.ifft(torch.fft.fft(drive, size, dim=1) * spectrum, dim=1)[:, :length]
    return _read(layer, states, inputs)


def associative_scan(layer: LRU, inputs: Tensor) -> Tensor:
    """PyTorch's own generic scan, which runs eagerly on a CPU."""
    from torch._higher_order_ops.associative_scan import associative_scan as scan

    eigenvalues, drive = _driven(layer, inputs)
    pairs = (eigenvalues.expand(drive.shape), drive)
    _, states = scan(_combine, pairs, 1, combine_mode="generic")
    return _read(layer, states, inputs)


def forms() -> dict[str, Form | str]:
    """All of them by name; a word of explanation in place of what this PyTorch lacks."""
    return {
        "PyTorch, associative_scan": associative_scan if has_scan() else "not in this PyTorch",
        "PyTorch, FFT for each state": convolution,
        "PyTorch, loop over unbound steps": python_loop,
    }


def has_scan() -> bool:
    """Whether this PyTorch has the generic scan, which is a prototype there."""
    return importlib.util.find_spec("torch._higher_order_ops.associative_scan") is not None


def _combine(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return left[0] * right[0], right[0] * left[1] + right[1]


def _driven(layer: LRU, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (N,) and gamma B u, (batch, L, N)."""
    B = torch.complex(layer.B_re, layer.B_im) * layer.gamma_log.exp().unsqueeze(-1)
    eigenvalues = torch.complex(-layer.nu_log.exp(), layer.theta_log.exp()).exp()
    return eigenvalues, inputs.to(B.dtype) @ B.mT


def _read(layer: LRU, states: Tensor, inputs: Tensor) -> Tensor:
    return (states @ torch.complex(layer.C_re, layer.C_im).mT).real + layer.D * inputs
