"""MiniMax with a number of key channels of its own: what it computes, and how it is built."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import pytest
import torch

from lightning_compressm.compat import enable_minimax_key_channels
from tests.nn._reference import relative_error

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None,
    reason="transformers is not installed; pip install 'lightning_compressm[transformers]'",
)
HEADS, SIZE, MORE = 2, 4, 7


def minimax() -> Any:
    return importlib.import_module("transformers.models.minimax.modeling_minimax")


def layer(**sizes: int) -> Any:
    enable_minimax_key_channels()
    config = minimax().MiniMaxConfig(
        hidden_size=8,
        head_dim=SIZE,
        num_attention_heads=HEADS,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        block_size=6,
        **sizes,
    )
    return minimax().MiniMaxLightningAttention(config, 0)


def pair() -> tuple[Any, Any]:
    """A layer as shipped, and one with further key channels that are all zero."""
    shipped, ours = layer(), layer(linear_key_head_dim=MORE)
    ours.load_state_dict({**shipped.state_dict(), "qkv_proj.weight": ours.qkv_proj.weight})
    old = shipped.qkv_proj.weight.detach().unflatten(0, (HEADS, 3, SIZE))
    new = torch.zeros(HEADS, 2 * MORE + SIZE, 8)
    new[:, :SIZE], new[:, MORE : MORE + SIZE], new[:, 2 * MORE :] = old.unbind(1)
    ours.qkv_proj.weight.data = new.flatten(0, 1)
    return shipped, ours


@needs_transformers
def test_further_channels_of_zeros_change_nothing():
    shipped, ours = pair()
    inputs = torch.randn(3, 70, 8)
    mask = torch.rand(3, 70) > 0.2
    results = []
    for module in (shipped, ours):
        given = inputs.clone().requires_grad_()
        outputs, state = module(given, None, mask)
        outputs.square().sum().backward()
        results.append((outputs, given.grad, state))
    (y, gradient, state), (mine, my_gradient, my_state) = results
    assert relative_error(mine, y) < 1e-5
    assert relative_error(my_gradient, gradient) < 1e-5
    assert my_state.shape == (3, HEADS, MORE, SIZE)
    assert relative_error(my_state[:, :, :SIZE], state) < 1e-5


@needs_transformers
def test_steps_with_a_cache_are_those_of_the_whole_sequence():
    _, ours = pair()
    inputs, cache = torch.randn(2, 20, 8), minimax().MiniMaxCache()
    whole, _ = ours(inputs, None, None)
    parts = [inputs[:, :9], *inputs[:, 9:17].split(1, 1), inputs[:, 17:]]
    stepped = torch.cat([ours(part, None, None, cache)[0] for part in parts], 1)
    assert relative_error(stepped, whole) < 1e-5


@needs_transformers
def test_a_layer_with_equal_sizes_runs_as_shipped():
    module = layer()
    assert (module.head_k_dim, module.qkv_proj.out_features) == (SIZE, 3 * HEADS * SIZE)
    shipped = type(module).forward._compressm_shipped
    inputs = torch.randn(2, 9, 8)
    assert torch.equal(module(inputs, None, None)[0], shipped(module, inputs, None, None)[0])


@needs_transformers
def test_enabling_twice_wraps_once():
    enable_minimax_key_channels()
    forward = minimax().MiniMaxLightningAttention.forward
    enable_minimax_key_channels()
    assert minimax().MiniMaxLightningAttention.forward is forward
    assert not hasattr(forward._compressm_shipped, "_compressm_shipped")


@needs_transformers
def test_another_layout_of_transformers_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(minimax(), "MiniMaxLightningAttention")
    with pytest.raises(ImportError, match=r"MiniMaxLightningAttention in .*transformers>=5.16.1"):
        enable_minimax_key_channels()


def test_without_transformers_the_error_says_how_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install"):
        enable_minimax_key_channels()
