"""A penalty on Hankel energy: what in-training reduction is compared with, and an aid to it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_compressm.control import hankel_singular_values
from lightning_compressm.control.balance import BalanceChoice, resolve_balance
from lightning_compressm.errors import UnsupportedLayerError, about
from lightning_compressm.families import Family
from lightning_compressm.families._base import tensor_of
from lightning_compressm.model.layers import SSMLayer, select_layers

__all__ = ["HankelRegularizer"]


class HankelRegularizer:
    """``weight`` times the sum of all Hankel singular values of a model's linear SSM layers.

    Add it to the loss. The sum is the nuclear norm of the layers' Hankel operators; it pulls the
    singular values of states that the task does not need towards zero, so that they can be removed
    after training. Every call costs a decomposition of each layer's Gramians, in double precision:
    many times the training step of a small model.

    Args:
        weight: of the penalty, >= 0.
        balance: ``"auto"``, ``"real"``, ``"folded"`` or ``"complex"``, as for
            :func:`~lightning_compressm.compress`.
        horizon: steps of time-limited Gramians, ``None`` for infinite.
        layers: glob patterns of module names; ``None`` for all.
        ignore: glob patterns of module names to leave out.

    Raises:
        ValueError: if ``weight`` is negative or not a number.

    Source:
        Hankel singular value regularization, arXiv 2510.22951; here with first-order perturbation
        of the square-root method's singular values.

    Example:
        >>> import torch
        >>> from lightning_compressm.nn import LRU
        >>> model = torch.nn.Sequential(torch.nn.Linear(1, 4), LRU(4, 8))
        >>> penalty = HankelRegularizer(1e-3)
        >>> loss = model(torch.randn(2, 20, 1)).square().mean() + penalty(model)
        >>> loss.backward()
        >>> bool(model[1].nu_log.grad.abs().sum() > 0)
        True
    """

    def __init__(
        self,
        weight: float,
        *,
        balance: BalanceChoice = "auto",
        horizon: int | None = None,
        layers: list[str] | None = None,
        ignore: list[str] | None = None,
    ) -> None:
        if not weight >= 0:
            raise ValueError(f"weight: expected a number >= 0, got {weight!r}")
        self.weight = weight
        self.balance = balance
        self.horizon = horizon
        self.layers = layers
        self.ignore = ignore

    def __call__(self, model: nn.Module) -> Tensor:
        """The penalty, a scalar in single precision (double for a double precision model).

        It is on the first layer's device.

        Raises:
            UnsupportedLayerError: for a layer without a linear system, or one whose family does
                not let gradients through.
            UnstableSystemError: if an eigenvalue is on or outside the unit circle.
            NonFiniteError: if a parameter is NaN or infinite.
        """
        selected = select_layers(model, self.layers, self.ignore).values()
        energies = [self._energy(layer) for layer in selected]
        # The layers of one model may be on several devices.
        return self.weight * torch.stack([e.to(energies[0].device) for e in energies]).sum()

    def _energy(self, layer: SSMLayer) -> Tensor:
        """The sum of one layer's singular values, on the device and in the type of its loss."""
        if not isinstance(layer.family, Family):
            raise UnsupportedLayerError(
                f"layer '{layer.name}' ({layer.family.name}): expected a linear SSM layer, got a "
                "selective one, which has no Hankel singular values to penalize; put it into "
                "`ignore`."
            )
        names = layer.family.state_axes(layer.module)
        parameters = [t for n in names if (t := tensor_of(layer.module, n)).requires_grad]
        with about(layer):
            system = layer.family.system(layer.module)
            balance = resolve_balance(self.balance, system)
            sigma = hankel_singular_values(system, balance=balance, horizon=self.horizon)
        if torch.is_grad_enabled() and parameters and not sigma.requires_grad:
            raise UnsupportedLayerError(
                f"layer '{layer.name}' ({layer.family.name}): expected a system that depends on "
                "the layer's parameters, got one without gradient; let the family's `system()` "
                "compute without `no_grad` and `detach`."
            )
        wide = any(p.dtype in (torch.float64, torch.complex128) for p in layer.module.parameters())
        return sigma.sum().to(torch.float64 if wide else torch.float32)
