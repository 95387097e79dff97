"""Diagonal S4: ours, and kernels of the same parameters as in the state-spaces code.

Channel h is a system of its own, x' = A_h x + u_h, y_h = 2 Re(C_h x), with A = -exp(log_A_real) +
i A_imag and a step exp(log_dt) (Gu et al. 2022, arXiv 2206.11893).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_compressm._precision import double
from lightning_compressm.control import DiagonalLTI
from lightning_compressm.errors import UnsupportedLayerError
from lightning_compressm.families._base import Family, tensor_of
from lightning_compressm.families._continuous import to_continuous, to_discrete
from lightning_compressm.families._registry import register_family
from lightning_compressm.nn._discretize import DISCRETIZATIONS

__all__ = ["S4DFamily"]


@register_family
class S4DFamily(Family):
    """A bank of H systems with ``log_dt`` (H,), ``log_A_real``, ``A_imag`` (H, N), ``C`` (H, N, 2).

    Recognised by these tensors, which may be parameters or buffers. Each channel is balanced on
    its own, and all keep the same number of states. The layer's ``discretization`` attribute says
    how it is discretized; without one it is the zero-order hold. The steps stay as they are.

    Example:
        >>> from lightning_compressm.nn import S4D
        >>> system = S4DFamily().system(S4D(4, 8))
        >>> system.batch_shape, system.order
        (torch.Size([4]), 8)
    """

    name: ClassVar[str] = "S4D"
    layers: ClassVar[str] = "ours; kernels as in state-spaces/s4 (`log_dt, C, log_A_real, A_imag`)"
    state_dim_attributes: ClassVar[tuple[str, ...]] = (*Family.state_dim_attributes, "n")

    def matches(self, module: nn.Module) -> bool:
        """Whether the tensors are there, with shapes that fit together."""
        own = {**module._buffers, **module._parameters}
        tensors = [own.get(name) for name in ("log_dt", "log_A_real", "A_imag", "C")]
        if any(tensor is None or tensor.is_complex() for tensor in tensors):
            return False
        step, decay, frequency, weights = (tensor.shape for tensor in tensors)  # type: ignore[union-attr]
        return (
            len(decay) == 2
            and step == decay[:1]
            and frequency == decay
            and weights == (*decay, 2)
            and decay[1] >= 1
        )

    def refuse(self, module: nn.Module) -> None:
        """Refuse unknown discretizations."""
        _discretization(module)

    def state_axes(self, module: nn.Module) -> dict[str, int]:
        """Dimension 1 of A and C."""
        return {"log_A_real": 1, "A_imag": 1, "C": 1}

    def system(self, module: nn.Module) -> DiagonalLTI:
        """H systems with B = 1 and C = 2 C gain; the output is the real part.

        Raises:
            UnsupportedLayerError: if the layer is discretized in an unknown way.
        """
        own = {n: double(tensor_of(module, n)) for n in self.state_axes(module)}
        poles = torch.complex(-own["log_A_real"].exp(), own["A_imag"])
        eigenvalues, gain = to_discrete(poles, _steps(module), _discretization(module))
        weights = 2 * gain * torch.complex(*own["C"].unbind(-1))
        ones = torch.ones_like(weights).unsqueeze(-1)
        return DiagonalLTI(eigenvalues, ones, weights.unsqueeze(-2), real_output=True)

    def write(self, module: nn.Module, system: DiagonalLTI) -> dict[str, Tensor]:
        """Back to continuous time with the layer's own steps; B goes into C."""
        steps = _steps(module).detach().to(system.eigenvalues.device)
        poles, gain = to_continuous(system.eigenvalues, steps, _discretization(module))
        weights = system.C.squeeze(-2) * system.B.squeeze(-1) / (2 * gain)
        return {
            "log_A_real": torch.log(-poles.real),
            "A_imag": poles.imag,
            "C": torch.stack((weights.real, weights.imag), -1),
        }

    def attributes(self, module: nn.Module, state_dim: int) -> dict[str, Any]:
        """Also those that count each conjugate pair as two states."""
        changed, pairs = super().attributes(module, state_dim), 2 * self.state_dim(module)
        for name in self.state_dim_attributes:
            if name in vars(module) and getattr(module, name) == pairs:
                changed[name] = 2 * state_dim
        return changed

    def sequence_length(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
        """Kernels are called with a length instead of a sequence."""
        values = (*args, *kwargs.values())
        if values and isinstance(values[0], int) and not isinstance(values[0], bool):
            return values[0]
        return super().sequence_length(args, kwargs)

    def example(self, d_state: int = 8) -> tuple[nn.Module, Tensor]:
        """Our own S4D."""
        from lightning_compressm.nn import S4D

        return S4D(4, d_state), torch.randn(2, 12, 4)


def _steps(module: nn.Module) -> Tensor:
    return double(tensor_of(module, "log_dt")).exp().unsqueeze(-1)


def _discretization(module: nn.Module) -> str:
    method = getattr(module, "discretization", "zoh")
    if method not in DISCRETIZATIONS:
        raise UnsupportedLayerError(
            f"expected a `discretization` of {' or '.join(map(repr, DISCRETIZATIONS))}, got "
            f"{method!r}; put this layer into `ignore`, or register a Family of your own for it."
        )
    return str(method)
