"""Finding SSM layers, choosing among them, and watching the lengths they process."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_compressm import find_ssm_layers
from lightning_compressm.errors import UnsupportedLayerError
from lightning_compressm.families.lru import LRUFamily
from lightning_compressm.model.layers import select_layers
from lightning_compressm.nn import LRU
from lightning_compressm.reduction.recorder import CallRecorder
from tests.families.layers import PortedLRU


def _model() -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "encoder": nn.Sequential(nn.Linear(2, 2), LRU(2, 8)),
            "blocks": nn.ModuleList([LRU(2, 4), nn.GELU(), PortedLRU(2, 2, 6)]),
        }
    )


def test_layers_are_found_in_order_with_what_they_are():
    model = _model()
    found = find_ssm_layers(model)
    assert list(found) == ["encoder.1", "blocks.0", "blocks.2"]
    assert [layer.state_dim for layer in found.values()] == [8, 4, 6]
    layer = found["blocks.2"]
    assert layer.module is model["blocks"][2]
    assert layer.name == layer.path == "blocks.2"
    assert isinstance(layer.family, LRUFamily)


def test_a_model_can_be_a_layer_or_have_none():
    assert list(find_ssm_layers(LRU(2, 4))) == [""]
    assert find_ssm_layers(nn.Linear(2, 2)) == {}


def test_the_state_dim_is_read_off_the_tensors():
    layer = find_ssm_layers(LRU(2, 8))[""]
    layer.module.load_state_dict(LRU(2, 3).state_dict())
    assert layer.state_dim == 3


def test_a_module_with_two_names_appears_once():
    layer = LRU(2, 4)
    assert list(find_ssm_layers(nn.ModuleDict({"a": layer, "b": layer}))) == ["a"]


def test_compiled_layers_keep_their_names():
    model = _model()
    model["blocks"][0] = torch.compile(model["blocks"][0])
    found = find_ssm_layers(torch.compile(model))
    assert list(found) == ["encoder.1", "blocks.0", "blocks.2"]
    assert found["blocks.0"].path == "_orig_mod.blocks.0._orig_mod"
    assert type(found["blocks.0"].module) is LRU


@pytest.mark.parametrize(
    ("layers", "ignore", "expected"),
    [
        (None, None, ["encoder.1", "blocks.0", "blocks.2"]),
        (["blocks.*"], None, ["blocks.0", "blocks.2"]),
        (["blocks.[01]", "encoder.?"], None, ["encoder.1", "blocks.0"]),
        (None, ["*0"], ["encoder.1", "blocks.2"]),
        (["blocks.*"], ["*2"], ["blocks.0"]),
        (("encoder.1",), (), ["encoder.1"]),
    ],
)
def test_patterns(layers: list[str] | None, ignore: list[str] | None, expected: list[str]):
    assert list(select_layers(_model(), layers, ignore)) == expected


@pytest.mark.parametrize("pattern", ["blocks", "BLOCKS.*", "blocks.1", "", "*.3"])
def test_a_pattern_that_matches_nothing_is_refused(pattern: str):
    for kwargs in ({"layers": [pattern]}, {"ignore": [pattern]}):
        with pytest.raises(ValueError, match=r"matches no SSM layer; .* 'encoder\.1'"):
            select_layers(_model(), **kwargs)


@pytest.mark.parametrize("kwargs", [{"ignore": ["*"]}, {"layers": []}])
def test_choosing_nothing_is_refused(kwargs: dict[str, list[str]]):
    with pytest.raises(UnsupportedLayerError, match="leave none"):
        select_layers(_model(), **kwargs)


def test_shared_tensors_are_reduced_with_all_their_layers_or_not_at_all():
    model = _model()
    model["blocks"].append(LRU(2, 8))
    model["blocks"][3].nu_log = model["encoder"][1].nu_log
    with pytest.raises(UnsupportedLayerError, match=r"'blocks.3' and 'encoder.1' share some"):
        select_layers(model)
    with pytest.raises(
        UnsupportedLayerError, match=r"'encoder.1' .* 'blocks.3', which is left out"
    ):
        select_layers(model, ignore=["blocks.3"])
    assert (
        not {"blocks.3", "encoder.1"}
        & select_layers(model, ignore=["blocks.3", "encoder.1"]).keys()
    )


# -- lengths -------------------------------------------------------------------------------------


class Twice(nn.Module):
    """Calls its layer by keyword, on a sequence and on half of it."""

    def __init__(self) -> None:
        super().__init__()
        self.lru = LRU(2, 4)
        self.unused = LRU(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.lru(inputs=x).mean() + self.lru(x[:, ::2]).mean()


def test_the_longest_sequence_counts():
    model = Twice()
    with CallRecorder(find_ssm_layers(model)) as recorder:
        for length in (10, 30, 20):
            model(torch.zeros(2, length, 2))
    assert recorder.lengths == {"lru": 30}
    model(torch.zeros(2, 99, 2))
    assert recorder.lengths == {"lru": 30}
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_closing_twice_is_harmless():
    recorder = CallRecorder(find_ssm_layers(Twice()))
    recorder.close()
    recorder.close()
    assert recorder.lengths == {}


def test_hooks_go_even_if_the_model_fails():
    model = Twice()
    with pytest.raises(ValueError, match="d_model"), CallRecorder(find_ssm_layers(model)):
        model(torch.zeros(2, 10, 5))
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_length_dim_is_the_familys(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(LRUFamily, "length_dim", 0)
    layer = LRU(2, 4)
    with CallRecorder(find_ssm_layers(layer)) as recorder:
        layer(torch.zeros(3, 10, 2))
    assert recorder.lengths == {"": 3}


# -- known layers that can't be reduced ----------------------------------------------------------


def _mamba3() -> nn.Module:
    """A class of the qualified name that is looked for."""
    body = {"__module__": "mamba_ssm.modules.mamba3", "__qualname__": "Mamba3"}
    return type("Mamba3", (nn.Linear,), body)(2, 2)


@pytest.mark.parametrize("patterns", [{}, {"layers": ["b*"]}, {"ignore": ["lru"]}])
def test_a_layer_that_is_known_but_not_supported_is_refused(patterns: dict[str, list[str]]):
    model = nn.ModuleDict({"lru": LRU(2, 4), "block": nn.Sequential(_mamba3())})
    with pytest.raises(UnsupportedLayerError, match=r"block\.0 .* Mamba3 rotates .* `ignore`"):
        select_layers(model, **patterns)


@pytest.mark.parametrize("patterns", [{"layers": ["lru"]}, {"ignore": ["block.*"]}])
def test_it_can_be_left_out(patterns: dict[str, list[str]]):
    model = nn.ModuleDict({"lru": LRU(2, 4), "block": nn.Sequential(_mamba3())})
    assert list(select_layers(model, **patterns)) == ["lru"]
    assert list(find_ssm_layers(model)) == ["lru"]


def test_sequence_layers_without_states_are_named_where_nothing_else_is_found():
    short = type("TinyShortConv", (nn.Conv1d,), {})(2, 2, 3)
    model = nn.Sequential(nn.Linear(2, 2), nn.MultiheadAttention(2, 1), short)
    with pytest.raises(UnsupportedLayerError) as caught:
        select_layers(model)
    said = str(caught.value)
    assert "MultiheadAttention is attention, which keeps all keys" in said
    assert "TinyShortConv is a short convolution, which has no state. Looked at: " in said
    assert " Linear is" not in said


def test_a_subclass_is_refused_and_leaving_out_all_is_an_error():
    own = type("Own", (type(_mamba3()),), {})(2, 2)
    with pytest.raises(UnsupportedLayerError, match="the model can't be reduced: Own rotates"):
        select_layers(own)
    with pytest.raises(UnsupportedLayerError, match="leave none of the SSM layers '0'"):
        select_layers(nn.Sequential(own), ignore=["0"])


def test_a_users_own_family_makes_it_supported(monkeypatch: pytest.MonkeyPatch):
    layer = _mamba3()
    monkeypatch.setattr(LRUFamily, "matches", lambda self, module: module is layer)
    monkeypatch.setattr(LRUFamily, "state_axes", lambda self, module: {"weight": 0})
    assert list(select_layers(nn.Sequential(layer))) == ["0"]
