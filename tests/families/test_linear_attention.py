"""Linear attention of transformers: key channels are cut; tiny models, no downloads."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compressm import compress, find_ssm_layers, load_compressed, pad_state_dim
from lightning_compressm.compat import enable_minimax_key_channels
from lightning_compressm.errors import UnsupportedLayerError
from lightning_compressm.families import SelectiveFamily
from lightning_compressm.families.gated_delta_net import GatedDeltaNetFamily
from lightning_compressm.families.lightning_attention import LightningAttentionFamily
from lightning_compressm.model.change import change
from lightning_compressm.model.resizing import install_resize_hooks
from lightning_compressm.reduction.events import CompressionReport
from lightning_compressm.surgery.plan import take
from tests.families.hf_models import (
    LINEAR_ATTENTION,
    STATES,
    build,
    generated,
    logits,
    model_like,
    tokens,
)
from tests.families.selective import drop_others, relative, scanned, seen

transformers = pytest.importorskip("transformers")

CUT = STATES // 2
DELTA = [name for name, kind in LINEAR_ATTENTION.items() if kind.family == "Gated DeltaNet"]


def _known(name: str) -> Any:
    missing = not hasattr(transformers, LINEAR_ATTENTION[name].config)
    return pytest.param(name, marks=pytest.mark.skipif(missing, reason="transformers is older"))


each_kind = pytest.mark.parametrize("name", [_known(name) for name in LINEAR_ATTENTION])
each_delta = pytest.mark.parametrize("name", [_known(name) for name in DELTA])


@pytest.fixture(autouse=True, scope="module")
def _key_channels() -> None:
    enable_minimax_key_channels()


def _cut(model: Any, **options: Any) -> CompressionReport:
    options = {"refit": False, "max_output_error": None, "share_state_dim": True, **options}
    return compress(model, state_dim=CUT, sample={"input_ids": tokens()}, **options)


def cut(name: str, **options: Any) -> Any:
    model = model_like(name)
    _cut(model, **options)
    return model


def loaded(path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.AutoModelForCausalLM.from_pretrained(path).eval()


def sizes_of(model: nn.Module) -> dict[str, Any]:
    """Everything in a model that says how big something is, but for what is in its config."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, int) and not isinstance(value, bool):
                found[f"{path}.{key}"] = value
    return found | {name: parameter.shape for name, parameter in model.named_parameters()}


@each_kind
def test_every_layer_is_found_by_its_family(name: str):
    model = model_like(name)
    layers = find_ssm_layers(model)
    mixers = [
        path
        for path, module in model.named_modules()
        if type(module).__name__.endswith(("GatedDeltaNet", "LightningAttention"))
    ]
    assert list(layers) == mixers
    assert len(mixers) == 2
    assert {layer.family.name for layer in layers.values()} == {LINEAR_ATTENTION[name].family}
    assert {layer.state_dim for layer in layers.values()} == {STATES}


def _before_norm(module: nn.Module, model: nn.Module) -> tuple[Tensor, Tensor]:
    """The layer's input, and what the recurrence gave for it."""
    kept: list[Tensor] = []
    norm = next(part for key, part in module.named_children() if key in ("norm", "o_norm"))
    handle = norm.register_forward_pre_hook(lambda _, given: kept.append(given[0]))
    calls = seen(module, model, tokens(), use_cache=False)
    handle.remove()
    return calls[""][0], kept[0]


@each_kind
def test_the_signals_are_what_the_layer_computes(name: str):
    model = model_like(name)
    for layer in find_ssm_layers(model).values():
        assert isinstance(layer.family, SelectiveFamily)
        inputs, wanted = _before_norm(layer.module, model)
        with torch.no_grad():
            signals = layer.family.signals(layer.module, inputs)
        y = scanned(signals, torch.zeros(signals.x[0, 0].numel()))
        assert relative(y.flatten(), wanted.double().flatten()) < 1e-5


@each_delta
def test_weights_are_the_slope_of_the_output(name: str):
    """Norm, gate and projection behind the recurrence, with the norm's size held still."""
    model = model_like(name)
    module: Any = next(iter(find_ssm_layers(model).values())).module
    norm, projection = (
        (module.o_norm, module.o_proj) if name == "olmo_hybrid" else (module.norm, module.out_proj)
    )
    calls: list[tuple[Tensor, ...]] = []
    handle = norm.register_forward_hook(lambda _, given, out: calls.append((*given, out)))
    inputs = seen(module, model, tokens(), use_cache=False)[""][0]
    handle.remove()
    with torch.no_grad():
        weight = GatedDeltaNetFamily().signals(module, inputs).weight
    before, _, after = calls[0]
    columns = projection.weight.norm(dim=0).view(1, -1, module.head_v_dim)
    slope = (after / before).view(-1, *columns.shape[1:]) * columns
    assert relative(weight.flatten(), slope.flatten()) < 1e-4


@each_kind
def test_a_cut_model_is_one_built_with_fewer_channels(name: str):
    model = cut(name)
    assert model.config.linear_key_head_dim == CUT
    assert sizes_of(model) == sizes_of(transformers.AutoModelForCausalLM.from_config(model.config))
    assert torch.isfinite(logits(model)).all()
    assert relative(logits(model), logits(model_like(name))) > 1e-3


@each_kind
def test_generation_with_a_cache_is_generation_without(name: str):
    model = cut(name)
    assert torch.equal(generated(model), generated(model, use_cache=False))
    with torch.no_grad():
        cache = model(tokens(), use_cache=True).past_key_values
    for layer in find_ssm_layers(model).values():
        index: Any = layer.module.layer_idx
        if name == "minimax":
            state = cache.get_linear_cache(index)
        else:
            state = cache.layers[index].recurrent_states[0]
        assert state.shape[-2] == CUT


@each_kind
def test_padding_on_the_left_changes_nothing(name: str):
    model, ids = cut(name), tokens(8)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], 1)
    mask = (torch.arange(11) >= 3).long().expand(2, -1)
    places = (torch.arange(11) - 3).clamp(min=0).expand(2, -1)
    with torch.no_grad():
        output = model(padded, attention_mask=mask, position_ids=places, use_cache=False).logits
    assert relative(output[:, 3:], logits(model, ids)) < 1e-4
    longer = model.generate(padded, attention_mask=mask, max_new_tokens=4, do_sample=False)
    whole = torch.ones_like(ids)
    plain = model.generate(ids, attention_mask=whole, max_new_tokens=4, do_sample=False)
    assert torch.equal(longer[:, 11:], plain[:, 8:])


@each_kind
def test_half_precision_is_cut_and_refitted_in_single(name: str):
    model = model_like(name).to(torch.bfloat16)
    _cut(model, refit=True, layers=[next(iter(find_ssm_layers(model)))], share_state_dim=False)
    module = next(iter(find_ssm_layers(model).values())).module
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    whole = logits(model)
    assert torch.isfinite(whole).all()
    assert relative(whole.float(), logits(model.float())) < 0.1


@each_kind
def test_a_cut_model_is_saved_and_loaded(name: str, tmp_path: Path):
    model = cut(name)
    model.save_pretrained(tmp_path)
    again = loaded(tmp_path)
    assert again.config.linear_key_head_dim == CUT
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(generated(again), generated(model))


@each_kind
def test_different_state_dims_can_not_be_loaded_as_something_else(name: str, tmp_path: Path):
    first = next(iter(find_ssm_layers(model_like(name))))
    model = cut(name, share_state_dim=False, layers=[first])
    assert torch.equal(generated(model), generated(model, use_cache=False))
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="'linear_key_head_dim' is a per-layer attribute"):
        loaded(tmp_path)
    fresh = load_compressed(build(name), model.state_dict())
    assert torch.equal(logits(fresh), logits(model))


def test_uneven_layers_are_padded_where_nothing_is_normalised(tmp_path: Path):
    first = next(iter(find_ssm_layers(model_like("minimax"))))
    model = cut("minimax", share_state_dim=False, layers=[first])
    before = logits(model)
    pad_state_dim(model)
    assert {layer.state_dim for layer in find_ssm_layers(model).values()} == {STATES}
    assert relative(logits(model), before) < 2e-6
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(loaded(tmp_path)), logits(model))


def test_uneven_layers_are_not_padded_where_channels_are_normalised():
    first = next(iter(find_ssm_layers(model_like("qwen3_5"))))
    model = cut("qwen3_5", share_state_dim=False, layers=[first])
    with pytest.raises(UnsupportedLayerError, match="normalises B and C"):
        pad_state_dim(model)


@each_kind
def test_load_state_dict_resizes_the_model_with_its_config(name: str):
    small, big = cut(name), build(name)
    install_resize_hooks(big)
    big.load_state_dict(small.state_dict())
    assert big.config.to_dict() == small.config.to_dict()
    assert sizes_of(big) == sizes_of(small)
    assert torch.equal(logits(big), logits(small))


def _unread(model: Any) -> dict[str, Tensor]:
    """Zero what makes the queries' second half of channels; layer -> the others, (heads, r)."""
    keep = {}
    for path, layer in find_ssm_layers(model).items():
        family, module = layer.family, layer.module
        assert isinstance(family, SelectiveFamily)
        keep[path] = torch.arange(CUT).expand(family.groups(module), -1)
        for name, (_, index) in family.readout_entries(module, CUT + keep[path]).items():
            module.get_parameter(name).data[index] = 0
    return keep


def test_dropping_channels_that_no_query_reads_is_exact_without_norms():
    model = model_like("minimax")
    keep = _unread(model)
    before = logits(model)
    assert relative(before, logits(model_like("minimax"))) > 1e-3
    drop_others(model, keep)
    assert relative(logits(model), before) < 1e-5


@each_delta
def test_a_channel_that_neither_query_nor_key_uses_goes_without_a_trace(name: str):
    """But for the factor 1 / sqrt(K), which the norm takes back up to its epsilon."""
    model = model_like(name)
    _unread(model)
    keep = {}
    for path, layer in find_ssm_layers(model).items():
        module: Any = layer.module
        heads, n = module.num_k_heads, module.head_k_dim
        keep[path] = torch.arange(CUT).expand(heads, -1)
        channels = (heads * n + n * torch.arange(heads)[:, None] + CUT + keep[path]).flatten()
        module.conv1d.weight.data[channels] = 0
        norm = module.o_norm if name == "olmo_hybrid" else module.norm
        norm.variance_epsilon = 1e-12
    before = logits(model)
    assert relative(before, logits(model_like(name))) > 1e-3
    drop_others(model, keep)
    assert relative(logits(model), before) < 1e-4


@each_kind
def test_optimizer_state_follows_and_training_goes_on(name: str):
    model = model_like(name).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        model(tokens(), labels=tokens()).loss.backward()
        optimizer.step()

    step()
    layers = find_ssm_layers(model)
    path, layer = next(iter(layers.items()))
    family = layer.family
    assert isinstance(family, SelectiveFamily)
    keep = torch.stack([torch.randperm(STATES)[:CUT].sort().values] * family.groups(layer.module))
    entries = family.state_entries(layer.module, keep)
    before = {
        key: optimizer.state[layer.module.get_parameter(key)]["exp_avg"].clone() for key in entries
    }
    plan = family.selection_plan(layer.module, keep).prefixed(path)
    change(model, plan, (optimizer,))
    for key, (dim, index) in entries.items():
        now = optimizer.state[layer.module.get_parameter(key)]
        assert torch.equal(now["exp_avg"], take(before[key], dim, index))
        assert float(now["step"]) == 1
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    old = {n: p.detach().clone() for n, p in layer.module.named_parameters()}
    step()
    assert all(not torch.equal(p, old[n]) for n, p in layer.module.named_parameters())


@pytest.mark.slow
@each_kind
def test_the_refit_makes_up_for_lost_channels(name: str):
    """Random weights, the worst case: every channel counts as much as any other."""
    model = model_like(name)
    plain = [event.output_error for event in _cut(model_like(name)).events]
    refitted = [event.output_error for event in _cut(model, refit=True).events]
    assert all(b < 0.6 * a for a, b in zip(plain, refitted, strict=True))
    assert max(refitted) < 0.5
    assert torch.equal(generated(model), generated(model, use_cache=False))


def test_another_activation_is_refused():
    model = model_like("qwen3_5")
    next(iter(find_ssm_layers(model).values())).module.activation = "gelu"
    with pytest.raises(UnsupportedLayerError, match=r"activation 'gelu'.*expected 'silu'"):
        _cut(model)


def test_layers_built_before_they_could_have_key_channels_are_refused():
    kind = LINEAR_ATTENTION["minimax"]
    config = transformers.MiniMaxConfig(vocab_size=50, hidden_size=32, **kind.arguments)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for layer in find_ssm_layers(model).values():
        del layer.module.head_k_dim
        assert LightningAttentionFamily().state_dim(layer.module) == 10
    before = logits(model)
    with pytest.raises(UnsupportedLayerError, match=r"enable_minimax_key_channels\(\) before"):
        _cut(model)
    assert torch.equal(logits(model), before)


WITHOUT_STATES = {
    "Lfm2": (
        {"layer_types": ["conv", "full_attention"], "num_key_value_heads": 2},
        r"Lfm2ShortConv is a short convolution.* Lfm2Attention is attention",
    ),
    "RecurrentGemma": (
        {"lru_width": 32, "num_hidden_layers": 3},
        r"RecurrentGemmaRglru is a recurrence with one state for each channel",
    ),
    "KimiLinear": (
        {
            "layer_types": ["linear_attention", "full_attention"],
            "num_key_value_heads": 4,
            "linear_num_heads": 2,
            "linear_head_dim": 8,
            "moe_intermediate_size": 16,
            "num_local_experts": 2,
            "n_group": 1,
            "topk_group": 1,
        },
        r"layers\.0\.self_attn can't be reduced: KimiLinearDeltaAttention .*one head_dim",
    ),
}


@pytest.mark.parametrize("name", WITHOUT_STATES)
def test_what_can_not_be_reduced_is_named(name: str):
    config = getattr(transformers, f"{name}Config", None)
    if config is None:
        pytest.skip("transformers is older")
    arguments, message = WITHOUT_STATES[name]
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
    sizes |= {"num_hidden_layers": 2, "pad_token_id": 0} | arguments
    model = transformers.AutoModelForCausalLM.from_config(config(vocab_size=50, **sizes))
    with pytest.raises(UnsupportedLayerError, match=message):
        _cut(model)
