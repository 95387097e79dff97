"""What stays as it was around a reduced layer: points of the contract."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_compressm.compressor import compress
from lightning_compressm.errors import CalibrationError, CompreSSMError
from lightning_compressm.families import FamilyBase, SelectiveFamily
from lightning_compressm.families._base import tensor_of
from lightning_compressm.model.loading import load_compressed
from lightning_compressm.model.resizing import install_resize_hooks
from lightning_compressm.testing import helpers as common
from lightning_compressm.testing._points import point
from lightning_compressm.testing.helpers import expect


@point
def _training_goes_on(family: FamilyBase) -> None:
    """Every new parameter gets a gradient and is changed by the next step of the optimizer."""
    layer, inputs = common.example(family)
    bystander = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.AdamW([*layer.parameters(), bystander], lr=1e-2, weight_decay=0.0)
    for _ in range(2):
        common.train_step(layer, inputs, optimizer)
    common.reduce(family, layer, common.half(family, layer), optimizer)
    parameters = dict(layer.named_parameters())
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    expected = {id(p) for p in (*parameters.values(), bystander)}
    expect(held == expected, "the optimizer does not hold exactly the model's parameters")
    strangers = [tuple(p.shape) for p in optimizer.state if id(p) not in expected]
    expect(not strangers, f"the optimizer keeps state of old parameters, shapes {strangers}")
    before = {name: p.detach().clone() for name, p in parameters.items()}
    common.train_step(layer, inputs, optimizer)
    for name, parameter in parameters.items():
        gradient = parameter.grad
        expect(gradient is not None and bool(gradient.any()), f"no gradient reaches '{name}'")
        expect(bool(torch.isfinite(parameter).all()), f"'{name}' is not finite after a step")
        expect(not torch.equal(parameter, before[name]), f"a step does not change '{name}'")


@point
def _checkpoints_load_at_full_size(family: FamilyBase) -> None:
    """A reduced layer's state dict loads into a new full-size layer, which then computes the same.

    Through :func:`load_compressed`, and through ``load_state_dict`` once the hooks are installed;
    and a full-size state dict loads into a reduced layer.
    """
    layer, inputs = common.example(family)
    full_state = deepcopy(layer.state_dict())
    full_outputs, n = common.run(layer, inputs), family.state_dim(layer)
    common.reduce(family, layer, common.half(family, layer))
    fresh = [common.example(family)[0] for _ in range(2)]
    load_compressed(nn.Sequential(fresh[0]), nn.Sequential(layer).state_dict())
    install_resize_hooks(fresh[1])
    fresh[1].load_state_dict(layer.state_dict())
    for way, loaded in zip(("load_compressed", "load_state_dict"), fresh, strict=True):
        common.expect_dim(family, loaded, family.state_dim(layer), f"after {way}")
        same = torch.equal(common.run(loaded, inputs), common.run(layer, inputs))
        expect(same, f"{way} into a full-size layer gives other outputs")
    load_compressed(layer, full_state)
    common.expect_dim(family, layer, n, "after loading a full-size checkpoint")
    same = torch.equal(common.run(layer, inputs), full_outputs)
    expect(same, "a full-size checkpoint in a reduced layer gives other outputs")


@point
def _surroundings_survive(family: FamilyBase) -> None:
    """Type, device, frozenness, attributes, ties, hooks, names and mode stay as they were."""
    for double in (False, True):
        layer, inputs = common.example(family, double=double)
        names = list(family.state_axes(layer))
        root, calls = common.surround(layer, names)
        before = {name: common.traits(t) for name, t in common.tensors_of(layer).items()}
        order = common.half(family, layer)
        common.reduce(family, layer, order, root=root, prefix="layer")
        common.expect_dim(family, layer, order, "after a reduction")
        after = {name: common.traits(t) for name, t in common.tensors_of(layer).items()}
        expect(after == before, f"traits of the tensors changed: {before} became {after}")
        for name, twin in zip(names, root.get_submodule("twins").children(), strict=True):
            expect(tensor_of(twin, "it") is tensor_of(layer, name), f"'{name}' is no longer tied")
        common.run(layer, inputs)
        expect(len(calls) == 1, f"a forward hook fired {len(calls)} times in one call")
        expect(not any(m.training for m in root.modules()), "the layer left evaluation mode")


@point
def _averages_follow(family: FamilyBase) -> None:
    """An average that holds the layer's own values computes what the reduced layer computes."""
    layer, inputs = common.example(family, double=True)
    average = AveragedModel(layer)
    root = nn.ModuleDict({"layer": layer, "average": average})
    order = common.half(family, layer)
    common.reduce(family, layer, order, root=root, prefix="layer")
    common.expect_dim(family, average.module, order, "in an average of the layer")
    wanted = common.run(layer, inputs)
    error = common.relative(common.run(average.module, inputs), wanted)
    expect(
        error <= 1e-8,
        f"an average of the same values gives an output that differs by {error:.2g} (relative); "
        "expected the same. reduction_plan() and projected_plan() do not agree",
    )


@point
def _step_follows(family: FamilyBase) -> None:
    """Where there is ``step(x, state)``, it equals the parallel form after a reduction."""
    layer, inputs = common.example(family, double=True)
    if not (hasattr(layer, "step") and hasattr(layer, "initial_state")):
        return
    common.reduce(family, layer, common.half(family, layer))
    stepped = common.run_steps(layer, inputs, family.length_dim)
    parallel = common.run(layer, inputs)
    error = float((stepped - parallel).abs().max() / parallel.abs().max())
    expect(error <= 1e-8, f"step() differs from the parallel form by {error:.2g} (relative)")


@point
def _refusals_change_nothing(family: FamilyBase) -> None:
    """What can't be reduced is refused with the package's errors, before any change.

    That is a parametrized tensor, NaN, and a selective layer without calibration data.
    """
    layer, _ = common.example(family)
    first = next(iter(family.state_axes(layer)))
    common.parametrize_tensor(layer, first)
    _expect_refusal(family, layer, "a parametrized tensor")
    layer, _ = common.example(family)
    common.poison(layer, first)
    _expect_refusal(family, layer, "NaN")
    if isinstance(family, SelectiveFamily):
        layer, _ = common.example(family)
        _expect_refusal(family, layer, "a missing sample", CalibrationError, sample=False)


def _expect_refusal(
    family: FamilyBase,
    layer: nn.Module,
    what: str,
    wanted: type[CompreSSMError] = CompreSSMError,
    *,
    sample: bool = True,
) -> None:
    inputs = common.example(family)[1] if sample else None
    tensors = common.tensors_of(layer)
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    try:
        compress(layer, state_dim=1, sample=inputs)
    except wanted:
        pass
    else:
        raise AssertionError(f"{what} is not refused; expected a {wanted.__name__}")
    now = common.tensors_of(layer)
    same = all(tensor is tensors.get(name) for name, tensor in now.items())
    expect(
        same and common.identical(now, before),
        f"{what} is refused only after the layer was changed",
    )
