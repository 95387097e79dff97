"""Layers as ports write them: S4D as a kernel with a length for an input, S5 in real numbers."""

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


class PairsS5(nn.Module):
    """S5 as forks of s5-pytorch keep it: every complex number a pair of real ones."""

    def __init__(
        self, width: int, states: int, *, bidir: bool = False, discretization: str = "bilinear"
    ) -> None:
        super().__init__()
        self.bidir, self.liquid, self.degree = bidir, False, 1
        self.discretize = {"zoh": discretize_zoh, "bilinear": discretize_bilinear}[discretization]
        decay = 0.3 + torch.rand(states)
        frequency = math.pi * (torch.rand(states) + torch.arange(states) - states / 2)
        self.Lambda = nn.Parameter(torch.stack((-decay, frequency), -1))
        self.B = nn.Parameter(torch.randn(states, width, 2))
        self.C = nn.Parameter(torch.randn(width, (1 + bidir) * states, 2))
        self.D = nn.Parameter(torch.randn(width))
        self.log_step = nn.Parameter(torch.linspace(math.log(0.05), math.log(0.5), states))

    def forward(self, signal: Tensor) -> Tensor:
        """Of (batch, L, width)."""
        poles, B, C = (torch.view_as_complex(p) for p in (self.Lambda, self.B, self.C))
        eigenvalues, gain = self.discretize(poles, self.log_step.exp())
        driven = signal.to(B.dtype) @ (gain.unsqueeze(-1) * B).mT
        states = self._run(eigenvalues, driven)
        if self.bidir:
            back = self._run(eigenvalues, driven.flip(1)).flip(1)
            states = torch.cat((states, back), -1)
        return (states @ C.mT).real + self.D * signal

    @staticmethod
    def _run(eigenvalues: Tensor, driven: Tensor) -> Tensor:
        state, states = torch.zeros_like(driven[:, 0]), []
        for x in driven.unbind(1):
            state = eigenvalues * state + x
            states.append(state)
        return torch.stack(states, 1)


def discretize_zoh(poles: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """The name says how."""
    return torch.exp(poles * step), torch.expm1(poles * step) / poles


def discretize_bilinear(poles: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """The name says how."""
    half = poles * step / 2
    return (1 + half) / (1 - half), step / (1 - half)
