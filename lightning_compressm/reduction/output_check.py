"""Whether a layer's output is what its system and a feedthrough give."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_compressm._precision import double, wide_dtype
from lightning_compressm.control import DiagonalLTI
from lightning_compressm.nn._autocast import full_precision
from lightning_compressm.nn.scan import linear_recurrence

__all__ = ["explains"]

_TOLERANCE = 0.02  # share of the system's output: rounding of products in TF32 is far below
_STEPS = 256  # of the start of a sequence that are looked at
_ENOUGH = 4  # times as many steps as inputs, so that a full feedthrough can't explain anything
_BYTES = 64 << 20  # of states


@torch.no_grad()
def explains(system: DiagonalLTI, inputs: Tensor, outputs: Tensor) -> bool:
    """Whether ``outputs = Re(C x) + D inputs`` from the zero state, for some matrix D.

    Args:
        system: one system, or a bank with one input and one output for each channel.
        inputs: (batch, L, H) real.
        outputs: (batch, L, P) real.

    Returns:
        False also where there is too little data to tell.

    Example:
        >>> import torch
        >>> one, u = torch.ones(1, 1), torch.randn(1, 20, 1)
        >>> impulse = DiagonalLTI(torch.tensor([0.0]), one, one)
        >>> explains(impulse, u, 3 * u), explains(impulse, u, torch.tanh(u))
        (True, False)
    """
    with full_precision(inputs.device):
        u, y = (_start(system, tensor) for tensor in (inputs, outputs))
        response = _response(system, u)
        rounding = 8 * torch.finfo(outputs.dtype).eps * y.norm()
        u, rest = u.flatten(0, 1), (y - response).flatten(0, 1)
        left = _without_feedthrough(u, rest, bank=bool(system.batch_shape))
        return bool(left <= _TOLERANCE * response.norm() + rounding)


def _start(system: DiagonalLTI, signals: Tensor) -> Tensor:
    """The first steps of some sequences, in float32 at least."""
    enough = _STEPS if system.batch_shape else max(_STEPS, _ENOUGH * system.n_inputs)
    length = min(signals.shape[1], _STEPS, max(8, _BYTES // (16 * system.eigenvalues.numel())))
    rows = signals[: -(-enough // length), :length]
    return rows.to(torch.promote_types(signals.dtype, torch.float32))


def _response(system: DiagonalLTI, u: Tensor) -> Tensor:
    """``Re(C x)``, sequence by sequence."""
    kind = u.dtype.to_complex()
    s = system.each(lambda tensor: tensor.to(u.device))
    wide = wide_dtype(u.device).to_complex()
    eigenvalues, B, C = s.eigenvalues.flatten().to(wide), s.B.to(kind), s.C.to(kind)
    outputs = []
    for row in u.to(kind):
        if not s.batch_shape:
            outputs.append((linear_recurrence(eigenvalues, row @ B.mT) @ C.mT).real)
            continue
        states = linear_recurrence(eigenvalues, (row.unsqueeze(-1) * B[..., 0]).flatten(1))
        outputs.append((states.view(len(row), *s.eigenvalues.shape) * C[:, 0]).sum(-1).real)
    return torch.stack(outputs)


def _without_feedthrough(u: Tensor, rest: Tensor, *, bank: bool) -> Tensor:
    """The norm of what no feedthrough explains: one for each channel, or a matrix if data suffice.

    Args:
        u: (steps, H).
        rest: outputs without those of the system, (steps, P).
        bank: whether channels can't mix.
    """
    norms = [rest.norm()]
    if u.shape == rest.shape:
        energy = u.square().sum(0)
        gain = torch.where(energy > 0, (u * rest).sum(0) / energy, 0)
        norms.append((rest - gain * u).norm())
    if not bank and len(u) >= _ENOUGH * u.shape[1]:
        u, rest = double(u), double(rest)
        gram = u.mT @ u
        damping = 1e-10 * gram.diagonal().mean() + torch.finfo(gram.dtype).tiny
        gram.diagonal().add_(damping)
        matrix = torch.linalg.solve(gram, u.mT @ rest)
        norms.append((rest - u @ matrix).norm().to(norms[0]))
    return torch.stack(norms).min()
