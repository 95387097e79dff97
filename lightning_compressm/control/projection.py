"""The projection of one system, applied to another one with the same states."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_compressm.control.system import DiagonalLTI
from lightning_compressm.control.truncation import Reduction

__all__ = ["Projection"]


@dataclass(frozen=True, eq=False)
class Projection:
    """The maps of a reduction without the system that it was made for.

    A running average of a model's weights has to follow the model into its reduced coordinates;
    a reduction of its own would end in other ones, and averaging over both would mix unlike states.

    Attributes:
        left: Shape ``(..., r, N)``, complex128; all maps as in :class:`Reduction`.
        left_conj: Shape ``(..., r, N)``.
        right: Shape ``(..., N, r)``.
        right_conj: Shape ``(..., N, r)``.
        eigenvalues: Those of the reduced system, ``(..., r)``.
        B: Input matrix of the reduced system, ``(..., r, H)``.

    Example:
        >>> from lightning_compressm.control import balanced_truncation
        >>> system = DiagonalLTI(torch.tensor([0.9, 0.1]), torch.ones(2, 1), torch.ones(1, 2))
        >>> reduction = balanced_truncation(system, 1)
        >>> same = Projection.of(reduction).apply(system.double())
        >>> bool((same.eigenvalues - reduction.system.eigenvalues).abs().max() < 1e-12)
        True
    """

    left: Tensor
    left_conj: Tensor
    right: Tensor
    right_conj: Tensor
    eigenvalues: Tensor
    B: Tensor

    @staticmethod
    def of(reduction: Reduction) -> Projection:
        """The projection that a reduction carried out."""
        return Projection(
            reduction.left,
            reduction.left_conj,
            reduction.right,
            reduction.right_conj,
            reduction.system.eigenvalues,
            reduction.system.B,
        )

    @staticmethod
    def from_dict(tensors: Mapping[str, Tensor]) -> Projection:
        """The inverse of :meth:`to_dict`."""
        return Projection(**tensors)

    def to_dict(self) -> dict[str, Tensor]:
        """The tensors by name."""
        return dict(vars(self))

    def apply(self, system: DiagonalLTI) -> DiagonalLTI:
        """Project ``system``, whose N states are those of the system that was reduced.

        The projected state matrix is diagonal up to the first order in the difference of the two
        systems; the rest is left out, since diagonalising it again would leave the coordinates.
        Radii are kept at or below the largest of ``system`` and of the reduced system.

        Args:
            system: N states, complex128, with the batch dimensions of the reduced one.

        Returns:
            A system of r states, on the device of ``system``.
        """
        maps = (self.left, self.left_conj, self.right, self.right_conj)
        left, left_conj, right, right_conj = (m.to(system.B.device) for m in maps)
        spare = ((left == 0) & (left_conj == 0)).all(-1)
        old = self.eigenvalues.to(system.B.device)
        eigenvalues = torch.where(
            spare, old, _within(self._diagonal(system.eigenvalues), system, old)
        )
        b = left @ system.B + left_conj @ system.B.conj()
        b = torch.where(spare.unsqueeze(-1), self.B.to(b.device), b)
        c = system.C @ right + system.C.conj() @ right_conj.conj()
        return DiagonalLTI(eigenvalues, b, c, system.real_output)

    def _diagonal(self, eigenvalues: Tensor) -> Tensor:
        """The diagonal of ``x' -> left (Lambda x) + left_conj conj(Lambda x)``, x from x'."""
        device = eigenvalues.device
        left, left_conj = self.left.to(device), self.left_conj.to(device)
        right, right_conj = self.right.mT.to(device), self.right_conj.mT.to(device)
        value, mirrored = eigenvalues.unsqueeze(-1), eigenvalues.conj().unsqueeze(-1)

        def product(matrix: Tensor, vector: Tensor) -> Tensor:
            return (matrix @ vector).squeeze(-1)

        linear = product(left * right, value) + product(left_conj * right_conj.conj(), mirrored)
        # A real state is its own conjugate and holds half of its mode in each of the two maps.
        conjugate = product(left * right_conj, value) + product(left_conj * right.conj(), mirrored)
        is_real = (left_conj == left.conj()).all(-1)
        return torch.where(is_real, (linear + conjugate).real.to(linear.dtype), linear)


def _within(eigenvalues: Tensor, system: DiagonalLTI, old: Tensor) -> Tensor:
    """In the half-plane of the reduced system's poles, and no closer to the circle than any."""
    upper = (old.imag >= 0) & (eigenvalues.imag < 0)
    eigenvalues = torch.where(upper, eigenvalues.real.to(eigenvalues.dtype), eigenvalues)
    radii = torch.cat((system.eigenvalues.abs(), old.abs()), -1)
    limit = radii.amax(-1, keepdim=True)
    return eigenvalues * (limit / eigenvalues.abs().clamp(min=1e-300)).clamp(max=1)
