"""Running averages of a model's weights: they have to follow every change of its shape."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass

from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_compressm._averages import averages_inside, inside_average
from lightning_compressm._names import is_inside
from lightning_compressm.errors import UnsupportedLayerError
from lightning_compressm.families import find_family, named_layers
from lightning_compressm.surgery.plan import SurgeryPlan

__all__ = ["ModelCopy", "find_copies"]


@dataclass(frozen=True, eq=False)
class ModelCopy:
    """A module that holds other values for a model or a part of it.

    Attributes:
        root: the copy with all that belongs to it, such as a count of averaged steps.
        mirror: the module in it that has the structure of the original.
        path: where the original lives in the model.

    Example:
        >>> from lightning_compressm.nn import LRU
        >>> model = nn.Sequential(nn.Linear(2, 4), LRU(4, 8))
        >>> find_copies(model, [AveragedModel(model)])[0].path
        ''
    """

    root: nn.Module
    mirror: nn.Module
    path: str

    def plan(self, plan: SurgeryPlan) -> SurgeryPlan:
        """The same reduction for this copy, relative to its ``mirror``.

        Raises:
            UnsupportedLayerError: if a family's plan does not say how copies follow.
        """
        for name in plan.edits:
            if not any(is_inside(name, layer) for layer in plan.projections):
                raise UnsupportedLayerError(
                    f"'{name}' is reduced, but its family does not say how an average of the "
                    "weights follows; expected its plan to have `projections`. Let the family's "
                    "reduction_plan() extend that of Family, or leave weight averaging out."
                )
        plans = [("", SurgeryPlan({}, dict(self._attributes(plan))))]
        for layer, projection in plan.projections.items():
            if not is_inside(layer, self.path):
                continue
            inner = _relative(layer, self.path)
            module = self.mirror.get_submodule(inner)
            family = find_family(module)
            if family is None:
                raise UnsupportedLayerError(
                    f"the averaged copy of '{layer}' is a {type(module).__name__} that no family "
                    "knows; expected the same layer as in the model. Leave weight averaging out."
                )
            plans.append((inner, family.projected_plan(module, projection)))
        return SurgeryPlan.merge(plans)

    def _attributes(self, plan: SurgeryPlan) -> Iterator[tuple[str, object]]:
        for name, value in plan.attributes.items():
            if is_inside(name, self.path):
                yield _relative(name, self.path), deepcopy(value)


def find_copies(model: nn.Module, candidates: Iterable[object]) -> list[ModelCopy]:
    """Those candidates that are copies of the model, or of a part of it with SSM layers.

    Args:
        model: the original.
        candidates: any objects; an ``AveragedModel`` counts as what it averages.

    Returns:
        One entry for each copy. A module that shares tensors with the model is none.

    Example:
        >>> from lightning_compressm.nn import LRU
        >>> model = LRU(4, 8)
        >>> [len(find_copies(model, [x])) for x in (deepcopy(model), model, nn.Linear(2, 2), 3)]
        [1, 0, 0, 0]
    """
    own = {id(tensor) for tensor in model.parameters()}
    own -= {id(t) for average in averages_inside(model) for t in average.parameters()}
    copies = []
    for root in candidates:
        if not isinstance(root, nn.Module) or any(id(t) in own for t in root.parameters()):
            continue
        mirror = root.module if isinstance(root, AveragedModel) else root
        path = _original(model, mirror)
        if path is not None:
            copies.append(ModelCopy(root, mirror, path))
    return copies


def _original(model: nn.Module, mirror: nn.Module) -> str | None:
    """Where the module lives whose class and SSM layers a copy has."""
    layers, skipped = _layers(mirror), inside_average(model)
    if not layers:
        return None
    for path, module in model.named_modules():
        same = type(module) is type(mirror) and id(module) not in skipped
        if same and _layers(module) == layers:
            return str(path)
    return None


def _layers(module: nn.Module) -> list[tuple[str, str]]:
    """Path and family of every SSM layer, those of averages inside left out."""
    skipped = inside_average(module)
    found = named_layers(module)
    return [(path, family.name) for path, layer, family in found if id(layer) not in skipped]


def _relative(name: str, path: str) -> str:
    return name[len(path) :].lstrip(".") if path else name
