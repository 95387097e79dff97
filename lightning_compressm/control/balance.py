"""The forms in which a system is balanced, each an object that knows what is special about it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from lightning_compressm._rules import one_of
from lightning_compressm.control._modal import ModalForm, complex_modes, real_modes
from lightning_compressm.control.gramians import gramians, real_gramians
from lightning_compressm.control.system import DiagonalLTI

if TYPE_CHECKING:
    from lightning_compressm.control.hankel import Balancing

__all__ = [
    "BALANCES",
    "Balance",
    "BalanceChoice",
    "BalanceForm",
    "form_of",
    "register_balance",
    "resolve_balance",
]

Balance = Literal["real", "folded", "complex", "modes"]
"""The forms that the package brings."""

BalanceChoice = Literal["auto", Balance]
"""What users may ask for."""


class BalanceForm(ABC):
    """How a system is written to be balanced, and how what is left of it becomes diagonal again.

    Subclass it and :func:`register_balance` it to balance systems in another form.

    Attributes:
        name: What users write as ``balance``.
        states_each: Number of balanced states that make up one complex state.
        balances: Whether it truncates balanced states, so that twice the sum of the discarded
            values bounds the error.
        real_output: Whether the form takes real inputs and outputs. Then it makes no difference
            which states are stored conjugated, and reduced ones get ``Im(lambda) >= 0``.

    Example:
        >>> form_of("real").states_each, form_of("complex").real_output
        (2, False)
    """

    name: ClassVar[str]
    states_each: ClassVar[int] = 1
    balances: ClassVar[bool] = True
    real_output: ClassVar[bool] = True

    def check(self, system: DiagonalLTI) -> None:
        """Refuse a system that has no such form.

        Raises:
            ValueError: If the form takes real outputs, and those of the system are complex.
        """
        if self.real_output:
            system.require_real_output(f"balance={self.name!r}")

    def written(self, system: DiagonalLTI) -> DiagonalLTI:
        """The system as it is balanced, with the same eigenvalues up to conjugation."""
        return system

    @abstractmethod
    def gramians(self, system: DiagonalLTI, horizon: int | None) -> tuple[Tensor, Tensor]:
        """Gramians P and Q of what :meth:`written` gives, (..., M, M), M = N ``states_each``."""

    def of_moments(self, system: DiagonalLTI, moments: Tensor) -> Tensor:
        """Second moments of the states of what :meth:`written` gives, (..., M, M).

        Args:
            system: As it was given.
            moments: Those of ``[Re x; Im x]`` of its states x, (..., 2N, 2N).

        Raises:
            ValueError: If the form can't tell; a form of your own has to say how.
        """
        raise ValueError(
            f"expected a balance that can be made from data, got {self.name!r}; use 'real', "
            "'folded' or 'complex', or give your form an `of_moments`"
        )

    def reduced(self, balancing: Balancing, kept: Tensor, order: int) -> ModalForm:
        """Truncate one balanced system to the states ``kept``, in diagonal form."""
        t_l, t_r = balancing.projections(kept)
        return self.modes(balancing.system, t_l, t_r, kept, order).canonical()

    @abstractmethod
    def modes(
        self, system: DiagonalLTI, t_l: Tensor, t_r: Tensor, kept: Tensor, order: int
    ) -> ModalForm:
        """Diagonalise one system in its most important balanced states.

        Args:
            system: As it was given, not as it is ``written``.
            t_l: From the states of :meth:`gramians` to the balanced ones, ``(len(kept), M)``.
            t_r: From these back, ``(M, len(kept))``.
            kept: Indices of the balanced states, the most important one first.
            order: Largest number of states that the result may have.
        """

    def finished(self, form: ModalForm) -> ModalForm:
        """The states as a layer should store them."""
        return form.upper() if self.real_output else form

    def energies(self, sigma: Tensor) -> Tensor:
        """Hankel singular values, ``(..., M)``, added up by complex state, ``(..., N)``."""
        return sigma


BALANCES: dict[str, BalanceForm] = {}
"""All forms, by name."""

_Form = TypeVar("_Form", bound=type[BalanceForm])


def register_balance(form: _Form) -> _Form:
    """Class decorator: make a form known under its name.

    Example:
        >>> import torch
        >>> from lightning_compressm.control import DiagonalLTI, hankel_singular_values
        >>> @register_balance
        ... class Doubled(Complex):  # inputs count twice
        ...     name = "doubled"
        ...     def written(self, system):
        ...         return replace(system, B=2 * system.B)
        >>> system = DiagonalLTI(torch.tensor([0.5]), torch.ones(1, 1), torch.ones(1, 1))
        >>> hankel_singular_values(system, balance="doubled") / hankel_singular_values(
        ...     system, balance="complex"
        ... )
        tensor([2.], dtype=torch.float64)
        >>> _ = BALANCES.pop("doubled")
    """
    BALANCES[form.name] = form()
    return form


def form_of(balance: str) -> BalanceForm:
    """The form with a name.

    Raises:
        ValueError: If there is none.
    """
    one_of(*BALANCES).check("balance", balance)
    return BALANCES[balance]


@register_balance
class Real(BalanceForm):
    """The real system with state ``[Re x; Im x]``: it does not see how states are stored."""

    name = "real"
    states_each = 2

    def gramians(self, system: DiagonalLTI, horizon: int | None) -> tuple[Tensor, Tensor]:
        """Symmetric, float64."""
        return real_gramians(system, horizon=horizon)

    def of_moments(self, system: DiagonalLTI, moments: Tensor) -> Tensor:
        """As they are."""
        return moments

    def modes(
        self, system: DiagonalLTI, t_l: Tensor, t_r: Tensor, kept: Tensor, order: int
    ) -> ModalForm:
        """A conjugate pair becomes one state, and so does a real pole."""
        return real_modes(system, t_l, t_r, kept, order)

    def energies(self, sigma: Tensor) -> Tensor:
        """Neighbouring pairs added up.

        Raises:
            ValueError: If the number of values is odd.
        """
        if sigma.shape[-1] % 2:
            raise ValueError(
                "expected an even number of Hankel singular values for balance='real' (two for "
                f"each state), got {sigma.shape[-1]}; were they computed with another balance?"
            )
        return sigma[..., 0::2] + sigma[..., 1::2]


class _ComplexState(BalanceForm):
    """A complex system: every balanced state is a state."""

    def gramians(self, system: DiagonalLTI, horizon: int | None) -> tuple[Tensor, Tensor]:
        """Hermitian, complex128."""
        return gramians(system, horizon=horizon)

    def of_moments(self, system: DiagonalLTI, moments: Tensor) -> Tensor:
        """Sums of ``x x^H``, with the states conjugated that the form conjugates."""
        mirrored = self.written(system).eigenvalues.imag != system.eigenvalues.imag
        sign = torch.where(mirrored, -1.0, 1.0).to(moments)
        upper, lower = moments.chunk(2, -2)
        (re_re, re_im), (im_re, im_im) = upper.chunk(2, -1), lower.chunk(2, -1)
        column, row = sign.unsqueeze(-1), sign.unsqueeze(-2)
        return torch.complex(re_re + column * im_im * row, column * im_re - re_im * row)

    def modes(
        self, system: DiagonalLTI, t_l: Tensor, t_r: Tensor, kept: Tensor, order: int
    ) -> ModalForm:
        """Every balanced state becomes a state."""
        return complex_modes(system, t_l, t_r, kept)


@register_balance
class Folded(_ComplexState):
    """The complex system after conjugating every state into the upper half-plane."""

    name = "folded"

    def written(self, system: DiagonalLTI) -> DiagonalLTI:
        """All states with ``Im(lambda) >= 0``."""
        return system.folded()

    def modes(
        self, system: DiagonalLTI, t_l: Tensor, t_r: Tensor, kept: Tensor, order: int
    ) -> ModalForm:
        """As for the complex system; the maps take the states as they are, folded or not."""
        form = super().modes(system.folded(), t_l, t_r, kept, order)
        low = system.eigenvalues.imag < 0
        return replace(form, basis=form.basis.of_conjugated(low))


@register_balance
class Complex(_ComplexState):
    """The complex system as it is (Algorithm 1 of CompreSSM, arXiv 2510.02823)."""

    name = "complex"
    real_output = False


def resolve_balance(
    balance: BalanceChoice, system: DiagonalLTI, *, trained_on: bool = False
) -> Balance:
    """The form that "auto" stands for.

    Balancing the real system is the most accurate; but its real poles are states that training
    can't make complex again (their phase has no gradient). So a layer that is trained further is
    balanced in the folded form, which leaves complex states only.
    """
    if balance != "auto":
        return balance
    if not system.real_output:
        return "complex"
    return "folded" if trained_on else "real"
