"""Linear Recurrent Units: ours, and every layer built from the same parameters.

x_k = lambda x_{k-1} + exp(gamma_log) B u_k,  y_k = Re(C x_k) + D u_k,
lambda = exp(-exp(nu_log) + i exp(theta_log))  (Orvieto et al. 2023, arXiv 2303.06349, eq. 5-8).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_compressm._precision import double
from lightning_compressm.control import DiagonalLTI, Reduction
from lightning_compressm.control.system import NOT_INSIDE
from lightning_compressm.families._base import Family, tensor_of
from lightning_compressm.families._matrices import matrix_rules, matrix_values
from lightning_compressm.families._registry import register_family
from lightning_compressm.surgery.plan import Contract, MomentRule, Refill

__all__ = ["LRUFamily"]

_DIAGONALS = ("nu_log", "theta_log", "gamma_log")
# log(theta) of a positive real eigenvalue would be -inf: no gradient, and NaN by weight decay.
_MIN_THETA = 1e-7
_MIN_RADIUS, _MAX_RADIUS = 1e-12, 1.0 - 1e-12


@register_family
class LRUFamily(Family):
    """The LRU with ``B_re, B_im, C_re, C_im``, or with complex ``B`` and ``C``.

    Recognised by its parameters: ``nu_log``, ``theta_log``, ``gamma_log`` of shape (N,), B of
    shape (N, H) and C of shape (P, N).

    Example:
        >>> from lightning_compressm.nn import LRU
        >>> layer = LRU(4, 8)
        >>> LRUFamily().system(layer).order
        8
    """

    name: ClassVar[str] = "LRU"
    layers: ClassVar[str] = "ours; ports with `nu_log, theta_log, gamma_log, B, C`"
    state_dim_attributes: ClassVar[tuple[str, ...]] = (*Family.state_dim_attributes, "d_hidden")

    def matches(self, module: nn.Module) -> bool:
        """Whether the parameters are there, with shapes that fit together."""
        own = module._parameters
        if any(own.get(name) is None for name in _DIAGONALS):
            return False
        matrices = [own.get(name) for name in self._matrix_names(module)]
        if any(m is None or m.ndim != 2 for m in matrices):
            return False
        n = own["nu_log"].shape  # type: ignore[union-attr]
        return (
            len(n) == 1
            and all(own[name].shape == n for name in _DIAGONALS)  # type: ignore[union-attr]
            and all(
                m.shape[dim] == n[0]  # type: ignore[union-attr]
                for m, dim in zip(matrices, self._matrix_dims(module), strict=True)
            )
        )

    def state_axes(self, module: nn.Module) -> dict[str, int]:
        """Diagonals and B along dimension 0, C along dimension 1."""
        names, dims = self._matrix_names(module), self._matrix_dims(module)
        return dict.fromkeys(_DIAGONALS, 0) | dict(zip(names, dims, strict=True))

    def system(self, module: nn.Module) -> DiagonalLTI:
        """Eigenvalues, gamma * B and C; the output is the real part."""
        own = {n: p for n, p in module._parameters.items() if p is not None}
        decay, phase, gamma = (double(own[name]).exp() for name in _DIAGONALS)
        eigenvalues = torch.exp(torch.complex(-decay, phase))
        # Rounding of the phase must not hide that a radius is one.
        on_circle = torch.exp(-decay) == 1
        return DiagonalLTI(
            eigenvalues=torch.where(on_circle, eigenvalues * NOT_INSIDE, eigenvalues),
            B=gamma[:, None] * _complex(own, "B"),
            C=_complex(own, "C"),
            real_output=True,
        )

    def write(self, module: nn.Module, system: DiagonalLTI) -> dict[str, Tensor]:
        """Back to nu, theta and gamma; gamma becomes sqrt(1 - |lambda|^2)."""
        eigenvalues = system.eigenvalues
        radius = eigenvalues.abs().clamp(_MIN_RADIUS, _MAX_RADIUS)
        theta = eigenvalues.angle().remainder(2 * math.pi).clamp(min=_MIN_THETA)
        gamma = _gain(system)
        values = {
            "nu_log": torch.log(-torch.log(radius)),
            "theta_log": torch.log(theta),
            "gamma_log": torch.log(gamma),
        }
        for name, matrix in (("B", system.B / gamma[:, None]), ("C", system.C)):
            values |= matrix_values(name, matrix, split=self._is_split(module))
        return values

    def moment_rules(
        self, module: nn.Module, reduction: Reduction, values: Mapping[str, Tensor]
    ) -> dict[str, MomentRule]:
        """B and C follow the change of basis, gamma by the chain rule; eigenvalues are refilled."""
        old = double(tensor_of(module, "gamma_log").detach()).exp()
        ratio = _gain(reduction.system)[:, None] / old[None, :]
        into_b = (ratio * part for part in reduction.basis.input_gradient())
        into_c = reduction.basis.output_gradient()
        split = self._is_split(module)
        rules: dict[str, MomentRule] = {"nu_log": Refill(), "theta_log": Refill()}
        rules |= matrix_rules("B", 0, *into_b, split=split)
        rules |= matrix_rules("C", 1, *into_c, split=split)
        rules["gamma_log"] = Contract(1, self._parts_of_b(module, values))
        return rules

    def attributes(self, module: nn.Module, state_dim: int) -> dict[str, Any]:
        """Also the recurrent state that some ports keep as a plain tensor."""
        changed = super().attributes(module, state_dim)
        state = getattr(module, "state", None)
        if torch.is_tensor(state) and state.shape[-1:] == (self.state_dim(module),):
            changed["state"] = state.new_zeros(*state.shape[:-1], state_dim)
        return changed

    def example(self, d_state: int = 8) -> tuple[nn.Module, Tensor]:
        """Our own LRU."""
        from lightning_compressm.nn import LRU

        return LRU(4, d_state), torch.randn(2, 12, 4)

    def _parts_of_b(self, module: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self._is_split(module):
            return {name: values[name] for name in ("B_re", "B_im")}
        return {"B:re": values["B"].real, "B:im": values["B"].imag}

    @staticmethod
    def _is_split(module: nn.Module) -> bool:
        return "B_re" in module._parameters

    def _matrix_names(self, module: nn.Module) -> tuple[str, ...]:
        return ("B_re", "B_im", "C_re", "C_im") if self._is_split(module) else ("B", "C")

    def _matrix_dims(self, module: nn.Module) -> tuple[int, ...]:
        return (0, 0, 1, 1) if self._is_split(module) else (0, 1)


def _complex(own: Mapping[str, Tensor], name: str) -> Tensor:
    return (
        double(own[name])
        if name in own
        else torch.complex(double(own[f"{name}_re"]), double(own[f"{name}_im"]))
    )


def _gain(system: DiagonalLTI) -> Tensor:
    """The input normalisation gamma = sqrt(1 - |lambda|^2) that an LRU starts from (eq. 7)."""
    radius = system.eigenvalues.abs().clamp(_MIN_RADIUS, _MAX_RADIUS)
    return torch.sqrt(-torch.expm1(2 * torch.log(radius)))
