"""The projection of one system, applied to another one with the same states."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_compressm.control.basis import ChangeOfBasis
from lightning_compressm.control.system import DiagonalLTI
from lightning_compressm.control.truncation import Reduction

__all__ = ["Projection"]


@dataclass(frozen=True, eq=False)
class Projection:
    """The change of basis of a reduction without the system that it was made for.

    A running average of a model's weights has to follow the model into its reduced coordinates;
    a reduction of its own would end in other ones, and averaging over both would mix unlike states.

    Attributes:
        basis: The maps between N states and the r of the reduced system.
        eigenvalues: Those of the reduced system, ``(..., r)``, which padded states keep.
        B: Input matrix of the reduced system, ``(..., r, H)``, likewise.

    Example:
        >>> from lightning_compressm.control import balanced_truncation
        >>> system = DiagonalLTI(torch.tensor([0.9, 0.1]), torch.ones(2, 1), torch.ones(1, 2))
        >>> reduction = balanced_truncation(system, 1)
        >>> same = Projection.of(reduction).apply(system.double())
        >>> bool((same.eigenvalues - reduction.system.eigenvalues).abs().max() < 1e-12)
        True
    """

    basis: ChangeOfBasis
    eigenvalues: Tensor
    B: Tensor

    @staticmethod
    def of(reduction: Reduction) -> Projection:
        """The projection that a reduction carried out."""
        return Projection(reduction.basis, reduction.system.eigenvalues, reduction.system.B)

    @staticmethod
    def from_dict(tensors: Mapping[str, Tensor]) -> Projection:
        """The inverse of :meth:`to_dict`."""
        return Projection(ChangeOfBasis.from_dict(tensors), tensors["eigenvalues"], tensors["B"])

    def to_dict(self) -> dict[str, Tensor]:
        """The tensors by name."""
        return {**self.basis.to_dict(), "eigenvalues": self.eigenvalues, "B": self.B}

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
        device = system.B.device
        basis = self.basis.each(lambda matrix: matrix.to(device))
        spare, old = basis.padding(), self.eigenvalues.to(device)
        eigenvalues = _within(basis.diagonal(system.eigenvalues), system, old)
        return DiagonalLTI(
            torch.where(spare, old, eigenvalues),
            torch.where(spare.unsqueeze(-1), self.B.to(device), basis.inputs(system.B)),
            basis.outputs(system.C),
            system.real_output,
        )


def _within(eigenvalues: Tensor, system: DiagonalLTI, old: Tensor) -> Tensor:
    """In the half-plane of the reduced system's poles, and no closer to the circle than any."""
    upper = (old.imag >= 0) & (eigenvalues.imag < 0)
    eigenvalues = torch.where(upper, eigenvalues.real.to(eigenvalues.dtype), eigenvalues)
    radii = torch.cat((system.eigenvalues.abs(), old.abs()), -1)
    limit = radii.amax(-1, keepdim=True)
    return eigenvalues * (limit / eigenvalues.abs().clamp(min=1e-300)).clamp(max=1)
