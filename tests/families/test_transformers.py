"""transformers' selective architectures: cut, generate, save, load; tiny models, no downloads."""

from __future__ import annotations

import importlib
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_compressm import compress, find_ssm_layers, load_compressed
from lightning_compressm.model.change import change
from lightning_compressm.model.resizing import install_resize_hooks
from lightning_compressm.reduction.events import CompressionReport
from lightning_compressm.reduction.recorder import CallRecorder
from tests.deciding import decided
from tests.families.hf_models import KINDS, STATES, build, generated, logits, model_like, tokens
from tests.families.selective import drop_others, relative, scanned, seen, stop_reading

transformers = pytest.importorskip("transformers")

EXACT = [name for name, kind in KINDS.items() if kind.family in ("Mamba", "Zamba")]
MAMBA2 = [name for name, kind in KINDS.items() if kind.family == "Mamba-2"]
NORMALISED = [name for name, kind in KINDS.items() if "normalised" in kind.family]
each_kind = pytest.mark.parametrize("name", KINDS)


def cut(name: str, state_dim: int = 3, **options: Any) -> Any:
    model = model_like(name)
    _cut(model, state_dim, **options)
    return model


def _cut(model: Any, state_dim: int, **options: Any) -> CompressionReport:
    options = {"refit": False, "max_output_error": None, **options}
    return compress(model, state_dim=state_dim, sample={"input_ids": tokens()}, **options)


def uneven(name: str) -> Any:
    """The first layer has 3 states, the others have all of theirs."""
    return cut(name, layers=[next(iter(find_ssm_layers(model_like(name))))])


def saved(model: Any, path: Path) -> Path:
    model.save_pretrained(path)
    return path


def loaded(path: Path, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.AutoModelForCausalLM.from_pretrained(path, **options).eval()


def sizes(model: nn.Module) -> dict[str, Any]:
    """Everything in a model that says how big something is."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        for key, value in vars(module).items():
            numbers = isinstance(value, int) and not isinstance(value, bool)
            if numbers or (isinstance(value, tuple) and key != "_version"):
                found[f"{path}.{key}"] = value
        found |= {f"{path}.{k}": t.shape for k, t in module._buffers.items() if t is not None}
    return found | {name: parameter.shape for name, parameter in model.named_parameters()}


@each_kind
def test_every_layer_is_found_by_its_family(name: str):
    model = model_like(name)
    layers = find_ssm_layers(model)
    mixers = [path for path, module in model.named_modules() if "A_log" in module._parameters]
    assert list(layers) == mixers
    assert len(mixers) >= 2
    assert {layer.family.name for layer in layers.values()} == {KINDS[name].family}
    assert {layer.state_dim for layer in layers.values()} == {STATES}


@each_kind
def test_the_signals_are_what_the_layer_computes(name: str):
    model = model_like(name)
    for layer in find_ssm_layers(model).values():
        module: Any = layer.module
        calls = seen(module, model, tokens(), use_cache=False)
        with torch.no_grad():
            signals = layer.family.signals(module, calls[""][0])
        y = scanned(signals, module.D)
        columns = module.out_proj.weight.norm(dim=0)
        if "norm" in calls:
            inner, gate = calls["norm"]
            weight = F.silu(gate) * columns * module.norm.weight
        else:
            # y comes out gated, so the gate is what must relate the two.
            gate = (signals.weight.flatten(2) / columns).double()
            inner, weight, y = calls["out_proj"][0], signals.weight.flatten(2), y * gate
        assert relative(y, inner.double()) < 1e-5
        assert relative(signals.weight.flatten(2), weight) < 1e-5


@each_kind
def test_a_cut_model_is_one_built_with_fewer_states(name: str):
    model, kind = cut(name, share_state_dim=True), KINDS[name]
    assert getattr(model.config, kind.states) == 3
    assert sizes(model) == sizes(transformers.AutoModelForCausalLM.from_config(model.config))
    assert torch.isfinite(logits(model)).all()
    assert relative(logits(model), logits(model_like(name))) > 1e-3


@each_kind
def test_generation_with_a_cache_is_generation_without(name: str):
    model = cut(name, share_state_dim=True)
    with torch.no_grad():
        output = model(tokens(), use_cache=True)
    cache = output["cache_params"] if "cache_params" in output else output["past_key_values"]
    for layer in find_ssm_layers(model).values():
        state = cache.layers[layer.module.layer_idx].recurrent_states[0]
        assert state.shape[-1] == 3
    assert torch.equal(generated(model), generated(model, use_cache=False))


@each_kind
def test_a_cut_model_is_saved_and_loaded(name: str, tmp_path: Path):
    model = cut(name, share_state_dim=True)
    assert torch.equal(logits(loaded(saved(model, tmp_path))), logits(model))


@each_kind
def test_different_state_dims_can_not_be_loaded_as_something_else(name: str, tmp_path: Path):
    model, kind = uneven(name), KINDS[name]
    assert torch.equal(generated(model), generated(model, use_cache=False))
    saved(model, tmp_path)
    for options in ({}, {"ignore_mismatched_sizes": True}):
        with pytest.raises(RuntimeError, match=f"'{kind.states}' is a per-layer attribute"):
            loaded(tmp_path, **options)
    fresh = load_compressed(build(name), model.state_dict())
    assert torch.equal(logits(fresh), logits(model))
    assert fresh.config.to_dict()["per_layer_config"] == {"0": {kind.states: 3}}


@each_kind
def test_equal_state_dims_can_be_saved_again(name: str, tmp_path: Path):
    model = uneven(name)
    _cut(model, 3, layers=list(find_ssm_layers(model))[1:])
    assert not model.config.is_heterogeneous
    assert torch.equal(logits(loaded(saved(model, tmp_path))), logits(model))


@pytest.mark.parametrize("name", ["mamba", "jamba", "zamba", "mamba2"])
def test_undo_puts_the_config_back(name: str):
    model = model_like(name)
    before, first, second = model.config.to_dict(), *list(find_ssm_layers(model))[:2]
    undo = []
    for layer, state_dim in ((first, 5), (second, 3)):
        with CallRecorder(find_ssm_layers(model)) as recorder:
            logits(model)
        choices: dict[str, Any] = {"layers": [layer], "refit": False, "max_output_error": None}
        plan = decided(model, recorder.seen, state_dim=state_dim, **choices).plan
        undo.append((model.config.to_dict(), ExitStack()))
        change(model, plan, undo=undo[-1][1])
    after = model.config.to_dict()["per_layer_config"]
    assert [own[KINDS[name].states] for own in after.values()] == [5, 3]
    for config, step in reversed(undo):
        step.close()
        assert model.config.to_dict() == config
    assert model.config.to_dict() == before
    assert torch.equal(logits(model), logits(model_like(name)))


@each_kind
def test_dropping_states_that_are_not_read(name: str, monkeypatch: pytest.MonkeyPatch):
    if name in EXACT:
        # Other tests put faster scans here, whose sums are rounded in another order.
        module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
        scan = module.mamba_selective_scan
        loop = getattr(scan, "_compressm_slow", scan).__wrapped__
        monkeypatch.setattr(module, "mamba_selective_scan", loop)
    double = name in EXACT
    model, other = (model_like(name).double() if double else model_like(name) for _ in range(2))
    keep = stop_reading(model, kept=5)
    before = logits(model)
    assert relative(before, logits(other)) > 1e-3
    approximate = {layer.family.approximate for layer in find_ssm_layers(model).values()}
    drop_others(model, keep)
    error = relative(logits(model), before)
    assert approximate == {name in NORMALISED}
    if name in EXACT:
        # Nothing but the order in which products of another size are summed up.
        assert error < 1e-13
    elif name in MAMBA2:
        assert error < 1e-6
    else:
        assert 1e-6 < error < 0.7


class Wrapper(nn.Module):
    """A model inside of another, as in a LightningModule."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net


@each_kind
def test_load_state_dict_resizes_the_model_with_its_config(name: str):
    small, big = Wrapper(cut(name, share_state_dim=True)), Wrapper(build(name))
    install_resize_hooks(big)
    big.load_state_dict(small.state_dict())
    assert big.net.config.to_dict() == small.net.config.to_dict()
    assert sizes(big) == sizes(small)
    assert torch.equal(logits(big.net), logits(small.net))
    assert torch.equal(generated(big.net), generated(small.net))


@pytest.mark.parametrize(
    ("name", "buffer"), [("falcon_mamba", "c_layernorm.weight"), ("falcon_h1", "mup_vector")]
)
def test_buffers_that_are_not_saved_follow(name: str, buffer: str):
    model = cut(name, share_state_dim=True)
    fresh = transformers.AutoModelForCausalLM.from_config(model.config)
    for path, layer in find_ssm_layers(model).items():
        assert f"{path}.{buffer}" not in model.state_dict()
        mixer = fresh.get_submodule(path)
        assert torch.equal(layer.module.get_buffer(buffer), mixer.get_buffer(buffer))


@each_kind
def test_a_cut_model_trains(name: str):
    model = cut(name, share_state_dim=True).train()
    layers = find_ssm_layers(model).values()
    parameters = [p for layer in layers for p in layer.module.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        model(tokens(), labels=tokens()).loss.backward()
        assert all(bool(p.grad.any()) for p in parameters if p.grad is not None)
        optimizer.step()
    for layer in layers:
        named = dict(layer.module.named_parameters())
        assert all(
            named[n].grad is not None for n in layer.family.state_axes(layer.module) if n in named
        )
    assert torch.isfinite(logits(model.eval())).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", [*EXACT, *NORMALISED, "mamba2", "nemotron_h", "falcon_h1"])
def test_the_refit_makes_up_for_lost_states(name: str):
    model = model_like(name)
    plain = [event.output_error for event in _cut(model_like(name), 5).events]
    refitted = [event.output_error for event in _cut(model, 5, refit=True).events]
    assert all(b < 0.9 * a for a, b in zip(plain, refitted, strict=True))
    assert torch.equal(generated(model), generated(model, use_cache=False))


class Distillation(nn.Module):
    """Two models that were made from one config, held by what is around them too."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.teacher = build(name)
        self.student = type(self.teacher)(self.teacher.config)
        self.config = self.teacher.config

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return logits(self.student, x)


@pytest.mark.parametrize("name", ["mamba", "zamba", "mamba2"])
@pytest.mark.parametrize("together", [True, False], ids=["in one module", "apart"])
def test_two_models_from_one_config_do_not_change_each_other(
    name: str, together: bool, tmp_path: Path
):
    both, states = Distillation(name), KINDS[name].states
    shared, expected = both.config, logits(both.teacher)
    assert both.student.config is shared
    options: dict[str, Any] = {"max_output_error": None, "refit": False}
    if together:
        compress(both, state_dim=3, sample=tokens(), ignore=["teacher.*"], **options)
    else:
        compress(both.student, state_dim=3, sample={"input_ids": tokens()}, **options)
    assert getattr(both.student.config, states) == 3
    assert getattr(shared, states) == STATES
    assert all(m.config is shared for m in (both, both.teacher))
    holders = [m.config for m in both.student.modules() if hasattr(m, "config")]
    assert len({id(config) for config in holders}) == 1 < len(holders)
    # Not to the bit: loaded tensors lie elsewhere in memory, which changes how they are summed up.
    torch.testing.assert_close(logits(loaded(saved(both.teacher, tmp_path / "a"))), expected)
    torch.testing.assert_close(
        logits(loaded(saved(both.student, tmp_path / "b"))), logits(both.student)
    )


def test_a_change_that_fails_leaves_the_shared_config_in_place():
    both = Distillation("mamba")
    options: dict[str, Any] = {"max_output_error": None, "refit": False}
    with CallRecorder(find_ssm_layers(both.student)) as recorder:
        logits(both.student)
    plan, undo = decided(both.student, recorder.seen, state_dim=3, **options).plan, ExitStack()
    change(both.student, plan, undo=undo)
    assert both.student.config is not both.config
    undo.close()
    holders = [m.config for m in both.modules() if hasattr(m, "config")]
    assert all(config is both.config for config in holders)
