"""Small models for surgery: one reduced through a change of basis, one by picking hidden units."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_compressm.control import balanced_truncation
from lightning_compressm.families.lru import LRUFamily
from lightning_compressm.nn import LRU
from lightning_compressm.surgery.plan import Select, SurgeryPlan, TensorEdit

KEEP = torch.tensor([6, 1, 3])


@dataclass
class Case:
    """A model, data for it, and a plan that makes it smaller."""

    model: nn.Module
    inputs: Tensor

    def plan(self) -> SurgeryPlan:
        raise NotImplementedError

    def loss(self) -> Tensor:
        outputs = self.model(self.inputs)
        return (outputs - torch.sin(3 * self.inputs.sum(-1, keepdim=True))).square().mean()


class LRUCase(Case):
    """12 -> 5 states of an LRU: moments follow a linear map."""

    def __init__(self) -> None:
        model = nn.Sequential(nn.Linear(2, 4), LRU(4, 12), nn.Linear(4, 1))
        super().__init__(model, torch.randn(3, 10, 2))

    def plan(self, order: int = 5, balance: str = "real") -> SurgeryPlan:
        family, layer = LRUFamily(), self.model[1]
        reduction = balanced_truncation(family.system(layer), order, balance=balance)
        return family.reduction_plan(layer, reduction).prefixed("1")


class SelectCase(Case):
    """8 -> 3 hidden units: moments are picked by index."""

    def __init__(self) -> None:
        model = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
        super().__init__(model, torch.randn(20, 2))

    def plan(self) -> SurgeryPlan:
        dims = {"0.weight": 0, "0.bias": 0, "2.weight": 1}
        edits = {
            name: TensorEdit(
                self.model.get_parameter(name).detach().index_select(dim, KEEP), Select(dim, KEEP)
            )
            for name, dim in dims.items()
        }
        return SurgeryPlan(edits, {"0.out_features": 3, "2.in_features": 3})
