"""Layers that the package does not ship: an LRU port, look-alikes, and a user's own family."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_compressm import Family
from lightning_compressm.control import DiagonalLTI


class PortedLRU(nn.Module):
    """An LRU as ports write it: complex B and C, a loop, other names for the sizes."""

    def __init__(self, in_features: int, out_features: int, state_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.state_features = state_features
        radius = 0.5 + 0.45 * torch.rand(state_features)
        self.nu_log = nn.Parameter(torch.log(-torch.log(radius)))
        self.theta_log = nn.Parameter(torch.log(3.0 * torch.rand(state_features) + 1e-3))
        self.gamma_log = nn.Parameter(torch.log(torch.sqrt(1 - radius.square())))
        self.B = nn.Parameter(torch.randn(state_features, in_features, dtype=torch.complex64))
        self.C = nn.Parameter(torch.randn(out_features, state_features, dtype=torch.complex64))
        self.D = nn.Parameter(torch.randn(out_features, in_features))
        self.state = torch.zeros(state_features, dtype=torch.complex64)

    def forward(self, inputs: Tensor) -> Tensor:
        eigenvalues = torch.exp(torch.complex(-self.nu_log.exp(), self.theta_log.exp()))
        drive = inputs.to(self.B.dtype) @ self.B.mT * self.gamma_log.exp()
        state, states = torch.zeros_like(drive[:, 0]), []
        for x in drive.unbind(1):
            state = eigenvalues * state + x
            states.append(state)
        return (torch.stack(states, 1) @ self.C.mT).real + inputs @ self.D.mT


class Decay(nn.Module):
    """Real poles, and outputs that share one input matrix; nothing like an LRU."""

    def __init__(self, width: int, state_dim: int) -> None:
        super().__init__()
        self.state_dim = state_dim
        self.poles = nn.Parameter(torch.randn(state_dim, dtype=torch.complex64))
        self.enter = nn.Parameter(torch.randn(state_dim, width, dtype=torch.complex64))
        self.leave = nn.Parameter(torch.randn(width, state_dim, dtype=torch.complex64))

    @property
    def state_size(self) -> int:
        return self.state_dim

    def eigenvalues(self) -> Tensor:
        return self.poles / (1 + self.poles.abs())

    def forward(self, inputs: Tensor) -> Tensor:
        poles, drive = self.eigenvalues(), inputs.to(self.enter.dtype) @ self.enter.mT
        state, outputs = torch.zeros_like(drive[:, 0]), []
        for x in drive.unbind(1):
            state = poles * state + x
            outputs.append((state @ self.leave.mT).real)
        return torch.stack(outputs, 1)


class DecayFamily(Family):
    """A user's own family, as the documentation shows it."""

    name: ClassVar[str] = "Decay"

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, Decay)

    def state_axes(self, module: nn.Module) -> dict[str, int]:
        return {"poles": 0, "enter": 0, "leave": 1}

    def system(self, module: nn.Module) -> DiagonalLTI:
        return DiagonalLTI(module.eigenvalues(), module.enter, module.leave)

    def write(self, module: nn.Module, system: DiagonalLTI) -> dict[str, Tensor]:
        poles = system.eigenvalues / (1 - system.eigenvalues.abs())
        return {"poles": poles, "enter": system.B, "leave": system.C}

    def example(self, d_state: int = 8) -> tuple[nn.Module, Tensor]:
        return Decay(3, d_state), torch.randn(2, 12, 3)
