"""The smallest layer with the parameters of an S4 kernel, for the contract tests."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lightning_compressm.nn._convolution import causal_convolution

__all__ = ["S4Example"]


class S4Example(nn.Module):
    """A bank of H bilinear systems x' = (A - P P^*) x + B u, y = 2 Re(C x), run as a convolution.

    Without low rank there is no P, and the systems are diagonal. Inputs are (batch, L, H).
    """

    def __init__(self, width: int, states: int, *, low_rank: bool = False) -> None:
        """Steps from 0.05 to 0.5, frequencies near pi n: no two poles are close."""
        super().__init__()
        self.N, self.disc = states, "bilinear"
        frequencies = math.pi * (torch.arange(states) + torch.rand(width, states) / 2 + 0.5)
        steps = torch.linspace(math.log(0.05), math.log(0.5), width)
        self.inv_dt = nn.Parameter(steps.unsqueeze(-1))
        self.A_real = nn.Parameter(torch.rand(width, states).log())
        self.A_imag = nn.Parameter(frequencies)
        self.B = nn.Parameter(torch.randn(1, width, states, 2))
        self.C = nn.Parameter(torch.randn(1, width, states, 2))
        if low_rank:
            self.P = nn.Parameter(0.3 * torch.randn(1, width, states, 2))
            self.register_buffer("l_kernel", torch.tensor(0))

    def forward(self, inputs: Tensor) -> Tensor:
        """The causal convolution with each channel's impulse response."""
        own = {name: _wide(parameter) for name, parameter in self.named_parameters()}
        steps = own["inv_dt"].exp()
        A = torch.diag_embed(_both(torch.complex(-own["A_real"].exp(), -own["A_imag"])))
        if "P" in own:
            P = _both(torch.complex(*own["P"].unbind(-1)))
            A = A - torch.einsum("rhm,rhn->hmn", P, P.conj())
        half = steps.unsqueeze(-1) / 2 * A
        eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
        step = torch.linalg.solve(eye - half, eye + half)
        B, C = (_both(torch.complex(*own[name][0].unbind(-1))) for name in "BC")
        state = torch.linalg.solve(eye - half, (steps * B).unsqueeze(-1))
        kernel = []
        for _ in range(inputs.shape[1]):
            kernel.append((C.unsqueeze(-2) @ state).real.flatten())
            state = step @ state
        outputs: Tensor = causal_convolution(_wide(inputs), torch.stack(kernel, -1))
        return outputs.to(inputs.dtype)


def _wide(tensor: Tensor) -> Tensor:
    """Linear algebra knows no half precision."""
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor


def _both(values: Tensor) -> Tensor:
    """Both halves of conjugate pairs."""
    return torch.cat((values, values.conj()), -1)
