"""S4D as ports of the original code write it: a kernel module with a length for an input."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


class S4DKernel(nn.Module):
    """The kernel of each channel; without a learning rate for them, A and dt are buffers."""

    def __init__(self, width: int, states: int, *, learned: bool = True) -> None:
        super().__init__()
        self.n = states
        self.C = nn.Parameter(torch.randn(width, states, 2) / math.sqrt(2))
        steps = torch.linspace(math.log(0.01), math.log(0.2), width)
        frequencies = math.pi * torch.arange(states, dtype=torch.float32).repeat(width, 1)
        self._add("log_dt", steps, learned)
        self._add("log_A_real", torch.full((width, states), math.log(0.5)), learned)
        self._add("A_imag", frequencies, learned)

    def _add(self, name: str, value: Tensor, learned: bool) -> None:
        if not learned:
            self.register_buffer(name, value)
            return
        self.register_parameter(name, nn.Parameter(value))
        self.get_parameter(name)._optim = {"weight_decay": 0.0, "lr": 1e-3}

    def forward(self, L: int) -> Tensor:
        dt = torch.exp(self.log_dt).unsqueeze(-1)
        A = torch.complex(-torch.exp(self.log_A_real), self.A_imag)
        C = torch.view_as_complex(self.C) * (torch.exp(dt * A) - 1) / A
        times = torch.arange(L, device=A.device)
        return (
            2 * (C.unsqueeze(-2) * torch.exp((dt * A).unsqueeze(-2) * times[:, None])).sum(-1).real
        )


class PortedS4D(nn.Module):
    """A layer around the kernel, on (batch, H, L)."""

    def __init__(self, width: int, states: int, **arguments: Any) -> None:
        super().__init__()
        self.kernel = S4DKernel(width, states, **arguments)
        self.D = nn.Parameter(torch.randn(width))
        self.out = nn.Linear(width, width)

    def forward(self, u: Tensor) -> Tensor:
        length = u.shape[-1]
        k = self.kernel(L=length)
        spectrum = torch.fft.rfft(u, n=2 * length) * torch.fft.rfft(k, n=2 * length)
        y = torch.fft.irfft(spectrum, n=2 * length)[..., :length] + u * self.D.unsqueeze(-1)
        return self.out(y.mT).mT
