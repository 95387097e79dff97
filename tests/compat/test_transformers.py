"""transformers' Mamba layers with our scan: the same values, without the slow loop."""

from __future__ import annotations

import importlib
import importlib.util
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lightning_compressm.compat import enable_fast_mamba_cpu
from tests.nn._reference import relative_error

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None,
    reason="transformers is not installed; pip install 'lightning_compressm[transformers]'",
)
MODELS = ("mamba", "falcon_mamba", "jamba", "zamba")


def scans(model: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Our scan and the pure-torch loop of transformers."""
    enable_fast_mamba_cpu()
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    fast = module.mamba_selective_scan
    return fast, fast._compressm_slow.__wrapped__


def arguments(length: int = 40) -> list[torch.Tensor]:
    shapes = [(2, 6, length), (2, 6, length), (6, 5), (2, 5, length), (2, 5, length), (6,)]
    values = [torch.randn(shape) for shape in [*shapes, (2, 6, length), (6,)]]
    values[2] = -values[2].abs()
    return [value.requires_grad_() for value in values]


@needs_transformers
@pytest.mark.parametrize("model", MODELS)
def test_outputs_states_and_gradients_are_those_of_transformers(model: str):
    given = arguments()
    results = [
        scan(*given, delta_softplus=True, return_last_state=True, use_mambapy=False)
        for scan in scans(model)
    ]
    (y, state), (expected, expected_state) = results
    assert relative_error(y, expected) < 1e-5
    assert relative_error(state, expected_state) < 1e-5
    weights = torch.randn(y.shape)
    found, wanted = (torch.autograd.grad((r[0] * weights).sum(), given) for r in results)
    for value, want in zip(found, wanted, strict=True):
        assert relative_error(value, want) < 1e-5
    assert torch.equal(scans(model)[0](*given, delta_softplus=True), y)


@needs_transformers
@pytest.mark.parametrize("training", [True, False])
def test_a_model_gives_the_same_logits(training: bool, monkeypatch: pytest.MonkeyPatch):
    fast, slow = scans("mamba")
    module = importlib.import_module("transformers.models.mamba.modeling_mamba")
    # With mamba-ssm enabled in this process, training would take another path.
    monkeypatch.setattr(module, "mamba_inner_fn", lambda *args, **kwargs: None)
    config = module.MambaConfig(
        vocab_size=24, hidden_size=16, state_size=6, num_hidden_layers=2, use_mambapy=False
    )
    model = module.MambaForCausalLM(config).train(training)
    tokens = torch.randint(1, 24, (2, 37))
    logits = model(tokens, use_cache=False).logits
    monkeypatch.setattr(module, "mamba_selective_scan", slow)
    assert relative_error(logits, model(tokens, use_cache=False).logits) < 1e-5
    monkeypatch.setattr(module, "mamba_selective_scan", fast)
    model.eval()
    generated = model.generate(tokens, max_new_tokens=6, do_sample=False)
    uncached = model.generate(tokens, max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(generated, uncached)


@needs_transformers
def test_a_training_step_is_much_faster():
    given = arguments(512)

    def seconds(scan: Callable[..., Any]) -> float:
        start = time.process_time()
        scan(*given, delta_softplus=True).sum().backward()
        return time.process_time() - start

    fast, slow = scans("mamba")
    assert min(seconds(fast) for _ in range(3)) < min(seconds(slow) for _ in range(2)) / 2


@needs_transformers
def test_enabling_twice_wraps_once():
    fast, _ = scans("mamba")
    assert scans("mamba")[0] is fast
    assert not hasattr(fast._compressm_slow, "_compressm_slow")


@needs_transformers
def test_other_devices_keep_the_path_of_transformers(monkeypatch: pytest.MonkeyPatch):
    fast, _ = scans("mamba")
    on_meta = [value.to("meta") for value in arguments()]
    cell = next(c for c in fast.__closure__ if c.cell_contents is fast._compressm_slow)
    monkeypatch.setattr(cell, "cell_contents", lambda *args, **kwargs: (len(args), kwargs))
    assert fast(*on_meta, use_mambapy=True) == (10, {"use_mambapy": True})


@needs_transformers
def test_another_layout_of_transformers_is_refused(monkeypatch: pytest.MonkeyPatch):
    module = importlib.import_module("transformers.models.jamba.modeling_jamba")
    monkeypatch.delattr(module, "mamba_selective_scan")
    with pytest.raises(ImportError, match=r"mamba_selective_scan in .*jamba.*transformers>=5.16.1"):
        enable_fast_mamba_cpu()


def test_without_transformers_the_error_says_how_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install"):
        enable_fast_mamba_cpu()
