"""mamba-ssm's own Mamba, Mamba2 and language model: cut, train, step, generate, load."""

from __future__ import annotations

import importlib
import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compressm import compress, find_ssm_layers, load_compressed
from lightning_compressm.compat import enable_mamba_ssm_cpu
from lightning_compressm.errors import UnsupportedLayerError
from lightning_compressm.model.layers import select_layers
from lightning_compressm.model.padding import pad_state_dim
from tests.families.selective import drop_others, relative, scanned, seen, stop_reading

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("mamba_ssm") is None,
    reason="mamba-ssm is not installed; `make install` builds it without CUDA",
)
WIDTH, STATES = 16, 8
LAYERS: list[tuple[str, dict[str, Any]]] = [
    ("Mamba", {}),
    ("Mamba", {"use_fast_path": False, "bias": True, "dt_rank": 3}),
    ("Mamba2", {}),
    ("Mamba2", {"ngroups": 2, "use_mem_eff_path": False}),
    ("Mamba2", {"ngroups": 2, "D_has_hdim": True, "dt_limit": (0.01, 0.5), "bias": True}),
    ("Mamba2", {"ngroups": 2, "rmsnorm": False}),
    ("Mamba2", {"rmsnorm": False, "use_mem_eff_path": False, "conv_bias": False}),
    ("Mamba2", {"d_ssm": 16, "ngroups": 2}),
    ("Mamba2", {"d_ssm": 16, "rmsnorm": False, "use_mem_eff_path": False}),
]
each_layer = pytest.mark.parametrize(
    ("kind", "options"), LAYERS, ids=[f"{kind}-{options}" for kind, options in LAYERS]
)


@pytest.fixture(scope="module")
def mamba() -> SimpleNamespace:
    enable_mamba_ssm_cpu()
    package = importlib.import_module("mamba_ssm")
    return SimpleNamespace(
        Mamba=package.Mamba,
        Mamba2=package.Mamba2,
        LM=package.MambaLMHeadModel,
        Config=importlib.import_module("mamba_ssm.models.config_mamba").MambaConfig,
        Params=importlib.import_module("mamba_ssm.utils.generation").InferenceParams,
        Mamba3=importlib.import_module("mamba_ssm.modules.mamba3").Mamba3,
    )


@torch.no_grad()
def stir(model: nn.Module) -> Any:
    """Off the initial values, and with states that matter."""
    for name, value in model.named_parameters():
        if name.endswith(("x_proj.weight", "in_proj.weight", "conv1d.weight", "conv1d.bias")):
            value += 0.4 * torch.randn_like(value)
        elif name.endswith(("dt_proj.bias", "dt_bias")):
            value.uniform_(-2, 0)
        elif name.endswith(("A_log", "D", "norm.weight")):
            value += 0.2 * torch.randn_like(value)
    return model


def build(mamba: SimpleNamespace, kind: str, options: dict[str, Any]) -> Any:
    head = {"headdim": 4} if kind == "Mamba2" else {}
    return getattr(mamba, kind)(WIDTH, d_state=STATES, layer_idx=0, **head, **options)


def cut(layer: nn.Module, x: Tensor, state_dim: int = 3, **options: Any) -> None:
    options = {"refit": False, "max_output_error": None, **options}
    compress(layer, state_dim=state_dim, sample=x, **options)


def stepped(layer: Any, x: Tensor) -> Tensor:
    conv, ssm = layer.allocate_inference_cache(len(x), x.shape[1])
    assert ssm.shape[-1] == layer.d_state
    outputs = []
    for step in x.split(1, 1):
        y, conv, ssm = layer.step(step, conv, ssm)
        outputs.append(y)
    return torch.cat(outputs, 1)


@each_layer
def test_the_signals_are_what_the_layer_computes(
    mamba: SimpleNamespace, kind: str, options: dict[str, Any]
):
    if kind == "Mamba2":
        # The unfused path calls the parts, so that they can be listened to.
        options = {**options, "use_mem_eff_path": False, "rmsnorm": True}
    layer, x = stir(build(mamba, kind, options)), torch.randn(2, 20, WIDTH)
    family = find_ssm_layers(layer)[""].family
    with torch.no_grad():
        signals = family.signals(layer, x)
    calls, y = seen(layer, layer, x), scanned(signals, layer.D)
    columns = layer.out_proj.weight[:, -y.shape[-1] :].norm(dim=0)
    if "norm" in calls:
        inner, gate = calls["norm"]
        weight = torch.nn.functional.silu(gate) * columns * layer.norm.weight
        assert relative(signals.weight.flatten(2), weight) < 1e-5
    else:
        inner, y = calls["out_proj"][0], y * (signals.weight.flatten(2) / columns).double()
    assert relative(y, inner.double()) < 1e-5


@each_layer
def test_a_cut_layer_is_one_built_with_fewer_states(
    mamba: SimpleNamespace, kind: str, options: dict[str, Any]
):
    layer, x = stir(build(mamba, kind, options)), torch.randn(2, 20, WIDTH)
    whole = layer(x)
    cut(layer, x)
    head = {"headdim": 4} if kind == "Mamba2" else {}
    small = getattr(mamba, kind)(WIDTH, d_state=3, layer_idx=0, **head, **options)
    for path, module in small.named_modules():
        mine = layer.get_submodule(path)
        numbers = {k: v for k, v in vars(module).items() if isinstance(v, int)}
        assert {k: v for k, v in vars(mine).items() if isinstance(v, int)} == numbers
    small.load_state_dict(layer.state_dict())
    assert torch.equal(small(x), layer(x))
    assert relative(layer(x), whole) > 1e-3
    # The step of mamba-ssm itself knows neither D for each channel nor limits of dt.
    if not options.keys() & {"D_has_hdim", "dt_limit"}:
        assert relative(stepped(layer, x), layer(x)) < 1e-5
    layer(x).square().sum().backward()
    for name, value in layer.named_parameters():
        assert value.grad is not None, name
        assert bool(value.grad.any()), name
    fresh = load_compressed(build(mamba, kind, options), layer.state_dict())
    assert fresh.d_state == 3
    assert torch.equal(fresh(x), layer(x))


@each_layer
def test_dropping_states_that_are_not_read(
    mamba: SimpleNamespace, kind: str, options: dict[str, Any]
):
    layer, x = stir(build(mamba, kind, options)), torch.randn(2, 20, WIDTH)
    whole, keep = layer(x), stop_reading(layer, kept=5)
    before = layer(x)
    assert relative(before, whole) > 1e-3
    drop_others(layer, keep)
    # Not to the bit: sums over fewer states are added up in another order.
    assert relative(layer(x), before) < 1e-6
    pad_state_dim(layer, STATES)
    assert relative(layer(x), before) < 1e-6


@pytest.mark.parametrize(("kind", "options"), [LAYERS[0], LAYERS[4]], ids=["Mamba", "Mamba2"])
def test_the_refit_makes_up_for_lost_states(
    mamba: SimpleNamespace, kind: str, options: dict[str, Any]
):
    layer, x = stir(build(mamba, kind, options)), torch.randn(2, 20, WIDTH)
    whole, errors = layer(x), []
    for refit in (False, True):
        reduced = load_compressed(build(mamba, kind, options), layer.state_dict())
        cut(reduced, x, 4, refit=refit)
        errors.append(relative(reduced(x), whole))
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("layer", ["Mamba1", "Mamba2"])
@pytest.mark.parametrize("even", [True, False])
def test_a_language_model(mamba: SimpleNamespace, layer: str, even: bool):
    sizes = {"d_state": STATES} if layer == "Mamba1" else {"d_state": STATES, "headdim": 4}
    config = mamba.Config(
        d_model=WIDTH, n_layer=2, vocab_size=50, ssm_cfg={"layer": layer, **sizes}
    )
    model, tokens = stir(mamba.LM(config).eval()), torch.randint(1, 50, (2, 6))
    cut(model, tokens, layers=None if even else ["backbone.layers.0.mixer"])
    dims = [layer.state_dim for layer in find_ssm_layers(model).values()]
    assert dims == ([3, 3] if even else [3, STATES])
    generated = model.generate(tokens, max_length=12, top_k=1)
    for k in range(6, 12):
        with torch.no_grad():
            assert torch.equal(model(generated[:, :k]).logits[:, -1].argmax(-1), generated[:, k])
    fresh = load_compressed(mamba.LM(config).eval(), model.state_dict())
    assert torch.equal(fresh(tokens).logits, model(tokens).logits)
    assert torch.equal(fresh.generate(tokens, max_length=12, top_k=1), generated)


def test_mamba2_over_several_processes_is_refused(mamba: SimpleNamespace):
    layer = build(mamba, "Mamba2", {})
    layer.process_group = object()
    before = dict(layer.named_parameters())
    with pytest.raises(UnsupportedLayerError, match=r"Mamba2 is split over processes.*`ignore`"):
        cut(layer, torch.randn(1, 9, WIDTH))
    assert all(before[name] is value for name, value in layer.named_parameters())


def test_mamba3_is_refused(mamba: SimpleNamespace):
    model = nn.ModuleDict(
        {"three": mamba.Mamba3(WIDTH, d_state=16, headdim=16), "one": build(mamba, "Mamba", {})}
    )
    with pytest.raises(UnsupportedLayerError, match=r"three can't be reduced: Mamba3 rotates"):
        select_layers(model)
    assert list(select_layers(model, ignore=["three"])) == ["one"]
