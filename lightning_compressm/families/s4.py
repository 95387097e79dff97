"""S4: kernels of the state-spaces/s4 code with a diagonal plus low-rank state matrix.

x' = (A - P P^*) x + B u, y = 2 Re(C x) in every channel, discretized by the bilinear transform (Gu
et al. 2022, arXiv 2111.00396).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_compressm.control import DiagonalLTI, Reduction, balanced_truncation
from lightning_compressm.control.balance import Balance
from lightning_compressm.families._base import tensor_of
from lightning_compressm.families._continuous import to_continuous
from lightning_compressm.families._dense import diagonal_form
from lightning_compressm.families._low_rank import low_rank_form
from lightning_compressm.families._registry import register_family
from lightning_compressm.families._s4 import (
    S4KernelFamily,
    complex_of,
    length_of,
    output_scale,
    pairs_of,
    refusal,
    written_b,
)
from lightning_compressm.families._s4_example import S4Example
from lightning_compressm.surgery.plan import SurgeryPlan

__all__ = ["S4Family"]


@register_family
class S4Family(S4KernelFamily):
    """``SSMKernelDPLR``: A (H, N), P (rank, H, N, 2), B (1, H, N, 2), C (channels, H, N, 2).

    A kernel is read as its dense systems, which are diagonalised; with real poles these can need
    more states than N. Reduced systems are written with a low-rank part again, since that takes
    any poles: B and P are then real and positive, and real parts of A are those of half the slowest
    pole. One half of each pair says nothing of systems whose real poles are close, so that only the
    real form is balanced. The length that C was prepared for stays. An average of the weights is
    reduced on its own: this form leaves nothing open, so that it ends in the same coordinates.

    Example:
        >>> layer, _ = S4Family().example()
        >>> S4Family().system(layer).order
        8
    """

    name: ClassVar[str] = "S4"
    layers: ClassVar[str] = (
        'state-spaces/s4 `S4Block(mode="dplr")`, and the `S4` of its older files'
    )
    low_rank: ClassVar[bool] = True
    only_balance: ClassVar[Balance | None] = "real"

    def discretization(self, module: nn.Module) -> str:
        """Always the bilinear transform, with one step for each channel."""
        if self.steps(module).shape[1] != 1:
            raise refusal("one step for each channel (dt_tie=True)", "one for each state")
        return "bilinear"

    def system(self, module: nn.Module) -> DiagonalLTI:
        """H systems of one input, B = 1; the output is the real part."""
        self.discretization(module)
        B = complex_of(module, "B").view_as(self.poles(module))
        P, C = complex_of(module, "P"), complex_of(module, "C").movedim(0, 1)
        A, b, c = _discrete(self.poles(module), P, B, C, self.steps(module))
        n = B.shape[-1]
        if not all(bool(torch.isfinite(matrix.detach()).all()) for matrix in (A, b, c)):
            return _plain(torch.full_like(B, torch.nan), C)
        eigenvalues = torch.linalg.eigvals(A.detach())
        if bool((eigenvalues.abs() >= 1).any()):
            return _plain(eigenvalues[..., : 2 * n], torch.cat((C, C), -1))
        c = _without_length(A, c, length_of(module)) * output_scale(module)
        eigenvalues, weights = diagonal_form(A, b, c, n)
        return _plain(eigenvalues, weights)

    def write(self, module: nn.Module, system: DiagonalLTI) -> dict[str, Tensor]:
        """Back to continuous time, with a low-rank part."""
        steps = self.steps(module).detach().to(system.B.device)
        poles, gain = to_continuous(system.eigenvalues, steps, "bilinear")
        weights = system.C * (system.B.squeeze(-1) / gain).unsqueeze(-2) / output_scale(module)
        A, P, C = low_rank_form(poles, weights)
        B, rank = math.sqrt(2) * P, tensor_of(module, "P").shape[0]
        # Unequal shares: rows that start equal would stay so for ever.
        shares = torch.arange(1, rank + 1, dtype=torch.float64, device=P.device)
        low_rank = (shares / shares.sum()).sqrt().view(-1, 1, 1) * P
        if length := length_of(module):
            dense, _, c = _discrete(A, low_rank, B, C, steps)
            c = c - c @ torch.linalg.matrix_power(dense, length)
            C = torch.complex(*c.unflatten(-1, (2, -1)).unbind(-2)).conj() / math.sqrt(2)
        return self.written_poles(module, A) | {
            "B": written_b(module, B),
            "P": pairs_of(low_rank),
            "C": pairs_of(C.movedim(1, 0)),
        }

    def reduction_plan(self, module: nn.Module, reduction: Reduction) -> SurgeryPlan:
        """As every family's; but an average needs to know no more than how to reduce."""
        plan = super().reduction_plan(module, reduction)
        how = {
            "order": reduction.order,
            "horizon": reduction.horizon or 0,
            "largest": int(reduction.selection == "largest"),
        }
        projection = {name: torch.tensor(value) for name, value in how.items()}
        return SurgeryPlan(plan.edits, plan.attributes, {"": projection})

    def projected_plan(self, module: nn.Module, projection: Mapping[str, Tensor]) -> SurgeryPlan:
        """A reduction of its own, to the same number of states and in the same way."""
        order, horizon, largest = (int(projection[n]) for n in ("order", "horizon", "largest"))
        if not largest:
            raise refusal("selection='largest' where weights are averaged", "another selection")
        with torch.no_grad():
            system = self.system(module)
            reduction = balanced_truncation(system, order, horizon=horizon or None)
        return self.reduction_plan(module, reduction)

    def example(self, d_state: int = 8) -> tuple[nn.Module, Tensor]:
        """A layer with the parameters of a kernel, run as a convolution."""
        return S4Example(4, d_state, low_rank=True), torch.randn(2, 12, 4)


def _plain(eigenvalues: Tensor, weights: Tensor) -> DiagonalLTI:
    return DiagonalLTI(
        eigenvalues, torch.ones_like(eigenvalues).unsqueeze(-1), weights, real_output=True
    )


def _discrete(
    poles: Tensor, P: Tensor, B: Tensor, C: Tensor, steps: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The real systems of the states ``sqrt(2) [Re x; Im x]``: (H, 2N, 2N), (H, 2N, 1), (H, P, 2N).

    Args:
        poles: the diagonal, (H, N).
        P: low-rank part, (rank, H, N).
        B: (H, N).
        C: (H, P, N).
        steps: (H, 1).
    """
    re, im = torch.diag_embed(poles.real), torch.diag_embed(poles.imag)
    dense = torch.cat((torch.cat((re, -im), -1), torch.cat((im, re), -1)), -2)
    low_rank, b, c = (torch.cat((m.real, m.imag), -1) * math.sqrt(2) for m in (P, B, C.conj()))
    dense = dense - torch.einsum("rhm,rhn->hmn", low_rank, low_rank)
    half = steps.unsqueeze(-1) / 2 * dense
    eye = torch.eye(dense.shape[-1], dtype=dense.dtype, device=dense.device)
    columns = torch.cat((eye + half, steps.unsqueeze(-1) * b.unsqueeze(-1)), -1)
    solved = torch.linalg.solve(eye - half, columns)
    return solved[..., :-1], solved[..., -1:], c


def _without_length(A: Tensor, C: Tensor, length: int) -> Tensor:
    """C, where the kernel keeps ``C (1 - A^length)``."""
    if not length:
        return C
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    whole: Tensor = torch.linalg.solve(eye - torch.linalg.matrix_power(A, length), C, left=False)
    return whole
