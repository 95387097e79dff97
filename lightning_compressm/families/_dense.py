"""Banks of dense real systems in diagonal form, also where the state matrix is far from normal.

The eigenvectors of HiPPO-LegS are all but dependent in double precision. So the weights of its
poles come from a least squares fit to the frequency response, where eigenvectors give bad ones; and
a balanced system loses the states that cost more in rounding than they are worth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_compressm.control.hankel import NEGLIGIBLE
from lightning_compressm.errors import IllConditionedError

__all__ = ["diagonal_form"]

# Errors as shares of the largest Hankel singular value.
_EXACT, _USABLE = 1e-10, 1e-3
_AROUND = ((-4.0,), (-1.0,), (0.0,), (1.0,), (4.0,))  # times a pole's distance to the circle
_SQUARINGS = 60
_SPARE = 0.5  # the eigenvalue of states that nothing reads


def diagonal_form(A: Tensor, B: Tensor, C: Tensor, states: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues and weights with ``C A^k B = Re(sum of weights * eigenvalues ** k)``.

    Gradients of the matrices reach both.

    Args:
        A: stable, (H, K, K), float64.
        B: (H, K, 1).
        C: (H, outputs, K).
        states: at least so many come back.

    Returns:
        (H, M) and (H, outputs, M), complex128, one state for a conjugate pair or for a real pole; M
        is ``states``, or more if real poles need it.

    Raises:
        IllConditionedError: if rounding costs too much all the same.
    """
    systems = zip(A, B, C, *_balancing(A, B, C), strict=True)
    parts = [_diagonal(_System(a, b, c), *balanced) for a, b, c, *balanced in systems]
    size = max(states, *(len(eigenvalues) for eigenvalues, _ in parts))
    eigenvalues = [_padded(values, size, _SPARE) for values, _ in parts]
    return torch.stack(eigenvalues), torch.stack([_padded(w, size, 0.0) for _, w in parts])


def _padded(values: Tensor, size: int, value: float) -> Tensor:
    spare = values.new_full((*values.shape[:-1], size - values.shape[-1]), value)
    return torch.cat((values, spare), -1)


@torch.no_grad()
def _balancing(A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows and columns that balance each system, not yet scaled, and its HSVs."""
    reached, seen = _factor(A, B), _factor(A.mT, C.mT)
    left, sigma, right = torch.linalg.svd(seen.mT @ reached, full_matrices=False)
    return left.mT @ seen.mT, reached @ right.mT, sigma


def _factor(A: Tensor, B: Tensor) -> Tensor:
    """``L`` with ``L L^T = sum of A^k B B^T A^kT``, by doubling the number of summands."""
    factor, power = B, A
    for _ in range(_SQUARINGS):
        factor = torch.cat((factor, power @ factor), -1)
        if factor.shape[-1] > factor.shape[-2]:
            factor = torch.linalg.qr(factor.mT, mode="r").R.mT
        power = power @ power
        if float(power.abs().max()) < torch.finfo(power.dtype).eps ** 2:
            break
    return factor


@dataclass(frozen=True, eq=False)
class _System:
    """One system: A (K, K), B (K, 1), C (outputs, K), all real."""

    A: Tensor
    B: Tensor
    C: Tensor

    def projected(self, rows: Tensor, columns: Tensor) -> _System:
        return _System(rows @ self.A @ columns, rows @ self.B, self.C @ columns)

    def modes(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues in the upper half-plane and on the real axis, with their weights."""
        eigenvalues, vectors = torch.linalg.eig(self.A)
        driven = torch.linalg.solve_ex(vectors, self.B.to(vectors.dtype)).result.squeeze(-1)
        weights = (self.C.to(vectors.dtype) @ vectors) * driven
        upper = eigenvalues.imag >= 0
        twice = torch.where(eigenvalues.imag > 0, 2.0, 1.0)
        return eigenvalues[upper], (weights * twice)[:, upper]


class _Response:
    """A frequency response, at nodes that resolve all of some poles."""

    @torch.no_grad()
    def __init__(self, system: _System, poles: Tensor) -> None:
        gaps = (1 - poles.abs()).clamp(min=1e-12)
        lowest = math.log(float(gaps.min()) / 10)
        between = torch.linspace(lowest, math.log(math.pi), len(system.A), dtype=gaps.dtype).exp()
        around = poles.angle() + gaps * torch.tensor(_AROUND, device=gaps.device)
        angles = torch.cat((between.to(gaps.device), around.flatten())).clamp(0, math.pi)
        self.angles = angles.sort().values
        self.nodes = torch.polar(torch.ones_like(self.angles), self.angles)
        eye = torch.eye(len(system.A), device=gaps.device)
        shifted = self.nodes.view(-1, 1, 1) * eye - system.A
        states = torch.linalg.solve(shifted, system.B.to(shifted.dtype))
        self.values = (system.C.to(shifted.dtype) @ states).squeeze(-1)

    @torch.no_grad()
    def error(self, eigenvalues: Tensor, weights: Tensor) -> float:
        """The largest deviation of a diagonal system."""
        columns = self._columns(eigenvalues)
        parts = torch.cat((weights.real, weights.imag), -1).mT.to(columns.dtype)
        return float((columns @ parts - self.values).abs().max())

    @torch.no_grad()
    def fit(self, eigenvalues: Tensor) -> Tensor:
        """The weights that come closest."""
        share = torch.gradient(self.angles)[0].sqrt().unsqueeze(-1)
        wanted, columns = share * self.values, share * self._columns(eigenvalues)
        used = torch.cat((torch.ones_like(eigenvalues.imag), eigenvalues.imag)) != 0
        rows = torch.cat((columns.real, columns.imag))[:, used]
        scale = torch.linalg.vector_norm(rows, dim=0).unsqueeze(-1)
        targets = torch.cat((wanted.real, wanted.imag))
        left, sigma, right = torch.linalg.svd(rows / scale.mT, full_matrices=False)
        inverse = torch.where(sigma > 1e-15 * sigma[0], 1 / sigma, 0).unsqueeze(-1)
        parts = scale.new_zeros(len(used), targets.shape[1])
        parts[used] = right.mT @ (inverse * (left.mT @ targets)) / scale
        return torch.complex(*parts.mT.chunk(2, -1))

    def _columns(self, eigenvalues: Tensor) -> Tensor:
        """``Re(w lambda^k)``, transformed, as a linear function of the two parts of w."""
        there = 1 / (self.nodes.unsqueeze(-1) - eigenvalues)
        back = 1 / (self.nodes.unsqueeze(-1) - eigenvalues.conj())
        return torch.cat((there + back, 1j * (there - back)), -1) / 2


def _diagonal(system: _System, left: Tensor, right: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """One system's eigenvalues and weights, with as many states as make the least error."""
    largest = float(sigma[0])
    lost = (2 * (sigma.sum() - sigma.cumsum(0))).tolist()
    radius = float(torch.linalg.eigvals(system.A.detach()).abs().max())
    best, found = _USABLE * largest, None
    for kept in range(int((sigma > NEGLIGIBLE * sigma[0]).sum()), 0, -1):
        if best <= _EXACT * largest or (found is not None and lost[kept - 1] >= best):
            break
        root = sigma[:kept].sqrt()
        reduced = system.projected(left[:kept] / root.unsqueeze(-1), right[:, :kept] / root)
        poles, weights = reduced.modes()
        if float(poles.detach().abs().max()) > (1 + radius) / 2:  # rounding made this pole
            continue
        response = _Response(system, poles.detach())
        error = response.error(poles, weights)
        if not error <= _EXACT * largest:
            fitted = response.fit(poles)
            other = response.error(poles, fitted)
            if not error <= other:  # gradients are those of the other weights
                error, weights = other, weights + (fitted - weights).detach()
        if error < best:
            best, found = error, (poles, weights)
    if found is not None:
        return found
    if not largest:  # it is not reached, or not read
        nothing = torch.zeros(len(system.C), 0, dtype=torch.complex128, device=sigma.device)
        return nothing[0], nothing
    raise IllConditionedError(
        f"expected a state matrix of {len(system.A)} states with independent eigenvectors, got one "
        f"that loses more than {_USABLE:.0e} of the output in diagonal form; put the layer into "
        "`ignore`"
    )
