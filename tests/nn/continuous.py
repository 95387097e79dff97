"""The layers with continuous-time parameters, as plain loops in double precision."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_compressm.nn import S4D, S5
from tests.nn._reference import naive_recurrence


def discretized(poles: Tensor, step: Tensor, method: str) -> tuple[Tensor, Tensor]:
    """Textbook formulas in complex128: eigenvalues, and what B is multiplied with."""
    z = step * poles
    if method == "zoh":
        return torch.exp(z), (torch.exp(z) - 1) / poles
    return (1 + z / 2) / (1 - z / 2), step / (1 - z / 2)


def naive_s4d(layer: S4D, inputs: Tensor) -> Tensor:
    p = {name: value.double() for name, value in layer.named_parameters()}
    poles = torch.complex(-torch.exp(p["log_A_real"]), p["A_imag"])
    step = torch.exp(p["log_dt"]).unsqueeze(-1)
    eigenvalues, gain = discretized(poles, step, layer.discretization)
    u = inputs.double()
    driven = gain * u.unsqueeze(-1)
    states = naive_recurrence(eigenvalues.flatten(), driven.flatten(-2)).view_as(driven)
    C = torch.view_as_complex(p["C"].contiguous())
    return 2 * (C * states).sum(-1).real + p["D"] * u


def naive_s5(layer: S5, inputs: Tensor) -> Tensor:
    p = {name: value.double() for name, value in layer.named_parameters()}
    poles = torch.complex(-torch.exp(p["log_Lambda_re"]), p["Lambda_im"])
    eigenvalues, gain = discretized(poles, torch.exp(p["log_step"]), layer.discretization)
    B, C = torch.complex(p["B_re"], p["B_im"]), torch.complex(p["C_re"], p["C_im"])
    u = inputs.double()
    driven = u.to(B.dtype) @ (gain.unsqueeze(-1) * B).T
    return 2 * (naive_recurrence(eigenvalues, driven) @ C.T).real + p["D"] * u
