"""Plain loops that are obviously right, written from the definitions and nothing else."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_compressm.nn import LRU

TOLERANCE = {torch.complex64: 3e-5, torch.complex128: 1e-11}


def problem(
    shape: tuple[int, ...], dtype: torch.dtype = torch.complex128, radius: float = 0.99
) -> tuple[Tensor, Tensor, Tensor]:
    """Random eigenvalues, inputs and initial state that all want gradients."""
    generator = torch.Generator().manual_seed(sum(shape))
    radii, phases = torch.rand(2, shape[-1], generator=generator, dtype=torch.float64)
    eigenvalues = torch.polar(radius * radii.sqrt(), 6.28 * phases).to(dtype)
    inputs = torch.randn(shape, dtype=dtype, generator=generator)
    start = torch.randn(*shape[:-2], shape[-1], dtype=dtype, generator=generator)
    return eigenvalues.requires_grad_(), inputs.requires_grad_(), start.requires_grad_()


def naive_recurrence(
    eigenvalues: Tensor, inputs: Tensor, initial_state: Tensor | None = None
) -> Tensor:
    state = torch.zeros_like(inputs[..., 0, :]) if initial_state is None else initial_state
    states = []
    for u in inputs.unbind(-2):
        state = eigenvalues * state + u
        states.append(state)
    return torch.stack(states, -2)


def naive_lru(layer: LRU, inputs: Tensor) -> Tensor:
    """Run the layer's equations in complex128, whatever the dtype of layer and inputs."""
    p = {name: value.double() for name, value in layer.named_parameters()}
    eigenvalues = torch.exp(torch.complex(-torch.exp(p["nu_log"]), torch.exp(p["theta_log"])))
    B, C = torch.complex(p["B_re"], p["B_im"]), torch.complex(p["C_re"], p["C_im"])
    u = inputs.double()
    driven = torch.exp(p["gamma_log"]) * (u.to(B.dtype) @ B.T)
    return (naive_recurrence(eigenvalues, driven) @ C.T).real + p["D"] * u


def relative_error(actual: Tensor, expected: Tensor) -> float:
    scale = expected.abs().max().clamp_min(1e-30)
    return ((actual.to(expected.dtype) - expected).abs().max() / scale).item()
