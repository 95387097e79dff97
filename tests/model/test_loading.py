"""Checkpoints of another state dimension: into any model, by any road, or not at all."""

from __future__ import annotations

import io
import os
import pickle
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_compressm import compress, load_compressed
from lightning_compressm.errors import CheckpointError, SurgeryError, UnsupportedOptimizerError
from lightning_compressm.model.resizing import install_resize_hooks
from lightning_compressm.nn import LRU
from tests.families.layers import PortedLRU


def _net(d_state: int = 10, second: int | None = None) -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3), LRU(3, d_state), LRU(3, second or d_state))


def _port(d_state: int = 10) -> nn.Sequential:
    """Layers without hooks of their own."""
    return nn.Sequential(nn.Linear(2, 3), PortedLRU(3, 3, d_state))


def _same_outputs(a: nn.Module, b: nn.Module) -> bool:
    x = torch.randn(2, 8, 2)
    with torch.no_grad():
        return torch.equal(a(x), b(x))


def _picture(model: nn.Module) -> dict[str, Any]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "ids": {name: id(t) for name, t in tensors.items()},
        "values": {name: t.detach().clone() for name, t in tensors.items()},
        "dims": [getattr(m, "d_state", None) for m in model.modules()],
    }


def _assert_untouched(model: nn.Module, before: dict[str, Any]) -> None:
    now = _picture(model)
    assert now["ids"] == before["ids"]
    assert now["dims"] == before["dims"]
    for name, value in before["values"].items():
        torch.testing.assert_close(now["values"][name], value, rtol=0, atol=0, equal_nan=True)


# -- load_state_dict -----------------------------------------------------------------------------


@pytest.mark.parametrize(("old", "new"), [(10, 4), (4, 10), (7, 7), (1, 12), (12, 1)])
@pytest.mark.parametrize("assign", [False, True])
def test_our_layers_take_the_checkpoints_size(old: int, new: int, assign: bool):
    source, model = _net(new, new + 1), _net(old, old)
    parameter = model[0].weight
    model.load_state_dict(source.state_dict(), assign=assign)
    assert [model[1].d_state, model[2].d_state] == [new, new + 1]
    assert _same_outputs(model, source)
    assert all(p.is_leaf and p.requires_grad for p in model.parameters())
    assert (model[0].weight is parameter) != assign
    model(torch.randn(1, 5, 2)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_equal_sizes_keep_the_parameter_objects():
    """An optimizer built before loading goes on to train the model."""
    model = _net()
    before = [id(p) for p in model.parameters()]
    model.load_state_dict(_net().state_dict())
    assert [id(p) for p in model.parameters()] == before


@pytest.mark.parametrize(("old", "new"), [(10, 4), (4, 10)])
def test_other_layers_need_the_hooks(old: int, new: int):
    source, model = _port(new), _port(old)
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(source.state_dict())
    install_resize_hooks(model)
    install_resize_hooks(model)
    assert len(model[1]._load_state_dict_pre_hooks) == 1
    model.load_state_dict(source.state_dict())
    assert model[1].state_features == new
    assert _same_outputs(model, source)


def test_the_models_hook_reaches_layers_that_are_built_later():
    model = nn.Sequential(nn.Linear(2, 3))
    install_resize_hooks(model)
    model.append(PortedLRU(3, 3, 10))
    source = _port(4)
    model.load_state_dict(source.state_dict())
    assert _same_outputs(model, source)


def test_a_hooked_model_inside_another_loads_with_its_prefix():
    inner = _port(10)
    install_resize_hooks(inner)
    outer, source = nn.ModuleDict({"net": inner}), nn.ModuleDict({"net": _port(4)})
    outer.load_state_dict(source.state_dict())
    assert _same_outputs(outer["net"], source["net"])


def test_a_model_on_the_meta_device_is_filled():
    source = _net(4)
    with torch.device("meta"):
        model = _net(10)
    model.load_state_dict(source.state_dict(), assign=True)
    assert _same_outputs(model, source)
    assert not any(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("copy", [deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("make", [_net, _port])
def test_hooks_survive_copies(make: Any, copy: Any):
    model = make(10)
    install_resize_hooks(model)
    twin, source = copy(model), make(4)
    twin.load_state_dict(source.state_dict())
    assert _same_outputs(twin, source)
    assert {p.shape for p in model.parameters()} == {p.shape for p in make(10).parameters()}


def test_dtype_frozenness_and_marks_survive_loading():
    model = _net(10).double()
    model[1].C_re.requires_grad_(False)
    model[1].C_re.mark = 1
    model.load_state_dict(_net(4).state_dict())
    assert model[1].C_re.dtype == torch.float64
    assert not model[1].C_re.requires_grad
    assert model[1].C_re.mark == 1


def test_torchs_own_errors_say_what_does_not_fit():
    """No half-resized layer: what does not belong together is left for strict loading to name."""
    state = _net(4).state_dict()
    state["1.C_re"] = torch.zeros(3, 5)
    model = _net(10)
    with pytest.raises(RuntimeError, match=r"size mismatch for 1\.(nu_log|B_re)"):
        model.load_state_dict(state)
    assert model[1].d_state == 10
    del state["1.C_re"]
    with pytest.raises(RuntimeError, match=r"Missing key\(s\).*1\.C_re"):
        model.load_state_dict(state)
    assert model[1].d_state == 10


def test_parametrized_layers_stay_loadable():
    model = nn.Sequential(nn.Linear(2, 3), LRU(3, 10))
    nn.utils.parametrize.register_parametrization(model[1], "C_re", nn.Identity())
    install_resize_hooks(model)
    model.load_state_dict(deepcopy(model.state_dict()))


# -- ties ----------------------------------------------------------------------------------------


def _tie(a: nn.Module, b: nn.Module) -> None:
    for name in a._parameters:
        setattr(b, name, getattr(a, name))


@pytest.mark.parametrize("road", ["load_compressed", "hooks"])
def test_layers_that_share_all_tensors_go_on_sharing(road: str):
    source, model = _net(4), _net(10)
    for one in (source, model):
        _tie(one[1], one[2])
    if road == "load_compressed":
        load_compressed(model, source.state_dict())
    else:
        install_resize_hooks(model)
        model.load_state_dict(source.state_dict())
    assert model[1].d_state == model[2].d_state == 4
    for name in model[1]._parameters:
        assert getattr(model[1], name) is getattr(model[2], name), name
    assert _same_outputs(model, source)


def test_a_tensor_shared_with_another_module_stays_shared():
    def make(d_state: int) -> nn.ModuleDict:
        model = nn.ModuleDict({"lru": LRU(3, d_state), "head": nn.Linear(d_state, 3)})
        model["head"].weight = model["lru"].C_re
        return model

    source, model = make(4), make(10)
    load_compressed(model, source.state_dict())
    assert model["head"].weight is model["lru"].C_re
    assert torch.equal(model["lru"].C_re, source["lru"].C_re)


def test_sharing_layers_can_not_take_two_sizes():
    model = _net(10)
    _tie(model[1], model[2])
    before = _picture(model)
    with pytest.raises(CheckpointError, match="shares its tensor"):
        load_compressed(model, _net(4, 5).state_dict())
    _assert_untouched(model, before)
    install_resize_hooks(model)
    with pytest.raises(SurgeryError, match="shares its tensor"):
        model.load_state_dict(_net(4, 5).state_dict())


# -- load_compressed -----------------------------------------------------------------------------


@pytest.mark.parametrize("make", [_net, _port])
@pytest.mark.parametrize(("old", "new"), [(10, 4), (4, 10)])
def test_load_compressed_resizes_and_returns_the_model(make: Any, old: int, new: int):
    source, model = make(new), make(old)
    assert load_compressed(model, source.state_dict()) is model
    assert _same_outputs(model, source)


@pytest.mark.parametrize("meta", [False, True])
def test_live_optimizers_train_what_was_loaded(meta: bool):
    source = _net(4)
    saved_optimizer = torch.optim.AdamW(source.parameters(), lr=0.1)
    source(torch.randn(2, 8, 2)).sum().backward()
    saved_optimizer.step()
    saved = deepcopy((source.state_dict(), saved_optimizer.state_dict()))
    with torch.device("meta" if meta else "cpu"):
        model = _net(10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    if not meta:
        model(torch.randn(2, 8, 2)).sum().backward()
        optimizer.step()
    load_compressed(model, saved[0], optimizers=optimizer)
    optimizer.load_state_dict(saved[1])
    x = torch.randn(2, 8, 2)
    for net, opt in ((source, saved_optimizer), (model, optimizer)):
        opt.zero_grad()
        net(x).square().sum().backward()
        opt.step()
    for name, value in source.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_a_failed_load_leaves_optimizers_alone():
    model = _net(10)
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(CheckpointError):
        load_compressed(
            model, {**_net(4).state_dict(), "more": torch.ones(1)}, optimizers=optimizer
        )
    with pytest.raises(UnsupportedOptimizerError, match=r"expected torch\.optim\.Optimizer"):
        load_compressed(model, _net(4).state_dict(), optimizers=["adam"])  # type: ignore[list-item]
    held = [id(p) for p in optimizer.param_groups[0]["params"]]
    assert held == [id(p) for p in model.parameters()]
    assert model[1].d_state == 10


def test_a_model_that_is_a_layer():
    layer = load_compressed(LRU(3, 10), LRU(3, 4).state_dict())
    assert layer.d_state == 4


@pytest.mark.parametrize("make", [_net, _port])
def test_a_model_without_storage_is_filled(make: Any):
    source = make(4)
    with torch.device("meta"):
        model = make(10)
    assert _same_outputs(load_compressed(model, source.state_dict()), source)
    with torch.device("meta"):
        model = make(10)
    with pytest.raises(CheckpointError):
        load_compressed(model, {**source.state_dict(), "more": torch.ones(1)})
    assert all(p.is_meta for p in model.parameters())
    assert model[1].B_re.shape[0] == 10 if make is _net else model[1].B.shape[0] == 10


def test_a_compressed_model_is_read_from_a_file(tmp_path: Path):
    source = _net(10)
    compress(source, state_dim=3)
    for name, content in (
        ("plain.pt", source.state_dict()),
        ("lightning.ckpt", {"state_dict": source.state_dict(), "epoch": 3}),
    ):
        torch.save(content, tmp_path / name)
        assert _same_outputs(load_compressed(_net(10), tmp_path / name), source)
        assert _same_outputs(load_compressed(_net(10), str(tmp_path / name)), source)
        assert _same_outputs(load_compressed(_net(10), content), source)


class _Module(pl.LightningModule):
    def __init__(self, d_state: int = 10) -> None:
        super().__init__()
        self.net = _net(d_state)


def test_a_lightning_modules_own_checkpoint(tmp_path: Path):
    source = _Module()
    compress(source, state_dim=3)
    trainer = pl.Trainer(accelerator="cpu", logger=False, barebones=True)
    trainer.strategy.connect(source)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    model = load_compressed(_Module(), tmp_path / "last.ckpt")
    assert _same_outputs(model.net, source.net)
    loaded = _Module.load_from_checkpoint(tmp_path / "last.ckpt")
    assert loaded.net[1].d_state == 3


def test_modules_with_extra_state():
    class Extra(nn.Module):
        extra: Any = 1

        def get_extra_state(self) -> Any:
            return self.extra

        def set_extra_state(self, state: Any) -> None:
            self.extra = state

    model, source = (nn.ModuleList([Extra(), LRU(3, n)]) for n in (10, 4))
    source[0].extra = {"epoch": 2}
    load_compressed(model, source.state_dict())
    assert model[0].extra == {"epoch": 2}
    with pytest.raises(CheckpointError):
        load_compressed(model, {**source.state_dict(), "more": torch.ones(1)})
    assert model[0].extra == {"epoch": 2}


def _without(key: str) -> Any:
    return lambda state: {k: v for k, v in state.items() if k != key}


WRONG = {
    "missing": (_without("1.C_re"), "Missing key"),
    "missing elsewhere": (_without("0.bias"), "Missing key"),
    "unexpected": (lambda s: {**s, "new": torch.ones(1)}, "Unexpected key"),
    "shape elsewhere": (lambda s: {**s, "0.weight": torch.ones(5, 5)}, "size mismatch"),
    "shape inside": (lambda s: {**s, "2.C_im": torch.ones(3, 5)}, "size mismatch"),
    "inputs": (lambda s: {**s, "1.B_re": torch.ones(4, 7)}, "size mismatch"),
    "rank": (lambda s: {**s, "1.nu_log": torch.ones(4, 1)}, "size mismatch"),
    "no states": (lambda s: {**s, "1.nu_log": torch.ones(0)}, "size mismatch"),
    "scalar": (lambda s: {**s, "1.nu_log": torch.tensor(1.0)}, "size mismatch"),
    "not a tensor": (lambda s: {**s, "1.nu_log": [1.0, 2.0]}, "1.nu_log"),
    "None": (lambda s: {**s, "1.nu_log": None}, "1.nu_log"),
    "empty": (lambda s: {}, "Missing key"),
    "another model": (lambda s: nn.Linear(2, 2).state_dict(), "Missing key"),
    "state_dict is text": (lambda s: {"state_dict": "text"}, "Unexpected key"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_what_does_not_fit_leaves_the_model_as_it_was(change: Any, message: str):
    model = _net(10)
    before = _picture(model)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_compressed(model, change(_net(4).state_dict()))
    assert "left as it was" in str(caught.value)
    _assert_untouched(model, before)


def test_parametrized_layers_are_left_as_they_were():
    model = _port(10)
    nn.utils.parametrize.register_parametrization(model[1], "D", nn.Identity())
    before = _picture(model)
    with pytest.raises(CheckpointError, match="Missing key"):
        load_compressed(model, _port(4).state_dict())
    _assert_untouched(model, before)


def _truncated(path: Path) -> None:
    torch.save(_net(4).state_dict(), path)
    path.write_bytes(path.read_bytes()[:-200])


def _with_code(path: Path) -> None:
    torch.save(_net(4), path)


CORRUPT = {
    "truncated": (_truncated, "can't read"),
    "empty": (lambda p: p.touch(), "can't read"),
    "text": (lambda p: p.write_text("hello"), "can't read"),
    "missing": (lambda p: None, "can't read"),
    "a folder": (lambda p: p.mkdir(), "can't read"),
    "a whole module": (_with_code, "weights_only=True"),
    "a list": (lambda p: torch.save([1, 2], p), "expected a state dict .* got list"),
    "a tensor": (lambda p: torch.save(torch.ones(2), p), "got Tensor"),
    "numbers as keys": (lambda p: torch.save({1: torch.ones(1)}, p), "mapping of names"),
    "nested numbers": (lambda p: torch.save({"state_dict": {1: 2}}, p), "mapping of names"),
}


@pytest.mark.parametrize(("write", "message"), CORRUPT.values(), ids=CORRUPT)
def test_corrupt_files(write: Any, message: str, tmp_path: Path):
    model, path = _net(10), tmp_path / "model.ckpt"
    before = _picture(model)
    write(path)
    with pytest.raises(CheckpointError, match=message):
        load_compressed(model, path)
    _assert_untouched(model, before)


@pytest.mark.parametrize("thing", [None, 3, ["a"], io.StringIO("x")])
def test_things_that_are_no_checkpoint(thing: Any):
    with pytest.raises(CheckpointError):
        load_compressed(_net(10), thing)


def test_a_number_is_no_file_to_close():
    reading, writing = os.pipe()
    with pytest.raises(CheckpointError, match="expected a path"):
        load_compressed(_net(10), reading)  # type: ignore[arg-type]
    os.close(writing)
    os.close(reading)


_FULL = {n: p.detach().clone() for n, p in _net(6).named_parameters()}
_TENSORS = st.builds(
    lambda shape, fill: torch.full(shape, fill),
    st.lists(st.integers(0, 5), max_size=3),
    st.sampled_from([0.0, 1.0, float("nan"), float("inf")]),
)
_THINGS = st.one_of(_TENSORS, st.none(), st.integers(), st.text(max_size=3), st.just({}))


@given(
    size=st.integers(1, 8),
    drop=st.sets(st.sampled_from(sorted(_FULL)), max_size=3),
    change=st.dictionaries(st.sampled_from(sorted(_FULL)), _THINGS, max_size=3),
    extra=st.dictionaries(st.text(max_size=6), _THINGS, max_size=2),
    wrap=st.booleans(),
)
def test_any_mapping_loads_whole_or_not_at_all(
    size: int, drop: set[str], change: dict[str, Any], extra: dict[str, Any], wrap: bool
):
    torch.manual_seed(0)
    model = _net(6)
    state: dict[str, Any] = {**_net(size).state_dict(), **change, **extra}
    state = {name: value for name, value in state.items() if name not in drop}
    before = _picture(model)
    try:
        load_compressed(model, {"state_dict": state} if wrap else state)
    except CheckpointError:
        _assert_untouched(model, before)
    else:
        for name, value in model.state_dict().items():
            assert isinstance(state[name], Tensor)
            torch.testing.assert_close(value, state[name], rtol=0, atol=0, equal_nan=True)
        assert not drop
