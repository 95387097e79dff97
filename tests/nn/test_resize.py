"""A checkpoint of another size resizes a layer of ours, or leaves it for torch to report."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from lightning_compressm.errors import (
    CheckpointError,
    NonFiniteError,
    SurgeryError,
    UnsupportedLayerError,
)
from lightning_compressm.nn import LRU, S4D, S5
from lightning_compressm.nn._resize import resize_to_checkpoint

Layer = LRU | S4D | S5
KINDS = [LRU, S4D, S5]
FULL, REDUCED = 8, 3


def _weights(layer: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in layer.named_parameters()}


def _unchanged(layer: nn.Module, before: dict[str, Tensor], objects: list[Tensor]) -> bool:
    same_objects = all(a is b for a, b in zip(layer.parameters(), objects, strict=True))
    now = _weights(layer)
    return same_objects and all(torch.equal(now[name], before[name]) for name in before)


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def kind(request: pytest.FixtureRequest) -> type[Layer]:
    result: type[Layer] = request.param
    return result


def test_the_table_names_every_tensor_with_states(kind: type[Layer]):
    """And every tensor whose shape depends on them, along the right axis."""
    few, many = kind(4, 5), kind(4, 6)
    changing = {
        name: axis
        for name, tensor in few.named_parameters()
        for axis, size in enumerate(many.get_parameter(name).shape)
        if tensor.shape[axis] != size
    }
    assert changing == dict(kind.state_axes)


@pytest.mark.parametrize("states", [1, REDUCED, FULL + 4])
@pytest.mark.parametrize("assign", [False, True])
def test_layers_take_any_number_of_states(kind: type[Layer], states: int, assign: bool):
    layer, source = kind(4, FULL), kind(4, states)
    layer.load_state_dict(source.state_dict(), assign=assign)
    assert layer.d_state == states
    x = torch.randn(2, 9, 4)
    assert torch.equal(layer(x), source(x))


def test_new_parameters_keep_what_the_old_ones_had(kind: type[Layer]):
    layer = kind(4, FULL).double()
    names = list(kind.state_axes)
    layer.get_parameter(names[0]).requires_grad_(False)
    layer.get_parameter(names[1])._optim = {"weight_decay": 0.0}  # type: ignore[attr-defined]
    before = [id(p) for p in layer.parameters()]
    layer.load_state_dict(kind(4, REDUCED).state_dict())
    assert {p.dtype for p in layer.parameters()} == {torch.float64}
    assert [p.requires_grad for p in layer.parameters()].count(False) == 1
    assert not layer.get_parameter(names[0]).requires_grad
    assert layer.get_parameter(names[1])._optim == {"weight_decay": 0.0}  # type: ignore[attr-defined]
    now = {name: id(p) for name, p in layer.named_parameters()}
    kept = {name for (name, new), old in zip(now.items(), before, strict=True) if new == old}
    assert kept == now.keys() - kind.state_axes.keys()


def test_layers_without_storage_stay_without_it(kind: type[Layer]):
    layer = kind(4, FULL, device="meta")
    small = kind(4, REDUCED, device="meta")
    layer.load_state_dict(small.state_dict())
    assert [(p.shape, p.is_meta) for p in layer.parameters()] == [
        (p.shape, True) for p in small.parameters()
    ]
    source = kind(4, FULL - 1)
    layer.load_state_dict(source.state_dict(), assign=True)
    assert not any(p.is_meta for p in layer.parameters())
    assert layer.d_state == FULL - 1


def test_tied_tensors_stay_tied(kind: type[Layer]):
    first, second = list(kind.state_axes)[:2]
    layer, source = kind(4, FULL), kind(4, REDUCED)
    layer.register_parameter(second, layer.get_parameter(first))
    layer.register_module("inside", nn.Module())
    layer.inside.register_parameter("again", layer.get_parameter(first))  # type: ignore[union-attr]
    layer.load_state_dict(source.state_dict(), strict=False)
    assert getattr(layer, second) is getattr(layer, first)
    assert layer.inside.again is getattr(layer, first)  # type: ignore[union-attr]
    assert getattr(layer, first).shape[kind.state_axes[first]] == REDUCED


def test_one_tensor_along_two_axes_is_refused():
    layer, source = LRU(4, 4), LRU(4, REDUCED)
    layer.C_re = layer.B_re
    objects = list(layer.parameters())
    with pytest.raises(SurgeryError, match="shares its tensor with another"):
        layer.load_state_dict(source.state_dict())
    assert all(a is b for a, b in zip(layer.parameters(), objects, strict=True))
    assert layer.d_state == 4


def _changes(kind: type[Layer]) -> Iterator[tuple[Callable[[dict[str, Any]], object], str]]:
    names = list(kind.state_axes)
    yield lambda s: s.pop(names[1]), "Missing key"
    yield lambda s: s.update({names[0]: s[names[0]].unsqueeze(0)}), "size mismatch"
    yield lambda s: s.update({names[-1]: s[names[-1]][..., :-1]}), "size mismatch"
    yield lambda s: s.update({names[0]: s[names[0]].tolist()}), names[0]
    yield lambda s: s.update({"D": torch.ones(7)}), "size mismatch for D"
    yield lambda s: s.update({n: s[n].narrow(a, 0, 0) for n, a in kind.state_axes.items()}), "size"


@pytest.mark.parametrize("which", range(6))
def test_what_does_not_fit_is_left_for_torch_to_report(kind: type[Layer], which: int):
    layer, state = kind(4, FULL), dict(kind(4, REDUCED).state_dict())
    change, message = list(_changes(kind))[which]
    change(state)
    shapes = {name: (id(p), p.shape) for name, p in layer.named_parameters()}
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(state)
    assert {name: (id(p), p.shape) for name, p in layer.named_parameters()} == shapes
    assert layer.d_state == FULL


def test_a_layer_loads_in_part(kind: type[Layer]):
    """What is missing beside the states is no error without `strict`."""
    layer, source = kind(4, FULL), kind(4, REDUCED)
    state = {n: t for n, t in source.state_dict().items() if n in kind.state_axes}
    missing, unexpected = layer.load_state_dict(state, strict=False)
    assert set(missing) == {n for n, _ in source.named_parameters()} - set(kind.state_axes)
    assert not unexpected
    assert layer.d_state == REDUCED


@pytest.mark.filterwarnings("ignore:Casting complex values")  # torch's, once in a process
def test_imaginary_parts_that_would_be_lost_are_reported(kind: type[Layer]):
    name = next(reversed(kind.state_axes))
    outer, layer = nn.ModuleDict(), kind(4, FULL)
    outer["layer"] = layer
    for states in (FULL, REDUCED):
        saved = {f"layer.{n}": t for n, t in kind(4, states).state_dict().items()}
        saved[f"layer.{name}"] = saved[f"layer.{name}"] * (1 + 1j)
        with pytest.raises(RuntimeError, match=rf"'layer\.{name}': expected a real tensor, got"):
            outer.load_state_dict(saved)
    source = kind(4, FULL)
    layer.load_state_dict({n: t + 0j for n, t in source.state_dict().items()})
    assert all(
        torch.equal(a, b) for a, b in zip(layer.parameters(), source.parameters(), strict=True)
    )


def test_names_that_are_no_text_are_refused(kind: type[Layer]):
    with pytest.raises(CheckpointError, match="expected names of tensors as keys, got 3"):
        kind(4, FULL).load_state_dict({3: torch.ones(1)})  # type: ignore[dict-item]


def test_parametrized_tensors_are_left_alone(kind: type[Layer]):
    layer = kind(4, FULL)
    nn.utils.parametrize.register_parametrization(layer, next(iter(kind.state_axes)), nn.Identity())
    before, objects = _weights(layer), list(layer.parameters())
    layer.load_state_dict(deepcopy(layer.state_dict()))
    assert _unchanged(layer, before, objects)
    with pytest.raises(RuntimeError, match="size mismatch"):
        layer.load_state_dict(kind(4, REDUCED).state_dict())
    assert layer.d_state == FULL


def test_another_parametrized_tensor_is_no_obstacle(kind: type[Layer]):
    layer, source = kind(4, FULL), kind(4, REDUCED)
    for one in (layer, source):
        nn.utils.parametrize.register_parametrization(one, "D", nn.Identity())
    layer.load_state_dict(source.state_dict())
    assert layer.d_state == REDUCED


def test_hooks_after_accumulation_are_refused(kind: type[Layer]):
    layer = kind(4, FULL)
    name = next(iter(kind.state_axes))
    layer.get_parameter(name).register_post_accumulate_grad_hook(lambda _: None)
    before, objects = _weights(layer), list(layer.parameters())
    with pytest.raises(UnsupportedLayerError, match=f"'{name}' has hooks after accumulation"):
        layer.load_state_dict(kind(4, REDUCED).state_dict())
    assert _unchanged(layer, before, objects)
    layer.load_state_dict(kind(4, FULL).state_dict())


def test_gradient_hooks_go_on_with_the_new_shape(kind: type[Layer]):
    layer, seen = kind(4, FULL), []
    name = next(iter(kind.state_axes))
    handle = layer.get_parameter(name).register_hook(lambda grad: seen.append(grad.shape))
    with pytest.warns(UserWarning, match=f"gradient hooks on '{name}' go on"):
        layer.load_state_dict(kind(4, REDUCED).state_dict())
    layer(torch.ones(1, 3, 4)).sum().backward()
    assert seen == [layer.get_parameter(name).shape]
    assert seen[0][kind.state_axes[name]] == REDUCED
    handle.remove()
    layer(torch.ones(1, 3, 4)).sum().backward()
    assert len(seen) == 1


def test_parameters_of_another_type_are_refused(kind: type[Layer]):
    class Marked(nn.Parameter):
        pass

    layer = kind(4, FULL)
    name = next(iter(kind.state_axes))
    layer.register_parameter(name, Marked(layer.get_parameter(name).detach()))
    with pytest.raises(UnsupportedLayerError, match=f"'{name}' has type Marked; expected a plain"):
        layer.load_state_dict(kind(4, REDUCED).state_dict())


def _roundtrip(layer: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(layer))


@pytest.mark.parametrize("copy", [deepcopy, _roundtrip])
def test_copies_resize_themselves_alone(kind: type[Layer], copy: Callable[[nn.Module], Any]):
    layer = kind(4, FULL)
    twin = copy(copy(layer))
    assert len(twin._load_state_dict_pre_hooks) == 1
    twin.load_state_dict(kind(4, REDUCED).state_dict())
    assert (twin.d_state, layer.d_state) == (REDUCED, FULL)
    assert all(layer.get_parameter(n).shape[a] == FULL for n, a in kind.state_axes.items())


class Wider(LRU):
    """One more tensor, of a fixed shape."""

    def __init__(self, d_model: int, d_state: int, width: int = 2) -> None:
        super().__init__(d_model, d_state)
        self.extra = nn.Parameter(torch.ones(width))


class Longer(LRU):
    """One more tensor along the states, which the table tells."""

    state_axes: ClassVar[dict[str, int]] = {**LRU.state_axes, "extra": 1}

    def __init__(self, d_model: int, d_state: int) -> None:
        super().__init__(d_model, d_state)
        self.register_buffer("extra", torch.rand(2, d_state))


class Untold(LRU):
    """One more tensor along the states, of which the table says nothing."""

    def __init__(self, d_model: int, d_state: int) -> None:
        super().__init__(d_model, d_state)
        self.extra = nn.Parameter(torch.ones(d_state))


def test_subclasses_with_tensors_of_their_own():
    layer, source = Wider(4, FULL), Wider(4, REDUCED)
    layer.load_state_dict(source.state_dict())
    assert layer.d_state == REDUCED
    layer = Wider(4, FULL)
    with pytest.raises(RuntimeError, match="size mismatch for nu_log"):
        layer.load_state_dict(Wider(4, REDUCED, width=3).state_dict())
    assert layer.d_state == FULL
    untold = Untold(4, FULL)
    with pytest.raises(RuntimeError, match="size mismatch for extra"):
        untold.load_state_dict(Untold(4, REDUCED).state_dict())
    assert untold.d_state == len(untold.nu_log) == FULL


def test_subclasses_can_add_to_the_table():
    layer, source = Longer(4, FULL), Longer(4, REDUCED)
    layer.load_state_dict(source.state_dict())
    assert layer.d_state == REDUCED
    assert torch.equal(layer.extra, source.extra)
    assert not isinstance(layer.extra, nn.Parameter)
    layer = Longer(4, FULL)
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.load_state_dict(LRU(4, REDUCED).state_dict())
    assert layer.d_state == FULL


def test_a_layer_that_holds_nan_is_not_resized(kind: type[Layer]):
    layer = kind(4, FULL)
    with torch.no_grad():
        layer.get_parameter(list(kind.state_axes)[1]).fill_(float("nan"))
    objects = list(layer.parameters())
    with pytest.raises(NonFiniteError, match="holds NaN or infinity; nothing was changed"):
        layer.load_state_dict(kind(4, REDUCED).state_dict())
    assert all(a is b for a, b in zip(layer.parameters(), objects, strict=True))
    layer.load_state_dict(kind(4, FULL).state_dict())


def test_the_hook_can_be_called_alone(kind: type[Layer]):
    """Without torch's list of errors nothing is reported, as by any other caller."""
    layer = kind(4, FULL)
    resize_to_checkpoint(layer, kind(4, REDUCED).state_dict(), "")
    assert layer.d_state == REDUCED
