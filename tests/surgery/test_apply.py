"""apply_plan: all or nothing, and whatever hangs on a tensor follows it."""

from __future__ import annotations

from contextlib import ExitStack
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from lightning_compressm._tensors import replaceable
from lightning_compressm.errors import NonFiniteError, SurgeryError, UnsupportedLayerError
from lightning_compressm.surgery import apply
from lightning_compressm.surgery.apply import apply_plan
from lightning_compressm.surgery.plan import SurgeryPlan, TensorEdit
from tests.surgery.models import SelectCase


def _net() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model[1].register_buffer("scratch", torch.ones(4), persistent=False)
    return model


def _picture(model: nn.Module) -> dict[str, Any]:
    """Everything that a refused plan must leave alone: objects, values, attributes."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "tensors": {name: (id(t), t.detach().clone(), t.grad) for name, t in tensors.items()},
        "attributes": {
            name: {k: v for k, v in vars(m).items() if isinstance(v, int | float | str)}
            for name, m in model.named_modules()
        },
    }


def _assert_untouched(model: nn.Module, before: dict[str, Any]) -> None:
    now = _picture(model)
    assert now["attributes"] == before["attributes"]
    assert now["tensors"].keys() == before["tensors"].keys()
    for name, (identity, value, _) in before["tensors"].items():
        assert now["tensors"][name][0] == identity, name
        assert torch.equal(now["tensors"][name][1], value), name


def _small(model: nn.Module, name: str, rows: int = 2, value: float = 1.0) -> TensorEdit:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return TensorEdit(torch.full((rows, *tensors[name].shape[1:]), value))


def test_values_attributes_and_kinds():
    model = _net()
    names = ["0.weight", "0.bias", "1.running_mean", "1.scratch"]
    plan = SurgeryPlan({n: _small(model, n) for n in names}, {"0.out_features": 2, "1.extra": "x"})
    replaced = apply_plan(model, plan)
    assert model[0].weight.shape == (2, 3)
    assert isinstance(model[0].weight, nn.Parameter)
    assert model[0].weight.is_leaf
    assert model[0].out_features == 2
    assert model[1].extra == "x"
    assert model[1].running_mean.shape == (2,)
    assert not isinstance(model[1].running_mean, nn.Parameter)
    assert "1.scratch" not in model.state_dict(), "a buffer stays non-persistent"
    assert "1.running_mean" in model.state_dict()
    assert sorted(replaced) == sorted(names)
    assert [n for n, _ in model.named_parameters()][:2] == ["0.weight", "0.bias"]


def test_undo_brings_back_the_same_objects():
    model = _net()
    before = _picture(model)
    plan = SurgeryPlan(
        {n: _small(model, n) for n in ("0.weight", "1.running_mean")},
        {"0.out_features": 2, "0.new": 1},
    )
    undo = ExitStack()
    apply_plan(model, plan, undo)
    undo.close()
    _assert_untouched(model, before)
    assert not hasattr(model[0], "new")
    undo.close()
    _assert_untouched(model, before)


def test_an_empty_plan_changes_nothing():
    model = _net()
    before = _picture(model)
    assert apply_plan(model, SurgeryPlan()) == {}
    _assert_untouched(model, before)


def test_the_plan_can_be_applied_to_copies():
    """New tensors are copies: two models never share storage through one plan."""
    model = _net()
    twin, plan = deepcopy(model), SurgeryPlan({"0.weight": _small(model, "0.weight")})
    for one in (model, twin):
        apply_plan(one, plan)
    with torch.no_grad():
        model[0].weight.fill_(7)
    assert not (twin[0].weight == 7).any()
    assert not (plan.edits["0.weight"].value == 7).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_and_frozenness_are_kept(dtype: torch.dtype):
    model = _net().to(dtype)
    model[0].weight.requires_grad_(False)
    values = {"0.weight": torch.ones(2, 3), "0.bias": torch.ones(2)}
    edits = {name: TensorEdit(value.double()) for name, value in values.items()}
    apply_plan(model, SurgeryPlan(edits))
    assert model[0].weight.dtype == model[0].bias.dtype == dtype
    assert (model[0].weight.requires_grad, model[0].bias.requires_grad) == (False, True)


def test_meta_tensors_stay_meta():
    model = _net().to("meta")
    apply_plan(model, SurgeryPlan({"0.weight": TensorEdit(torch.ones(2, 3))}))
    assert model[0].weight.is_meta
    assert model[0].weight.shape == (2, 3)


def test_custom_attributes_follow():
    model = _net()
    model[0].weight._optim = {"lr": 0.1}
    model[0].weight._no_weight_decay = True
    apply_plan(model, SurgeryPlan({"0.weight": _small(model, "0.weight")}))
    assert model[0].weight._optim == {"lr": 0.1}
    assert model[0].weight._no_weight_decay


def test_non_contiguous_and_attached_values_are_cleaned():
    model = _net()
    value = torch.ones(3, 2, requires_grad=True).mT * 2
    apply_plan(model, SurgeryPlan({"0.weight": TensorEdit(value)}))
    assert model[0].weight.is_contiguous()
    assert model[0].weight.is_leaf
    assert model[0].weight.grad is None


def test_module_hooks_and_modes_survive():
    case, calls = SelectCase(), []
    case.model[0].register_forward_hook(lambda *_: calls.append("forward"))
    case.model[2].register_full_backward_hook(lambda *_: calls.append("backward"))
    case.model[0].eval()
    apply_plan(case.model, case.plan())
    case.loss().backward()
    assert calls == ["forward", "backward"]
    assert [m.training for m in case.model] == [False, True, True]


# -- ties ----------------------------------------------------------------------------------------


def test_a_tensor_with_owners_elsewhere_stays_shared():
    model = nn.ModuleDict({"a": nn.Linear(3, 4), "b": nn.Linear(3, 4), "c": nn.Bilinear(2, 2, 4)})
    model["b"].weight = model["a"].weight
    model["c"].other_name = model["a"].weight
    old = model["a"].weight
    undo = ExitStack()
    apply_plan(model, SurgeryPlan({"a.weight": _small(model, "a.weight")}), undo)
    assert model["a"].weight is model["b"].weight is model["c"].other_name
    assert model["a"].weight is not old
    undo.close()
    assert model["a"].weight is model["b"].weight is model["c"].other_name is old


def test_a_buffer_with_two_owners_stays_shared():
    model = nn.ModuleList([nn.BatchNorm1d(4), nn.BatchNorm1d(4)])
    model[1].running_mean = model[0].running_mean
    apply_plan(model, SurgeryPlan({"1.running_mean": TensorEdit(torch.zeros(2))}))
    assert model[0].running_mean is model[1].running_mean
    assert model[0].running_mean.shape == (2,)


def test_two_names_of_one_tensor_with_one_value():
    model = nn.ModuleList([nn.Linear(3, 4), nn.Linear(3, 4)])
    model[1].weight = model[0].weight
    plan = SurgeryPlan({f"{i}.weight": TensorEdit(torch.ones(2, 3)) for i in range(2)})
    replaced = apply_plan(model, plan)
    assert model[0].weight is model[1].weight
    assert replaced["0.weight"].new is replaced["1.weight"].new


@pytest.mark.parametrize("other", [torch.zeros(2, 3), torch.ones(1, 3)], ids=["value", "shape"])
def test_two_names_of_one_tensor_with_two_values_are_refused(other: Tensor):
    model = nn.ModuleList([nn.Linear(3, 4), nn.Linear(3, 4)])
    model[1].weight = model[0].weight
    before = _picture(model)
    plan = SurgeryPlan({"0.weight": TensorEdit(torch.ones(2, 3)), "1.weight": TensorEdit(other)})
    with pytest.raises(SurgeryError, match="shares its tensor"):
        apply_plan(model, plan)
    _assert_untouched(model, before)


def test_ties_on_the_meta_device():
    model = nn.ModuleList([nn.Linear(3, 4), nn.Linear(3, 4)]).to("meta")
    model[1].weight = model[0].weight
    value = torch.ones(2, 3, device="meta")
    apply_plan(model, SurgeryPlan({f"{i}.weight": TensorEdit(value) for i in range(2)}))
    assert model[0].weight is model[1].weight


def test_a_module_registered_twice_is_changed_once():
    shared = nn.Linear(3, 4)
    model = nn.ModuleDict({"a": shared, "b": shared})
    apply_plan(model, SurgeryPlan({"b.weight": TensorEdit(torch.ones(2, 3))}))
    assert model["a"].weight.shape == (2, 3)


# -- refusals, before anything is changed --------------------------------------------------------


def _spectral(model: nn.Module) -> None:
    parametrizations.spectral_norm(model[2])


def _identity(model: nn.Module) -> None:
    parametrize.register_parametrization(model[2], "weight", nn.Identity())


def _post_hooked(model: nn.Module) -> None:
    model[2].weight.register_post_accumulate_grad_hook(lambda p: None)


def _accumulator(parameter: torch.Tensor) -> Any:
    """The node that writes the gradient; it lives as long as somebody holds it."""
    node: Any = parameter.expand_as(parameter).grad_fn
    return node.next_functions[0][0]


def _node_hooked(model: nn.Module) -> None:
    model.node = _accumulator(model[2].weight)
    model.node.register_hook(lambda *gradients: None)


def _node_prehooked(model: nn.Module) -> None:
    model.node = _accumulator(model[2].weight)
    model.node.register_prehook(lambda *gradients: None)


def _pruned(model: nn.Module) -> None:
    prune.random_unstructured(model[2], "weight", 0.5)


def _special(model: nn.Module) -> None:
    class Special(nn.Parameter):
        pass

    model[2].weight = Special(model[2].weight.detach())


def _lazy(model: nn.Module) -> None:
    model[2] = nn.LazyLinear(2)


@pytest.mark.parametrize(
    ("prepare", "error", "message"),
    [
        (_spectral, UnsupportedLayerError, "parametrized"),
        (_identity, UnsupportedLayerError, "remove_parametrizations"),
        (_post_hooked, UnsupportedLayerError, "has hooks after accumulation"),
        (_node_hooked, UnsupportedLayerError, "has hooks on the node that accumulates"),
        (_node_prehooked, UnsupportedLayerError, "has hooks on the node that accumulates"),
        (_pruned, SurgeryError, "neither a parameter nor a buffer"),
        (_special, UnsupportedLayerError, "type Special"),
        (_lazy, UnsupportedLayerError, "type UninitializedParameter"),
    ],
)
def test_tensors_that_can_not_be_replaced(prepare: Any, error: type[Exception], message: str):
    model = _net()
    prepare(model)
    edits = {"0.weight": _small(model, "0.weight"), "2.weight": TensorEdit(torch.ones(2, 2))}
    identities = {n: id(t) for n, t in model.named_parameters()}
    with pytest.raises(error, match=message):
        apply_plan(model, SurgeryPlan(edits, {"0.out_features": 2}))
    assert {n: id(t) for n, t in model.named_parameters()} == identities
    assert model[0].out_features == 4


@pytest.mark.parametrize(
    ("edits", "attributes", "error", "message"),
    [
        ({"9.weight": torch.ones(2, 2)}, {}, SurgeryError, "no module '9'"),
        ({"2.nothing": torch.ones(2, 2)}, {}, SurgeryError, "neither a parameter nor a buffer"),
        ({"2.out_features": torch.ones(2)}, {}, SurgeryError, "neither a parameter nor a buffer"),
        ({"2.weight": torch.ones(2)}, {}, SurgeryError, r"expected a value like shape \(2, 4\)"),
        ({"2.weight": torch.ones(2, 2) * 1j}, {}, SurgeryError, "wrong plan"),
        ({"2.weight": torch.full((2, 2), torch.nan)}, {}, NonFiniteError, "'2.weight'"),
        ({"2.weight": torch.full((2, 2), torch.inf)}, {}, NonFiniteError, "NaN or infinity"),
        (
            {"2.weight": torch.full((2, 2), 1e300, dtype=torch.float64)},
            {},
            NonFiniteError,
            "NaN or infinity",
        ),
        ({"2.weight": torch.ones(2, 2)}, {"9.size": 2}, SurgeryError, "no attribute '9'"),
    ],
)
def test_plans_that_do_not_fit(
    edits: dict[str, Tensor], attributes: dict[str, Any], error: type[Exception], message: str
):
    model = _net()
    before = _picture(model)
    plan = {"0.weight": _small(model, "0.weight")}
    plan |= {name: TensorEdit(value) for name, value in edits.items()}
    with pytest.raises(error, match=message):
        apply_plan(model, SurgeryPlan(plan, {"0.out_features": 2, **attributes}))
    _assert_untouched(model, before)


@pytest.mark.parametrize("fail_at", range(6))
def test_a_failure_in_the_middle_takes_everything_back(
    fail_at: int, monkeypatch: pytest.MonkeyPatch
):
    """Whatever the assignment that fails, tensors and attributes are as they were."""

    class Fragile(nn.Linear):
        armed = False

        def __setattr__(self, name: str, value: Any) -> None:
            if name == "out_features" and self.armed and fail_at == 5 and value == 2:
                raise RuntimeError("injected")
            super().__setattr__(name, value)

    model = nn.ModuleList([Fragile(3, 4), nn.BatchNorm1d(4), nn.Linear(3, 4)])
    model[2].weight = model[0].weight
    before = _picture(model)
    Fragile.armed, count, real = True, iter(range(100)), apply._set_tensor

    def assign(owner: nn.Module, key: str, tensor: Tensor) -> None:
        if next(count) == fail_at < 5:
            raise RuntimeError("injected")
        real(owner, key, tensor)

    monkeypatch.setattr(apply, "_set_tensor", assign)
    names = ("0.weight", "0.bias", "1.running_mean", "1.running_var")
    plan = SurgeryPlan({n: _small(model, n) for n in names}, {"0.kind": 1, "0.out_features": 2})
    with pytest.raises(RuntimeError, match="injected"):
        apply_plan(model, plan)
    Fragile.armed = False
    _assert_untouched(model, before)
    assert not hasattr(model[0], "kind")


def test_looking_for_hooks_on_a_node_leaves_it_as_it_is():
    """A node that somebody holds, as DDP does, without hooks or with some that were removed."""
    layer, calls = nn.Linear(3, 4, bias=False), []
    node = _accumulator(layer.weight)
    handle = node.register_hook(lambda *gradients: calls.append("hook"))
    with torch.no_grad(), pytest.raises(UnsupportedLayerError, match="AccumulateGrad"):
        replaceable(layer, "weight")
    layer(torch.ones(1, 3)).sum().backward()
    assert calls == ["hook"]
    handle.remove()
    replaceable(layer, "weight")
    assert _accumulator(layer.weight) is node


def test_gradient_hooks_go_on_and_can_still_be_removed():
    layer, shapes = nn.Linear(3, 4, bias=False), []
    handle = layer.weight.register_hook(lambda gradient: shapes.append(tuple(gradient.shape)))

    def backward() -> None:
        layer(torch.ones(1, 3)).sum().backward()

    backward()
    undo = ExitStack()
    with pytest.warns(UserWarning, match="gradient hooks on 'weight' go on"):
        apply_plan(layer, SurgeryPlan({"weight": TensorEdit(torch.ones(2, 3))}), undo)
    backward()
    undo.close()
    backward()
    assert shapes == [(4, 3), (2, 3), (4, 3)]
    with pytest.warns(UserWarning, match="gradient hooks"):
        apply_plan(layer, SurgeryPlan({"weight": TensorEdit(torch.ones(2, 3))}))
    handle.remove()
    backward()
    assert len(shapes) == 3
