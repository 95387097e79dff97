"""Running averages of weights that are part of a model."""

from __future__ import annotations

from torch import nn
from torch.optim.swa_utils import AveragedModel

__all__ = ["averages_inside", "inside_average"]


def averages_inside(model: nn.Module) -> list[AveragedModel]:
    """Every ``AveragedModel`` below the root of ``model``.

    Example:
        >>> len(averages_inside(nn.ModuleList([AveragedModel(nn.Linear(2, 2))])))
        1
    """
    return [m for m in model.modules() if isinstance(m, AveragedModel) and m is not model]


def inside_average(model: nn.Module) -> set[int]:
    """Ids of the modules that belong to an ``AveragedModel`` below the root of ``model``.

    Example:
        >>> inside_average(nn.Linear(2, 2))
        set()
    """
    return {id(module) for average in averages_inside(model) for module in average.modules()}
