"""After a cut fewer states learn for all: their steps become longer by as much."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adagrad, Adam, Adamax, NAdam, Optimizer, RAdam, RMSprop
from torch.utils.hooks import RemovableHandle

__all__ = ["LearningSpeed", "step_factor"]

# Their steps do not depend on the size of the gradient, for which the rule was measured. Others
# (SGD, LBFGS, Muon, optimizers of other packages) go on as they are.
ADAPTIVE = (Adam, Adamax, NAdam, RAdam, RMSprop, Adagrad)  # AdamW is an Adam


class LearningSpeed:
    """Makes the steps of some parameters longer, whatever schedulers do to the learning rates.

    A layer's output is a sum over its states. With r of N states left the same step of Adam for
    each of their parameters moves the output N/r times less. So what each optimizer step changes
    in these parameters, decoupled weight decay included, is multiplied by :func:`step_factor`.
    Learning rates stay as they are: schedulers overwrite them, and parameters of one group have
    one.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> bias = torch.nn.Parameter(torch.zeros(2))
        >>> groups = [{"params": [weight], "lr": 0.01}, {"params": [bias], "lr": 0.04}]
        >>> optimizer, speed = torch.optim.Adam(groups), LearningSpeed()
        >>> speed.follow([optimizer], {weight: 8.0})
        >>> weight.grad = bias.grad = torch.ones(2)
        >>> _ = optimizer.step()
        >>> torch.allclose(weight, bias)
        True
    """

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []

    def __getstate__(self) -> dict[str, Any]:
        """A copy follows nobody."""
        return {"_handles": []}

    def follow(self, optimizers: Iterable[Optimizer], shares: Mapping[Tensor, float]) -> None:
        """Look after the steps of these parameters from now on, and of no others.

        Args:
            optimizers: all optimizers of the model.
            shares: parameter -> N/r, the states at the beginning for each one that is left, >= 1.
        """
        self.leave()
        optimizers = list(optimizers)
        highest = _rates(optimizers)
        for optimizer in optimizers:
            factors = dict(_factors(optimizer, shares, highest))
            if factors and isinstance(optimizer, ADAPTIVE):
                hooks = _Hooks(factors)
                self._handles += [
                    optimizer.register_step_pre_hook(hooks.before),
                    optimizer.register_step_post_hook(hooks.after),
                ]

    def leave(self) -> None:
        """Let all steps be as they are; safe to call at any time."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def step_factor(share: float, own_rate: float, other_rates: Iterable[float]) -> float:
    """How much longer the steps of a cut layer's parameters become: min(N/r, highest other / own).

    Beyond the learning rate that the rest of the model bears, longer steps do harm; so parameters
    that train at the others' rate already keep their steps.

    Args:
        share: N/r, states at the beginning for each one that is left.
        own_rate: learning rate of the parameters' group, before schedules.
        other_rates: those of all other groups.

    Example:
        >>> step_factor(8.0, 0.01, [0.04, 0.02])
        4.0
        >>> step_factor(8.0, 0.01, [0.01])
        1.0
    """
    highest = max(other_rates, default=0.0)
    return max(1.0, min(share, highest / own_rate)) if own_rate > 0 else 1.0


class _Hooks:
    """Around the steps of one optimizer."""

    def __init__(self, factors: Mapping[Tensor, float]) -> None:
        self.factors = factors
        self.kept: list[Tensor] = []

    @torch.no_grad()
    def before(self, *_: Any) -> None:
        """Keep the parameters."""
        self.kept = [parameter.detach().clone() for parameter in self.factors]

    @torch.no_grad()
    def after(self, *_: Any) -> None:
        """Go further in the direction of the step; nowhere if it was left out."""
        for (parameter, factor), kept in zip(self.factors.items(), self.kept, strict=True):
            parameter.add_(parameter - kept, alpha=factor - 1)
        self.kept = []


def _rates(optimizers: Iterable[Optimizer]) -> dict[int, float]:
    """Id of each group -> its learning rate before schedules."""
    return {
        id(group): float(group.get("initial_lr", group["lr"]))
        for optimizer in optimizers
        for group in optimizer.param_groups
    }


def _factors(
    optimizer: Optimizer, shares: Mapping[Tensor, float], rates: Mapping[int, float]
) -> Iterable[tuple[Tensor, float]]:
    for group in optimizer.param_groups:
        others = [rate for key, rate in rates.items() if key != id(group)]
        for parameter in group["params"]:
            share = shares.get(parameter, 1.0)
            factor = step_factor(share, rates[id(group)], others)
            if factor > 1:
                yield parameter, factor
