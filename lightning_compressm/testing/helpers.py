"""What the checks of a family's contract share: example layers, reductions, comparisons."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_compressm.control import Reduction, balanced_truncation
from lightning_compressm.families import Family, FamilyBase, SelectiveFamily
from lightning_compressm.families._base import tensor_of
from lightning_compressm.model.change import change
from lightning_compressm.surgery.plan import SurgeryPlan

__all__ = [
    "drop",
    "example",
    "expect",
    "expect_dim",
    "half",
    "identical",
    "parametrize_tensor",
    "poison",
    "random_states",
    "reduce",
    "relative",
    "run",
    "run_steps",
    "stop_reading",
    "surround",
    "tensors_of",
    "train_step",
    "traits",
    "truncate",
]


def expect(holds: bool, message: str) -> None:
    """Raise AssertionError with a message unless something holds."""
    if not holds:
        raise AssertionError(message)


def expect_dim(family: FamilyBase, layer: nn.Module, order: int, when: str) -> None:
    """The layer has ``order`` states, and so has each of its tensors."""
    got = family.state_dim(layer)
    expect(got == order, f"state dimension {got} {when}; expected {order}")
    for name, (dim, index) in family.entries(layer, torch.arange(order)).items():
        size, wanted = tensor_of(layer, name).shape[dim], index.shape[-1]
        expect(
            size == wanted,
            f"'{name}' has size {size} along {dim} {when}; expected {wanted} for {order} states",
        )


def example(family: FamilyBase, *, double: bool = False) -> tuple[nn.Module, Tensor]:
    """The family's example layer and an input, in single or double precision."""
    layer, inputs = family.example()
    if double:
        layer._apply(_widened)  # type: ignore[no-untyped-call]
        inputs = _widened(inputs)
    return layer, inputs


def _widened(tensor: Tensor) -> Tensor:
    if tensor.is_complex():
        return tensor.to(torch.complex128)
    return tensor.double() if tensor.is_floating_point() else tensor


def run(layer: nn.Module, inputs: Tensor) -> Tensor:
    """The layer's output, without gradients."""
    with torch.no_grad():
        return _first_tensor(layer(inputs))


@torch.no_grad()
def run_steps(layer: Any, inputs: Tensor, length_dim: int) -> Tensor:
    """The layer's output, one time step after the other."""
    state, outputs = layer.initial_state(inputs.shape[0]), []
    for x in inputs.unbind(length_dim):
        y, state = layer.step(x, state)
        outputs.append(y)
    return torch.stack(outputs, length_dim)


def _first_tensor(outputs: Any) -> Tensor:
    tensor: Tensor = outputs[0] if isinstance(outputs, tuple | list) else outputs
    return tensor


def relative(output: Tensor, wanted: Tensor) -> float:
    """Norm of the difference, relative to that of what was wanted."""
    return float((output - wanted).norm() / wanted.norm())


def train_step(layer: nn.Module, inputs: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """One optimizer step towards an output of ones."""
    optimizer.zero_grad()
    outputs = _first_tensor(layer(inputs))
    loss = (outputs - torch.ones_like(outputs)).abs().square().mean()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def half(family: FamilyBase, layer: nn.Module) -> int:
    """Half of the layer's states, at least one."""
    return max(1, family.state_dim(layer) // 2)


def reduce(
    family: FamilyBase,
    layer: nn.Module,
    order: int,
    *optimizers: torch.optim.Optimizer,
    root: nn.Module | None = None,
    prefix: str = "",
) -> None:
    """Reduce ``layer``, which ``root`` calls ``prefix``, to ``order`` states.

    A linear layer is balanced and truncated. A selective one loses states of random choice, in each
    group its own.
    """
    if isinstance(family, SelectiveFamily):
        plan = family.selection_plan(layer, random_states(family, layer, order)[0])
    else:
        assert isinstance(family, Family)
        plan = _truncation(family, layer, order)[1]
    change(layer if root is None else root, plan.prefixed(prefix), optimizers)


def truncate(family: Family, layer: nn.Module, order: int) -> Reduction:
    """Reduce a linear layer, and tell how."""
    reduction, plan = _truncation(family, layer, order)
    change(layer, plan)
    return reduction


@torch.no_grad()
def _truncation(family: Family, layer: nn.Module, order: int) -> tuple[Reduction, SurgeryPlan]:
    system = family.system(layer)
    reduction = balanced_truncation(system, order, balance=family.balance_for("auto", system))
    return reduction, family.reduction_plan(layer, reduction)


def random_states(family: SelectiveFamily, layer: nn.Module, order: int) -> tuple[Tensor, Tensor]:
    """States of each group to keep, (groups, order), and the others; both ascending."""
    n = family.state_dim(layer)
    mixed = torch.stack([torch.randperm(n) for _ in range(family.groups(layer))])
    return mixed[:, :order].sort().values, mixed[:, order:].sort().values


@torch.no_grad()
def stop_reading(family: SelectiveFamily, layer: nn.Module, kept: int) -> tuple[Tensor, Tensor]:
    """Zero what makes C of some random states; returns the states still read, and those not."""
    keep, lost = random_states(family, layer, kept)
    for name, (dim, index) in family.readout_entries(layer, lost).items():
        tensor = tensor_of(layer, name)
        if index.ndim == 1:
            tensor.index_fill_(dim, index, 0)
            continue
        for part, own in zip(tensor, index, strict=True):
            part.index_fill_(dim - 1, own, 0)
    return keep, lost


def drop(family: SelectiveFamily, layer: nn.Module, keep: Tensor) -> None:
    """Keep the states ``keep``, (groups, r), of a selective layer as they are."""
    change(layer, family.selection_plan(layer, keep))


def tensors_of(layer: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return dict(layer.named_parameters()) | dict(layer.named_buffers())


def surround(layer: nn.Module, names: list[str]) -> tuple[nn.Module, list[None]]:
    """Put a layer into a model that shares its tensors, and leave marks on it."""
    twins = nn.ModuleList()
    for name in names:
        tensor, twin = tensor_of(layer, name), nn.Module()
        if isinstance(tensor, nn.Parameter):
            tensor.mark = name  # type: ignore[attr-defined]
            twin.register_parameter("it", tensor)
        else:
            twin.register_buffer("it", tensor)
        twins.append(twin)
    next(layer.parameters()).requires_grad_(False)
    calls: list[None] = []
    layer.register_forward_hook(lambda *_: calls.append(None))
    return nn.ModuleDict({"layer": layer, "twins": twins}).eval(), calls


def traits(tensor: Tensor) -> tuple[object, ...]:
    """What a reduction must not change of a tensor."""
    mark = getattr(tensor, "mark", None)
    return type(tensor), tensor.dtype, tensor.device, tensor.requires_grad, tensor.ndim, mark


def identical(tensors: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    """Same names and equal values, NaN counted as equal to NaN."""
    return tensors.keys() == others.keys() and all(
        torch.equal(a.isnan(), b.isnan()) and torch.equal(a[~a.isnan()], b[~b.isnan()])
        for a, b in ((tensors[name], others[name]) for name in tensors)
    )


def parametrize_tensor(layer: nn.Module, name: str) -> None:
    """Let a parametrization that does nothing compute a tensor."""
    path, _, key = name.rpartition(".")
    parametrize.register_parametrization(layer.get_submodule(path), key, nn.Identity())


def poison(layer: nn.Module, name: str) -> None:
    """Put a NaN into a tensor."""
    with torch.no_grad():
        tensor_of(layer, name).view(-1)[0] = float("nan")
