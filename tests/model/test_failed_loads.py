"""Loading through the hooks, when it can't work: what is wrong is said, and the model stays."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_compressm import load_compressed
from lightning_compressm.errors import CheckpointError
from lightning_compressm.model.resizing import install_resize_hooks
from lightning_compressm.nn import LRU, S5
from lightning_compressm.nn._mamba import MambaBlock
from tests.families.layers import PortedLRU
from tests.features import needs_crc32_options


def _net(first: int = 10, second: int = 10) -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3), LRU(3, first), PortedLRU(3, 3, second))


def _hooked(*sizes: int) -> nn.Sequential:
    model = _net(*sizes)
    install_resize_hooks(model)
    return model


def picture(model: nn.Module) -> dict[str, tuple[int, Tensor]]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: (id(t), t.detach().clone()) for name, t in tensors.items()}


def assert_untouched(model: nn.Module, before: dict[str, tuple[int, Tensor]]) -> None:
    """The same objects with the same bits, and sizes that agree with them."""
    now = picture(model)
    assert now.keys() == before.keys()
    for name, (identity, value) in before.items():
        assert now[name][0] == identity, name
        torch.testing.assert_close(now[name][1], value, rtol=0, atol=0, equal_nan=True)
    for layer in model.modules():
        if isinstance(layer, LRU):
            assert layer.d_state == len(layer.nu_log)
        if isinstance(layer, PortedLRU):
            assert layer.state_features == len(layer.nu_log)


MISFITS: dict[str, tuple[Any, str]] = {
    "shape elsewhere": ({"0.weight": torch.ones(5, 5)}, "size mismatch for 0.weight"),
    "shape inside": ({"1.C_re": torch.ones(3, 9)}, "size mismatch for 1"),
    "without states": ({"1.D": torch.ones(7)}, "size mismatch for 1.D"),
    "second layer": ({"2.C": torch.ones(3, 2).cfloat()}, "size mismatch for 2"),
    "not a tensor": ({"0.bias": "text"}, "0.bias"),
    "complex": ({"1.B_re": torch.full((4, 3), 1j)}, "expected a real tensor"),
    "number as a name": ({3: torch.ones(1)}, "got 3"),
}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(("change", "message"), MISFITS.values(), ids=MISFITS)
def test_hooks_leave_a_model_that_does_not_fit_as_it_was(
    change: dict[Any, Any], message: str, assign: bool
):
    model = _hooked()
    before = picture(model)
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict({**_net(4, 5).state_dict(), **change}, assign=assign)
    assert_untouched(model, before)
    source = _net(4, 5)
    model.load_state_dict(source.state_dict(), assign=assign)
    assert torch.equal(model[2].B, source[2].B)


def test_layers_of_ours_alone_are_not_resized_for_nothing():
    """Without the model's hook only the layer itself is looked at."""
    layer = LRU(3, 10)
    with pytest.raises(RuntimeError, match="size mismatch for D"):
        layer.load_state_dict({**LRU(3, 4).state_dict(), "D": torch.ones(7)})
    assert layer.d_state == 10
    with pytest.raises(RuntimeError, match=r"'B_re': expected a real tensor, got torch.complex64"):
        layer.load_state_dict(
            {**LRU(3, 10).state_dict(), "B_re": torch.full((10, 3), 1j, dtype=torch.complex64)}
        )


def test_loading_parts_goes_on_to_resize():
    """What is missing is no error without `strict`."""
    model, source = _hooked(), _net(4, 5)
    state = {k: v for k, v in source.state_dict().items() if not k.startswith(("0", "1.D"))}
    missing, _ = model.load_state_dict(state, strict=False)
    assert sorted(missing) == ["0.bias", "0.weight", "1.D"]
    assert (model[1].d_state, model[2].state_features) == (4, 5)
    assert torch.equal(model[2].B, source[2].B)


def test_a_lazy_layer_beside_takes_any_shape():
    for road in (load_compressed, lambda m, state: m.load_state_dict(state)):
        model = nn.Sequential(nn.LazyLinear(3), LRU(3, 10), PortedLRU(3, 3, 10))
        install_resize_hooks(model)
        source = _net(4, 5)
        road(model, source.state_dict())
        assert torch.equal(model[0].weight, source[0].weight)
        assert model[1].d_state == 4


def test_extra_state_comes_back_too():
    class Extra(nn.Module):
        extra: Any = "old"

        def get_extra_state(self) -> Any:
            return self.extra

        def set_extra_state(self, state: Any) -> None:
            self.extra = state

    model, source = (nn.ModuleList([Extra(), *_net(n, n)]) for n in (10, 4))
    install_resize_hooks(model)
    source[0].extra = "new"
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict({**source.state_dict(), "1.bias": torch.ones(9)})
    assert model[0].extra == "old"
    model.load_state_dict(source.state_dict())
    assert model[0].extra == "new"


OTHERS: dict[str, tuple[nn.Module, nn.Module]] = {
    "S5 for LRU": (LRU(3, 10), S5(3, 4)),
    "LRU for S5": (S5(3, 10), LRU(3, 4)),
    "port for ours": (LRU(3, 10), PortedLRU(3, 3, 4)),
    "Mamba for LRU": (LRU(3, 10), MambaBlock(3, 4)),
    "LRU for Mamba": (MambaBlock(3, 10), LRU(3, 4)),
    "another width": (LRU(3, 10), LRU(5, 4)),
    "another width of Mamba": (MambaBlock(3, 10), MambaBlock(5, 4)),
    "no layer": (LRU(3, 10), nn.Linear(3, 3)),
    "another name": (LRU(3, 10), nn.ModuleDict({"inner": LRU(3, 4)})),
}


@pytest.mark.parametrize(("mine", "theirs"), OTHERS.values(), ids=OTHERS)
def test_a_checkpoint_of_another_layer_is_refused(mine: nn.Module, theirs: nn.Module):
    model = nn.ModuleDict({"layer": mine, "head": nn.Linear(3, 3)})
    before = picture(model)
    state = nn.ModuleDict({"layer": theirs, "head": nn.Linear(3, 3)}).state_dict()
    with pytest.raises(CheckpointError, match=r"(Missing key|size mismatch).*layer\."):
        load_compressed(model, state)
    assert_untouched(model, before)
    install_resize_hooks(model)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match=r"(Missing key|size mismatch).*layer\."):
        model.load_state_dict(state)
    assert {name: p.shape for name, p in model.named_parameters()} == shapes


_NAMES = sorted(_net().state_dict())
_SHAPES = st.lists(st.integers(0, 5), max_size=3)
_DTYPES = [torch.float32, torch.float64, torch.float16, torch.int64, torch.bool, torch.complex64]
_TENSORS = st.builds(
    lambda shape, fill, dtype: torch.full(shape, fill).to(dtype),
    _SHAPES,
    st.sampled_from([0.0, 1.0, 3.0, float("nan"), float("inf")]),
    st.sampled_from(_DTYPES),
)
_RESHAPED = st.sampled_from(
    [
        lambda t: t.to(torch.complex64) * 1j,
        lambda t: t.to(torch.int32),
        lambda t: t.double(),
        lambda t: t[..., :-1],
        lambda t: t.unsqueeze(0),
        lambda t: torch.full_like(t, float("nan")),
        lambda t: t.tolist(),
    ]
)
_THINGS = st.one_of(_TENSORS, st.none(), st.integers(), st.text(max_size=3), st.just({}))


@example(  # all others were assigned before torch found out
    sizes=(1, 1), drop=set(), reshape={"0.bias": torch.Tensor.int}, extra={}, empty=False,
    road="assign",
)  # fmt: skip
@given(
    sizes=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    drop=st.sets(st.sampled_from(_NAMES), max_size=2),
    reshape=st.dictionaries(st.sampled_from(_NAMES), _RESHAPED, max_size=2),
    extra=st.dictionaries(
        st.one_of(st.text(max_size=6), st.sampled_from(_NAMES), st.integers()), _THINGS, max_size=2
    ),
    empty=st.booleans(),
    road=st.sampled_from(["load_compressed", "hooks", "assign"]),
)
def test_any_state_dict_loads_exactly_or_leaves_the_model(
    sizes: tuple[int, int],
    drop: set[str],
    reshape: dict[str, Any],
    extra: dict[Any, Any],
    empty: bool,
    road: str,
):
    torch.manual_seed(0)
    model = _hooked(4, 4) if road != "load_compressed" else _net(4, 4)
    saved = {} if empty else _net(*sizes).state_dict()
    state: dict[Any, Any] = {n: reshape.get(n, lambda t: t)(t) for n, t in saved.items()}
    state = {name: t for name, t in {**state, **extra}.items() if name not in drop}
    before = picture(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own about casts, which are errors of ours
        try:
            if road == "load_compressed":
                load_compressed(model, state)
            else:
                model.load_state_dict(state, assign=road == "assign")
        except CheckpointError:
            assert_untouched(model, before)
            return
        except RuntimeError as error:
            assert road != "load_compressed"
            # Torch's strictness about names comes after it has copied; hooks can't know of it.
            if "key(s) in state_dict" not in str(error):
                assert_untouched(model, before)
            return
    assert not drop
    assert state.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        wanted = state[name].to(value.dtype)
        lossy = wanted.is_complex() < state[name].is_complex() and bool(state[name].imag.any())
        assert not lossy or (road != "load_compressed" and name.startswith("0."))
        torch.testing.assert_close(value, wanted, rtol=0, atol=0, equal_nan=True)


@needs_crc32_options
@pytest.mark.parametrize("sums", [True, False])
def test_files_without_check_sums_are_read(sums: bool, tmp_path: Path):
    source, before = _net(4, 5), torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(sums)
    try:
        torch.save(source.state_dict(), tmp_path / "model.pt")
    finally:
        torch.serialization.set_crc32_options(before)
    model = load_compressed(_net(), tmp_path / "model.pt")
    assert torch.equal(model[2].B, source[2].B)
    torch.save(source.state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(load_compressed(_net(), tmp_path / "old.pt")[2].B, source[2].B)


def test_one_wrong_bit_in_the_weights_is_noticed(tmp_path: Path):
    source, path = _net(4, 5), tmp_path / "model.pt"
    torch.save(source.state_dict(), path)
    content = bytearray(path.read_bytes())
    content[content.find(source[0].weight.detach().numpy().tobytes())] ^= 1
    path.write_bytes(content)
    model = _net()
    before = picture(model)
    with pytest.raises(CheckpointError, match="damaged: wrong check sum of"):
        load_compressed(model, path)
    assert_untouched(model, before)
