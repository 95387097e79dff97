"""Give all selective layers of a model one state dimension again, without changing what it does."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import TypeVar

import torch
from torch import Tensor, nn

from lightning_compressm.errors import UnsupportedLayerError
from lightning_compressm.families import SelectiveFamily, model_attributes, named_layers
from lightning_compressm.surgery.apply import apply_plan
from lightning_compressm.surgery.plan import SurgeryPlan, TensorEdit

__all__ = ["pad_state_dim"]

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def pad_state_dim(model: ModuleT, state_dim: int | None = None) -> ModuleT:
    """Pad every selective layer with states that do nothing, in place; the config follows.

    A config of transformers describes one state dimension for all layers, so that a model whose
    layers were cut to different ones can be saved by ``save_pretrained`` only after this. The new
    states are neither written nor read (their rows of B and C, with biases and channels of the
    convolution, are zero), and stay so in training, since their gradients are zero. For export:
    tensors are new objects, and optimizers are not carried along.

    Args:
        model: any module with selective layers; linear layers in it are left alone.
        state_dim: for all of them; by default, for each family the largest one that it has.

    Returns:
        The same model. It computes the same, up to the rounding of sums with zeros in them.

    Raises:
        ValueError: if ``state_dim`` is smaller than the state dimension of a layer.
        UnsupportedLayerError: if there is no selective layer, or if one that needs padding
            normalises B and C over the states (FalconMamba, Jamba, Gated DeltaNet), which padding
            would change.
        CompreSSMError: if a tensor can't be replaced. The model is untouched then.

    Example:
        >>> import torch
        >>> from lightning_compressm.nn._mamba import MambaBlock
        >>> model = nn.Sequential(MambaBlock(4, 3), MambaBlock(4, 5))
        >>> pad_state_dim(model)[0].A_log.shape
        torch.Size([8, 5])
    """
    layers: dict[str, tuple[nn.Module, SelectiveFamily]] = {}
    largest: dict[str, int] = {}
    for path, module, family in named_layers(model):
        if isinstance(family, SelectiveFamily):
            layers[path] = module, family
            largest[family.name] = max(largest.get(family.name, 1), family.state_dim(module))
    if not layers:
        raise UnsupportedLayerError(
            f"expected a model with selective layers (Mamba, Mamba-2), found none in "
            f"{type(model).__name__}; there is nothing to pad."
        )
    if state_dim is not None:
        _check(state_dim, {path: f.state_dim(m) for path, (m, f) in layers.items()})
    wanted = {p: state_dim or largest[family.name] for p, (_, family) in layers.items()}
    plans = [
        (path, _padding_plan(path, module, family, wanted[path]))
        for path, (module, family) in layers.items()
    ]
    plans.append(("", SurgeryPlan({}, model_attributes(model, wanted))))
    apply_plan(model, SurgeryPlan.merge(plans))
    return model


def _check(state_dim: int, present: Mapping[str, int]) -> None:
    path, most = max(present.items(), key=lambda item: item[1])
    given: object = state_dim
    if not isinstance(given, int) or isinstance(given, bool) or given < most:
        raise ValueError(
            f"state_dim: expected an integer >= {most}, the state dimension of '{path}', got "
            f"{state_dim!r}. Padding only adds states; lightning_compressm.compress removes them."
        )


def _padding_plan(
    path: str, module: nn.Module, family: SelectiveFamily, state_dim: int
) -> SurgeryPlan:
    present = family.state_dim(module)
    if present == state_dim:
        return SurgeryPlan()
    family.refuse(module)
    if family.approximate:
        raise UnsupportedLayerError(
            f"'{path}' normalises B and C over its {present} states, so states that do nothing "
            f"would change the others; expected all layers of this kind to have {state_dim}. "
            "Reduce with share_state_dim=True, or keep the model in a checkpoint of its own and "
            "read it by load_compressed."
        )
    plan = family.resize_plan(module, state_dim)
    padded = deepcopy(module)
    apply_plan(padded, plan)
    old = family.entries(padded, torch.arange(present))
    edits = {}
    for name, edit in plan.edits.items():
        value = edit.value.clone()
        # Rates and fixed scales go on as they are: nothing enters a state whose B is zero.
        if name in dict(module.named_parameters()) and name.rpartition(".")[2] != "A_log":
            value[_is_new(value, *old[name])] = 0
        edits[name] = TensorEdit(value)
    return SurgeryPlan(edits, plan.attributes)


def _is_new(value: Tensor, dim: int, old: Tensor) -> Tensor:
    """Which entries of ``value`` are not among the ``old`` ones along ``dim``, of each slice."""
    new = torch.ones(old.shape[:-1] + value.shape[dim : dim + 1], dtype=torch.bool)
    new.scatter_(-1, old, False)
    # One slice of dimension 0 after the other lies before `dim`, where it is 2-D.
    before = (1,) * (dim - new.ndim + 1)
    shape = (*new.shape[:-1], *before, new.shape[-1], *(1,) * (value.ndim - dim - 1))
    return new.view(shape).expand(value.shape).to(value.device)
