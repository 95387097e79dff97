"""The contract of a selective architecture, whose recurrence depends on its input."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_compressm.control.calibration import SelectiveSignals
from lightning_compressm.errors import NonFiniteError
from lightning_compressm.families._base import FamilyBase, shape_source, tensor_of
from lightning_compressm.surgery.plan import Select, SurgeryPlan, TensorEdit, take

__all__ = ["READOUT", "SHIFT", "SelectiveFamily"]

READOUT = "readout"
"""In a projection: (groups, r, N), added to the kept rows of C as ``delta C``."""

SHIFT = "shift:"
"""Prefix, in a projection, of what a local refit added to a tensor."""


class SelectiveFamily(FamilyBase):
    """One selective SSM architecture, whose states are kept or dropped as they are.

    Only whole states can go: a change of basis can't be written back into the weights. A family
    says where in the tensors a state lives (:meth:`state_entries`), what the recurrence sees for a
    given input (:meth:`signals`), and how the layer makes up for what is gone: ``refit`` is
    ``"readout"`` where C is a linear function of the weights (:meth:`write_readout`), ``"local"``
    where the tensors of :meth:`local_tensors` are fitted to the old output.

    Attributes:
        refit: how the rest of the layer makes up for lost states.
        approximate: whether dropping states without read-out still changes the output, as where
            B or C is normalised over the states.

    Example:
        >>> from lightning_compressm.families import registered_families
        >>> isinstance(registered_families()["LRU"], SelectiveFamily)
        False
    """

    refit: ClassVar[Literal["readout", "local"]]
    approximate: ClassVar[bool] = False
    needs_data: ClassVar[bool] = True

    @abstractmethod
    def state_entries(self, module: nn.Module, keep: Tensor) -> dict[str, tuple[int, Tensor]]:
        """Which entries of each tensor stay if the states ``keep``, (groups, r), stay.

        Returns:
            Tensor name -> dimension, and indices along it; 2-D where each slice along dimension 0
            has indices of its own.
        """

    @abstractmethod
    def signals(self, module: nn.Module, inputs: Tensor) -> SelectiveSignals:
        """What the recurrence sees when the layer processes ``inputs``, (batch, L, d_model)."""

    def groups(self, module: nn.Module) -> int:
        """Number of groups that have a B and a C of their own."""
        return 1

    def write_readout(self, module: nn.Module, keep: Tensor, delta: Tensor) -> dict[str, Tensor]:
        """Tensors of the reduced layer in which C is ``C[keep] + delta C``, (groups, r, N)."""
        raise NotImplementedError(f"{type(self).__name__} has no linear read-out")

    def local_tensors(self, module: nn.Module) -> tuple[str, ...]:
        """Parameters that a local refit may change."""
        return ()

    def readout_entries(self, module: nn.Module, states: Tensor) -> dict[str, tuple[int, Tensor]]:
        """Which entries, set to zero, make C of some states zero; only the contract tests ask.

        Args:
            module: a layer of this family.
            states: (groups, k).

        Returns:
            Tensor name -> dimension, and indices along it; 2-D where each slice along dimension 0
            has indices of its own.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say what makes its C zero")

    def inputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
        """The layer's input in a call, padding set to zero; ``None`` if there is none."""
        values = [t for t in (*args, *kwargs.values()) if torch.is_tensor(t)]
        if not values or values[0].ndim != 3 or values[0].shape[1] < 2 or len(values[0]) == 0:
            return None
        mask = kwargs.get("attention_mask")
        if torch.is_tensor(mask) and mask.shape == values[0].shape[:2]:
            return values[0] * mask.unsqueeze(-1).to(values[0].dtype)
        return values[0]

    def run(self, module: nn.Module, inputs: Tensor) -> Tensor:
        """The layer's output for ``inputs``."""
        outputs = module(inputs)
        tensor: Tensor = outputs[0] if isinstance(outputs, tuple) else outputs
        return tensor

    def state_axes(self, module: nn.Module) -> dict[str, int]:
        """Tensors with entries that belong to states, and the dimension that these lie along."""
        keep = torch.zeros(self.groups(module), 1, dtype=torch.long)
        return {name: dim for name, (dim, _) in self.state_entries(module, keep).items()}

    def entries(self, module: nn.Module, index: Tensor) -> dict[str, tuple[int, Tensor]]:
        """The entries of the same states in every group."""
        return self.state_entries(module, index.expand(self.groups(module), -1))

    def selection_plan(self, module: nn.Module, keep: Tensor) -> SurgeryPlan:
        """The plan that keeps the states ``keep``, (groups, r), as they are."""
        edits = {}
        for name, (dim, index) in self.state_entries(module, keep.cpu()).items():
            tensor = tensor_of(module, name).detach()
            edits[name] = TensorEdit(take(tensor, dim, index), Select(dim, index))
        return SurgeryPlan(edits, self.attributes(module, keep.shape[1]), {"": {"keep": keep}})

    def projected_plan(self, module: nn.Module, projection: Mapping[str, Tensor]) -> SurgeryPlan:
        """The same states, the same combination of the old C, the same shifts of a local refit."""
        keep = projection["keep"]
        plan = self.selection_plan(module, keep)
        edits = dict(plan.edits)
        if READOUT in projection:
            with torch.no_grad():
                values = self.write_readout(module, keep, projection[READOUT])
            edits |= {name: TensorEdit(value) for name, value in values.items()}
        for name, edit in plan.edits.items():
            shift = projection.get(SHIFT + name)
            if shift is not None:
                edits[name] = TensorEdit(edit.value + shift.to(edit.value))
        return SurgeryPlan(edits, plan.attributes)

    def check_finite(self, module: nn.Module) -> None:
        """Raise ``NonFiniteError`` if a tensor with states holds NaN or infinity."""
        for name in self.state_axes(module):
            if not bool(torch.isfinite(shape_source(module, name)).all()):
                raise NonFiniteError(
                    f"expected a finite '{name}', got NaN or infinity; the training run has "
                    "probably diverged: lower the learning rate or use an earlier checkpoint"
                )


def rows_of_blocks(size: int, start: int, keep: Tensor, n: int, blocks: int = 1) -> Tensor:
    """Indices along a dimension of ``size`` entries that leave some states of packed blocks.

    From ``start`` on there lie ``blocks`` times ``groups`` times ``n`` entries, one for each state;
    all others stay.

    Args:
        size: of the dimension.
        start: where the first block starts.
        keep: states that stay, (groups, r).
        n: states in each group.
        blocks: how many blocks follow each other (2 for B and C).

    Example:
        >>> rows_of_blocks(7, 1, torch.tensor([[1]]), 2, blocks=2).tolist()
        [0, 2, 4, 5, 6]
    """
    groups = keep.shape[0]
    offsets = start + n * torch.arange(blocks * groups).unsqueeze(-1)
    states = (offsets + keep.repeat(blocks, 1)).flatten()
    end = start + blocks * groups * n
    return torch.cat([torch.arange(start), states, torch.arange(end, size)])
