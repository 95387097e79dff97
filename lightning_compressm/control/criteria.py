"""Which states of a selective layer matter most: criteria on calibration statistics."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_compressm._rules import one_of
from lightning_compressm.control.calibration import (
    SelectiveStatistics,
    averaged_poles,
    channel_sizes,
)

__all__ = ["CRITERIA", "Criterion", "rank_states", "register_criterion"]

Criterion = Callable[[SelectiveStatistics, torch.Generator], Tensor]
"""Maps statistics to importances (G, N), larger for states to keep."""

CRITERIA: dict[str, Criterion] = {}


def register_criterion(name: str) -> Callable[[Criterion], Criterion]:
    """Decorator: make a criterion known under a name.

    Args:
        name: what users write as ``criterion``.

    Example:
        >>> @register_criterion("first_states")
        ... def first_states(statistics, generator):
        ...     return -torch.arange(statistics.energy.shape[-1]).expand_as(statistics.energy)
        >>> _ = CRITERIA.pop("first_states")
    """

    def register(criterion: Criterion) -> Criterion:
        CRITERIA[name] = criterion
        return criterion

    return register


def rank_states(
    statistics: SelectiveStatistics, criterion: str, generator: torch.Generator | None = None
) -> Tensor:
    """Indices of the states, the most important first.

    Args:
        statistics: of a calibration data set.
        criterion: a name in ``CRITERIA``.
        generator: source of randomness for ``"random"``, on the CPU.

    Returns:
        A permutation for each group, (G, N), int64.

    Raises:
        ValueError: for an unknown criterion.

    Example:
        >>> import torch
        >>> from lightning_compressm.control.calibration import SelectiveSignals
        >>> ones = torch.ones(1, 4, 1, 1)
        >>> C = ones * torch.tensor([1.0, 3.0, 2.0])
        >>> signals = SelectiveSignals(ones, -ones[0, :1], C / C, C, ones, ones)
        >>> rank_states(SelectiveStatistics.of([signals]), "averaged_lti")
        tensor([[1, 2, 0]])
    """
    one_of(*CRITERIA).check("criterion", criterion)
    generator = generator or torch.Generator().manual_seed(0)
    importance = CRITERIA[criterion](statistics, generator)
    return importance.argsort(dim=-1, descending=True, stable=True)


@register_criterion("averaged_lti")
def averaged_lti(statistics: SelectiveStatistics, generator: torch.Generator) -> Tensor:
    """Hankel energy of each state on its own in the averaged time-invariant systems.

    ``sqrt(P_nn Q_nn)``, summed over channels: what is left of balancing where only whole states
    can go.
    """
    poles = averaged_poles(statistics)
    gain = (channel_sizes(statistics).unsqueeze(-1) / (1 - poles.square())).sum(1)
    return _diagonal(statistics.B).sqrt() * _diagonal(statistics.C).sqrt() * gain


@register_criterion("empirical")
def empirical(statistics: SelectiveStatistics, generator: torch.Generator) -> Tensor:
    """Energy of each state as it ran, gate-weighted, times the energy of its read-out."""
    return (statistics.energy * _diagonal(statistics.C)).sqrt()


@register_criterion("greedy")
def greedy(statistics: SelectiveStatistics, generator: torch.Generator) -> Tensor:
    """Drop, one after another, the state whose loss changes the gated output least.

    Contributions cancel each other, so what counts is the energy of the sum of all that is gone.
    """
    importance = torch.empty_like(statistics.energy)
    for gram, row in zip(statistics.gram, importance, strict=True):
        lost, left = torch.zeros_like(row), torch.ones_like(row, dtype=torch.bool)
        for rank in range(len(row)):
            cost = gram.diagonal() + 2 * lost
            state = int(torch.where(left, cost, torch.inf).argmin())
            left[state] = False
            lost += gram[state]
            row[state] = rank
    return importance


@register_criterion("smallest")
def smallest(statistics: SelectiveStatistics, generator: torch.Generator) -> Tensor:
    """The reverse of ``averaged_lti``, an ablation."""
    return -averaged_lti(statistics, generator)


@register_criterion("random")
def random(statistics: SelectiveStatistics, generator: torch.Generator) -> Tensor:
    """Chance, an ablation."""
    values = torch.rand(statistics.energy.shape, generator=generator, dtype=torch.float64)
    return values.to(statistics.energy.device)


def _diagonal(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=-2, dim2=-1)
