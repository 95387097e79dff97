"""The change of basis from the states of a system to those of its reduced self, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ChangeOfBasis"]


@dataclass(frozen=True, eq=False)
class ChangeOfBasis:
    """Widely linear maps from N old states x to r new ones x', and back.

    ``x' = left @ x + left_conj @ conj(x)`` and ``x ~ right @ x' + right_conj @ conj(x')``. The maps
    are linear, with conjugate parts of zero, unless states are conjugated or balanced in real form.

    Args:
        left: Shape ``(..., r, N)``, complex.
        left_conj: Shape ``(..., r, N)``.
        right: Shape ``(..., N, r)``.
        right_conj: Shape ``(..., N, r)``.

    Example:
        >>> import torch
        >>> eye = torch.eye(2, dtype=torch.complex128)
        >>> second = ChangeOfBasis.linear(eye[1:], eye[:, 1:])  # keeps the second of two states
        >>> mirrored = second.conjugated(torch.tensor([True]))
        >>> B = torch.tensor([[1.0 + 1j], [2.0 + 2j]], dtype=torch.complex128)
        >>> second.inputs(B).item(), mirrored.inputs(B).item()
        ((2+2j), (2-2j))
    """

    left: Tensor
    left_conj: Tensor
    right: Tensor
    right_conj: Tensor

    @staticmethod
    def linear(left: Tensor, right: Tensor) -> ChangeOfBasis:
        """Maps without conjugate parts."""
        return ChangeOfBasis(left, torch.zeros_like(left), right, torch.zeros_like(right))

    @staticmethod
    def stack(bases: Sequence[ChangeOfBasis]) -> ChangeOfBasis:
        """Those of several systems, along a new leading dimension."""
        return ChangeOfBasis(*map(torch.stack, zip(*(b._maps() for b in bases), strict=True)))

    @staticmethod
    def from_dict(tensors: Mapping[str, Tensor]) -> ChangeOfBasis:
        """The inverse of :meth:`to_dict`."""
        return ChangeOfBasis(*(tensors[n] for n in ("left", "left_conj", "right", "right_conj")))

    def to_dict(self) -> dict[str, Tensor]:
        """The four maps by name."""
        return dict(vars(self))

    def each(self, change: Callable[[Tensor], Tensor]) -> ChangeOfBasis:
        """The maps with ``change`` applied to each of the four."""
        return ChangeOfBasis(*map(change, self._maps()))

    def _maps(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.left, self.left_conj, self.right, self.right_conj

    def conjugated(self, states: Tensor) -> ChangeOfBasis:
        """The maps to and from new states of which those in the mask (r,) are conjugated."""
        row, column = states.unsqueeze(-1), states.unsqueeze(-2)
        return ChangeOfBasis(
            torch.where(row, self.left_conj.conj(), self.left),
            torch.where(row, self.left.conj(), self.left_conj),
            torch.where(column, self.right_conj, self.right),
            torch.where(column, self.right, self.right_conj),
        )

    def of_conjugated(self, states: Tensor) -> ChangeOfBasis:
        """The maps from and to old states of which those in the mask (N,) were conjugated."""
        row, column = states.unsqueeze(-2), states.unsqueeze(-1)
        return ChangeOfBasis(
            torch.where(row, self.left_conj, self.left),
            torch.where(row, self.left, self.left_conj),
            torch.where(column, self.right_conj.conj(), self.right),
            torch.where(column, self.right.conj(), self.right_conj),
        )

    def ordered(self, order: Tensor) -> ChangeOfBasis:
        """New states in another order, indices (r,)."""
        return ChangeOfBasis(
            self.left[..., order, :],
            self.left_conj[..., order, :],
            self.right[..., order],
            self.right_conj[..., order],
        )

    def turned(self, phases: Tensor) -> ChangeOfBasis:
        """New states divided by phases, (r,) with modulus 1."""
        row = phases.conj().unsqueeze(-1)
        return ChangeOfBasis(
            row * self.left,
            row * self.left_conj,
            self.right * phases,
            self.right_conj * phases.conj(),
        )

    def padded(self, extra: int) -> ChangeOfBasis:
        """More new states, which no old one has a part in."""
        n = self.left.shape[-1]
        rows, columns = self.left.new_zeros(extra, n), self.right.new_zeros(n, extra)
        return ChangeOfBasis(
            torch.cat([self.left, rows]),
            torch.cat([self.left_conj, rows]),
            torch.cat([self.right, columns], 1),
            torch.cat([self.right_conj, columns], 1),
        )

    def padding(self) -> Tensor:
        """Which new states no old one has a part in, a mask ``(..., r)``."""
        return ((self.left == 0) & (self.left_conj == 0)).all(-1)

    def inputs(self, B: Tensor) -> Tensor:
        """The input matrix ``(..., r, H)`` of the new states, from that of the old, (..., N, H)."""
        return self.left @ B + self.left_conj @ B.conj()

    def outputs(self, C: Tensor) -> Tensor:
        """The output matrix ``(..., P, r)`` of the new states, from that of the old, (..., P, N).

        With conjugate parts, it is for outputs that are the real part.
        """
        return C @ self.right + C.conj() @ self.right_conj.conj()

    def diagonal(self, eigenvalues: Tensor) -> Tensor:
        """The diagonal ``(..., r)`` of the state matrix of the new states, from ``(..., N)``."""
        right, right_conj = self.right.mT, self.right_conj.mT
        value, mirrored = eigenvalues.unsqueeze(-1), eigenvalues.conj().unsqueeze(-1)

        def product(left: Tensor, right: Tensor, values: Tensor) -> Tensor:
            return ((left * right) @ values).squeeze(-1)

        linear = product(self.left, right, value)
        linear = linear + product(self.left_conj, right_conj.conj(), mirrored)
        # A real state is its own conjugate and holds half of its mode in each of the two maps.
        conjugate = product(self.left, right_conj, value)
        conjugate = conjugate + product(self.left_conj, right.conj(), mirrored)
        is_real = (self.left_conj == self.left.conj()).all(-1)
        return torch.where(is_real, (linear + conjugate).real.to(linear.dtype), linear)

    def input_gradient(self) -> tuple[Tensor, Tensor]:
        """Two matrices (r, N): a gradient G of B becomes ``first @ G + second @ conj(G)``."""
        return self.right.mH, self.right_conj.mT

    def output_gradient(self) -> tuple[Tensor, Tensor]:
        """Two matrices (r, N): a gradient G of C^T becomes ``first @ G + second @ conj(G)``."""
        return self.left.conj(), self.left_conj.conj()
