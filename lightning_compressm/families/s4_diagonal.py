"""Diagonal kernels of the state-spaces/s4 code that have a B: ``S4Block(mode="diag")``.

x' = A x + B u, y = 2 Re(C x) in every channel, as in S4D (Gu et al. 2022, arXiv 2206.11893).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_compressm.control import DiagonalLTI
from lightning_compressm.families._continuous import to_continuous, to_discrete
from lightning_compressm.families._registry import register_family
from lightning_compressm.families._s4 import (
    S4KernelFamily,
    complex_of,
    output_scale,
    pairs_of,
    refusal,
    written_b,
)
from lightning_compressm.families._s4_example import S4Example
from lightning_compressm.nn._discretize import DISCRETIZATIONS

__all__ = ["S4DiagonalFamily"]


@register_family
class S4DiagonalFamily(S4KernelFamily):
    """``SSMKernelDiag``: A (H, N), B (1, H, N, 2), C (channels, H, N, 2), and steps.

    Each channel is balanced on its own, and all keep the same number of states. B of the reduced
    layer is one: C holds all weights. Steps stay; where every state has its own, the reduced ones
    get the geometric mean of their channel.

    Example:
        >>> layer, _ = S4DiagonalFamily().example()
        >>> S4DiagonalFamily().system(layer).batch_shape
        torch.Size([4])
    """

    name: ClassVar[str] = "S4D kernel"
    layers: ClassVar[str] = (
        'state-spaces/s4 `S4Block(mode="diag")`, and the `S4` of its older files'
    )
    low_rank: ClassVar[bool] = False

    def discretization(self, module: nn.Module) -> str:
        """The zero-order hold or the bilinear transform."""
        method = getattr(module, "disc", "zoh")
        if method not in DISCRETIZATIONS:
            raise refusal(f"disc={' or '.join(map(repr, DISCRETIZATIONS))}", repr(method))
        return str(method)

    def system(self, module: nn.Module) -> DiagonalLTI:
        """H systems of one input; the output is the real part."""
        method = self.discretization(module)
        eigenvalues, gain = to_discrete(self.poles(module), self.steps(module), method)
        B = complex_of(module, "B").view_as(eigenvalues)
        C = 2 * output_scale(module) * complex_of(module, "C").movedim(0, 1)
        return DiagonalLTI(eigenvalues, (gain * B).unsqueeze(-1), C, real_output=True)

    def write(self, module: nn.Module, system: DiagonalLTI) -> dict[str, Tensor]:
        """Back to continuous time; B goes into C."""
        steps = self.common_steps(module).to(system.B.device)
        poles, gain = to_continuous(system.eigenvalues, steps, self.discretization(module))
        weights = system.C * (system.B.squeeze(-1) / gain).unsqueeze(-2)
        return (
            self.written_poles(module, poles)
            | {"B": written_b(module, torch.ones_like(poles))}
            | {"C": pairs_of(weights.movedim(1, 0) / (2 * output_scale(module)))}
            | self.written_steps(module, steps, system.order)
        )

    def example(self, d_state: int = 8) -> tuple[nn.Module, Tensor]:
        """A layer with the parameters of a kernel, run as a convolution."""
        return S4Example(4, d_state), torch.randn(2, 12, 4)
