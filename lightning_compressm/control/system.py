"""Diagonal linear time-invariant systems, the common form of every LTI state-space layer."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_compressm._precision import double
from lightning_compressm.control._kernel import unit_gap
from lightning_compressm.errors import NonFiniteError, UnstableSystemError

__all__ = ["NOT_INSIDE", "DiagonalLTI"]

NOT_INSIDE = 1 + 2.0**-50  # takes a modulus of 1 to where rounding can't bring it inside the circle
_MARGINAL = 1e-6  # excess of |lambda|^2 over 1 that is rounding, of single precision too


@dataclass(frozen=True, eq=False)
class DiagonalLTI:
    """A diagonal state-space system, or a batch of independent ones.

    The state follows ``x_k = eigenvalues * x_{k-1} + B @ u_k`` and the output is ``y_k = C @ x_k``,
    or ``y_k = Re(C @ x_k)`` when ``real_output`` is true (with real inputs), as in the LRU (Orvieto
    et al., 2023, equation 5). A direct term ``D @ u_k`` plays no role in model reduction and is not
    stored.

    Args:
        eigenvalues: Eigenvalues of the state matrix, shape ``(..., N)``, real or complex.
        B: Input matrix, shape ``(..., N, H)``.
        C: Output matrix, shape ``(..., P, N)``.
        real_output: Whether the output is the real part of ``C @ x``.

    Raises:
        ValueError: If the three shapes do not fit together, or a dimension is empty.

    Example:
        >>> import torch
        >>> system = DiagonalLTI(
        ...     torch.tensor([0.9 + 0.1j, 0.5j]),
        ...     torch.ones(2, 1, dtype=torch.complex64),
        ...     torch.ones(1, 2, dtype=torch.complex64),
        ... )
        >>> system.order, system.n_inputs, system.n_outputs, tuple(system.batch_shape)
        (2, 1, 1, ())
        >>> system.impulse_response(3).flatten()
        tensor([2.0000, 0.9000, 0.5500], dtype=torch.float64)
    """

    eigenvalues: Tensor
    B: Tensor
    C: Tensor
    real_output: bool = True

    def __post_init__(self) -> None:
        """Compare the shapes; values are looked at by :meth:`check` only."""
        if self.eigenvalues.ndim < 1 or self.B.ndim < 2 or self.C.ndim < 2:
            raise ValueError(self._shape_message())
        batch, n = self.eigenvalues.shape[:-1], self.eigenvalues.shape[-1]
        fits = (
            self.B.shape[:-1] == (*batch, n)
            and self.C.shape[:-2] == batch
            and self.C.shape[-1] == n
        )
        if not fits or 0 in (*batch, n, self.B.shape[-1], self.C.shape[-2]):
            raise ValueError(self._shape_message())

    def _shape_message(self) -> str:
        return (
            "expected eigenvalues of shape (..., N), B of (..., N, H) and C of (..., P, N) with "
            f"equal leading dimensions, none empty, got {tuple(self.eigenvalues.shape)}, "
            f"{tuple(self.B.shape)} and {tuple(self.C.shape)}"
        )

    @property
    def order(self) -> int:
        """Number of states N."""
        return self.eigenvalues.shape[-1]

    @property
    def n_inputs(self) -> int:
        """Number of inputs H."""
        return self.B.shape[-1]

    @property
    def n_outputs(self) -> int:
        """Number of outputs P."""
        return self.C.shape[-2]

    @property
    def batch_shape(self) -> torch.Size:
        """Leading dimensions: each index is a system of its own."""
        return self.eigenvalues.shape[:-1]

    @staticmethod
    def stack(systems: Sequence[DiagonalLTI]) -> DiagonalLTI:
        """A bank of systems of one size, along a new leading dimension."""
        return DiagonalLTI(
            torch.stack([system.eigenvalues for system in systems]),
            torch.stack([system.B for system in systems]),
            torch.stack([system.C for system in systems]),
            systems[0].real_output,
        )

    def each(self, change: Callable[[Tensor], Tensor]) -> DiagonalLTI:
        """Return the system with ``change`` applied to each of its three tensors.

        Example:
            >>> import torch
            >>> bank = DiagonalLTI(torch.zeros(5, 2), torch.ones(5, 2, 1), torch.ones(5, 1, 2))
            >>> bank.each(lambda tensor: tensor[3]).batch_shape
            torch.Size([])
        """
        return DiagonalLTI(
            change(self.eigenvalues), change(self.B), change(self.C), self.real_output
        )

    def double(self) -> DiagonalLTI:
        """Return the system in complex128: on its device, or on the CPU where that has none."""
        return self.each(lambda tensor: double(tensor).to(torch.complex128))

    def check(self, *, horizon: int | None = None) -> DiagonalLTI:
        """Return the system itself if all is finite and every eigenvalue is inside the unit circle.

        Args:
            horizon: Number of steps of the Gramians to come; None for infinitely many. With a
                horizon eigenvalues may be on the circle too, up to rounding in single precision.

        Raises:
            NonFiniteError: If a parameter holds NaN or infinity.
            UnstableSystemError: If an eigenvalue has modulus 1 or more (with a horizon: above 1).

        Example:
            >>> import torch
            >>> one = torch.ones(1, 1)
            >>> DiagonalLTI(torch.tensor([1.5]), one, one).check()
            Traceback (most recent call last):
                ...
            lightning_compressm.errors.UnstableSystemError: expected ...
        """
        for name in ("eigenvalues", "B", "C"):
            bad = int((~torch.isfinite(getattr(self, name).detach())).sum())
            if bad:
                raise NonFiniteError(
                    f"expected finite {name}, got {bad} NaN or infinite entries; the training run "
                    "has probably diverged: lower the learning rate or use an earlier checkpoint"
                )
        eigenvalues = double(self.eigenvalues.detach()).to(torch.complex128)
        gap = unit_gap(eigenvalues)
        unstable = int((gap <= 0 if horizon is None else gap < -_MARGINAL).sum())
        if unstable:
            where, modulus, why = "inside", "1 or more", "Gramians do not exist there"
            if horizon is not None:
                where, modulus, why = "inside or on", "above 1", "what is unstable is not reduced"
            elif not bool((gap < -_MARGINAL).any()):
                why = "infinite Gramians do not exist there, those of a finite `horizon` do"
            raise UnstableSystemError(
                f"expected every eigenvalue {where} the unit circle, got {unstable} of "
                f"{eigenvalues.numel()} with modulus {modulus} (largest "
                f"{float(eigenvalues.abs().max()):.9g}); {why}: keep the layer's eigenvalues "
                f"{where} the circle, or leave this layer out"
            )
        return self

    def folded(self) -> DiagonalLTI:
        """Conjugate every state with a negative phase, so that all ``Im(eigenvalues) >= 0``.

        ``Re(c b) = Re(conj(c) conj(b))``, so with real inputs and outputs the map is the same.

        Raises:
            ValueError: If the output is complex: then conjugating a state changes the map.

        Example:
            >>> import torch
            >>> one = torch.ones(1, 1)
            >>> DiagonalLTI(torch.tensor([-0.5j]), one, one).folded().eigenvalues
            tensor([0.+0.5000j])
        """
        self.require_real_output("folding")
        if not self.eigenvalues.is_complex():
            return self
        return self.conjugated(self.eigenvalues.imag < 0)

    def conjugated(self, states: Tensor) -> DiagonalLTI:
        """Conjugate the states in a mask ``(..., N)``; the real part of the output is the same."""
        return replace(
            self,
            eigenvalues=torch.where(states, self.eigenvalues.conj(), self.eigenvalues),
            B=torch.where(states.unsqueeze(-1), self.B.conj(), self.B),
            C=torch.where(states.unsqueeze(-2), self.C.conj(), self.C),
        )

    def require_real_output(self, what: str) -> None:
        """Raise unless the output is ``Re(C x)``.

        Args:
            what: What needs it, for the message.

        Raises:
            ValueError: If ``real_output`` is false.
        """
        if not self.real_output:
            raise ValueError(
                f"{what} is defined for systems with real inputs and outputs only, got "
                "real_output=False; use balance='complex' (and gramians, not real_gramians)"
            )

    def to_real(self) -> tuple[Tensor, Tensor, Tensor]:
        """Write the system with the real state ``z = [Re x; Im x]``.

        Returns:
            ``(A, B, C)`` in float64: ``(..., 2N, 2N)``, ``(..., 2N, H)`` and ``(..., P, 2N)``.

        Raises:
            ValueError: If the output is complex.

        Example:
            >>> import torch
            >>> one = torch.ones(1, 1)
            >>> DiagonalLTI(torch.tensor([0.5j]), one, one).to_real()[0]
            tensor([[ 0.0000, -0.5000],
                    [ 0.5000,  0.0000]], dtype=torch.float64)
        """
        self.require_real_output("the real form")
        full = self.double()
        re, im = torch.diag_embed(full.eigenvalues.real), torch.diag_embed(full.eigenvalues.imag)
        a = torch.cat([torch.cat([re, -im], -1), torch.cat([im, re], -1)], -2)
        b = torch.cat([full.B.real, full.B.imag], -2)
        c = torch.cat([full.C.real, -full.C.imag], -1)
        return a, b, c

    def frequency_response(self, omega: Tensor) -> Tensor:
        """Evaluate the transfer function ``C (I - Lambda / z)^-1 B`` at ``z = exp(i omega)``.

        With ``real_output`` it is that of the real system, ``(G(z) + conj(G(conj z))) / 2``.

        Args:
            omega: Angular frequencies in radians per step, shape ``(F,)``.

        Returns:
            Response in complex128, shape ``(..., F, P, H)``.

        Example:
            >>> import torch
            >>> one = torch.ones(1, 1)
            >>> DiagonalLTI(torch.tensor([0.5]), one, one).frequency_response(torch.zeros(1))
            tensor([[[2.+0.j]]], dtype=torch.complex128)
        """
        full = self.double()
        omega = torch.as_tensor(omega, dtype=torch.float64, device=full.eigenvalues.device)
        response = full._response(omega)
        if self.real_output:
            response = (response + full._response(-omega).conj()) / 2
        return response

    def _response(self, omega: Tensor) -> Tensor:
        back = torch.polar(torch.ones_like(omega), -omega)
        resolvent = 1 / (1 - back.unsqueeze(-1) * self.eigenvalues.unsqueeze(-2))
        return (self.C.unsqueeze(-3) * resolvent.unsqueeze(-2)) @ self.B.unsqueeze(-3)

    def impulse_response(self, length: int) -> Tensor:
        """Return ``C Lambda^t B`` (its real part with ``real_output``) for ``t = 0 .. length - 1``.

        Args:
            length: Number of steps, at least 1.

        Returns:
            Response of shape ``(..., length, P, H)``, complex128, or float64 with ``real_output``.

        Raises:
            ValueError: If ``length`` is below 1.

        Example:
            >>> import torch
            >>> one = torch.ones(1, 1)
            >>> DiagonalLTI(torch.tensor([0.5]), one, one).impulse_response(3).flatten()
            tensor([1.0000, 0.5000, 0.2500], dtype=torch.float64)
        """
        length = operator.index(length)
        if length < 1:
            raise ValueError(f"expected a length of at least 1, got {length}")
        full = self.double()
        powers = torch.linalg.vander(full.eigenvalues, N=max(length, 2))[..., :length].mT
        response: Tensor = (full.C.unsqueeze(-3) * powers.unsqueeze(-2)) @ full.B.unsqueeze(-3)
        return response.real if self.real_output else response
