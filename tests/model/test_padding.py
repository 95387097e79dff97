"""Padding state dimensions: nothing computed changes, configs fit again, and what is refused."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_compressm import find_ssm_layers
from lightning_compressm.errors import NonFiniteError, UnsupportedLayerError
from lightning_compressm.families import SelectiveFamily
from lightning_compressm.model.padding import pad_state_dim
from lightning_compressm.nn import LRU
from lightning_compressm.nn._mamba import Mamba2Block, MambaBlock, MultiHeadMambaBlock
from lightning_compressm.surgery.apply import apply_plan
from tests.families.hf_models import KINDS, generated, logits, model_like
from tests.families.selective import relative

BLOCKS = [MambaBlock, partial(MultiHeadMambaBlock, heads=2), Mamba2Block]
PADDED = [name for name, kind in KINDS.items() if "normalised" not in kind.family]
NORMALISED = [name for name in KINDS if name not in PADDED]


def blocks(make: Callable[..., nn.Module]) -> nn.Sequential:
    model = nn.Sequential(make(8, 3), nn.Linear(8, 8), make(8, 6))
    with torch.no_grad():
        for value in model.parameters():
            value += 0.1 * torch.randn_like(value)
    return model


def dims(model: nn.Module) -> list[int]:
    return [layer.state_dim for layer in find_ssm_layers(model).values()]


def cut_first(model: nn.Module, state_dim: int = 3) -> None:
    """Drop states of the first layer and say so in the config, as a reduction does."""
    registry = importlib.import_module("lightning_compressm.families")
    name, layer = next(iter(find_ssm_layers(model).items()))
    assert isinstance(layer.family, SelectiveFamily)
    groups, n = layer.family.groups(layer.module), layer.state_dim
    keep = torch.stack([torch.randperm(n)[:state_dim].sort().values for _ in range(groups)])
    apply_plan(layer.module, layer.family.selection_plan(layer.module, keep))
    for key, value in registry.model_attributes(model, {}).items():
        *path, last = key.split(".")
        owner: Any = model
        for part in path:
            owner = getattr(owner, part)
        setattr(owner, last, value)
    assert find_ssm_layers(model)[name].state_dim == state_dim


@pytest.mark.parametrize(("state_dim", "expected"), [(None, 6), (6, 6), (9, 9)])
@pytest.mark.parametrize("make", BLOCKS, ids=["Mamba", "Zamba", "Mamba-2"])
def test_the_output_stays(make: Callable[..., nn.Module], state_dim: int | None, expected: int):
    model, x = blocks(make), torch.randn(2, 12, 8)
    before, kept = model(x), list(model[1].parameters())
    assert pad_state_dim(model, state_dim) is model
    assert dims(model) == [expected, expected]
    assert relative(model(x), before) < 1e-6
    assert all(a is b for a, b in zip(model[1].parameters(), kept, strict=True))


@pytest.mark.parametrize("make", BLOCKS, ids=["Mamba", "Zamba", "Mamba-2"])
def test_padded_states_are_idle_in_training_as_well(make: Callable[..., nn.Module]):
    model, x = blocks(make), torch.randn(2, 12, 8)
    padded = pad_state_dim(deepcopy(model))
    for network in (model, padded):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            network(x).square().mean().backward()
            optimizer.step()
    assert relative(padded(x), model(x)) < 1e-5


def test_nothing_to_pad_changes_no_tensor():
    model = nn.Sequential(MambaBlock(8, 4), MambaBlock(8, 4, normalise=True), LRU(8, 5))
    before = dict(model.named_parameters())
    pad_state_dim(model)
    assert all(before[name] is value for name, value in model.named_parameters())


def test_each_kind_has_its_own_largest():
    model = nn.Sequential(MambaBlock(8, 2), Mamba2Block(8, 3), MambaBlock(8, 4), LRU(8, 9))
    assert dims(pad_state_dim(model)) == [4, 3, 4, 9]
    assert dims(pad_state_dim(model, 5)) == [5, 5, 5, 9]


@pytest.mark.parametrize("state_dim", [5, 0, -1, 6.0, True])
def test_a_state_dim_below_a_layers_is_refused(state_dim: Any):
    model = blocks(MambaBlock)
    with pytest.raises(ValueError, match=r"expected an integer >= 6, .* '2', got"):
        pad_state_dim(model, state_dim)
    assert dims(model) == [3, 6]


def test_a_model_without_selective_layers_is_refused():
    with pytest.raises(UnsupportedLayerError, match=r"selective layers .* none in LRU"):
        pad_state_dim(LRU(2, 4))


def test_normalised_blocks_are_refused_and_nothing_is_changed():
    model = nn.Sequential(
        MambaBlock(8, 2), MambaBlock(8, 3, normalise=True), MambaBlock(8, 4, normalise=True)
    )
    before = dict(model.named_parameters())
    with pytest.raises(UnsupportedLayerError, match="'1' normalises B and C over its 3 states"):
        pad_state_dim(model, 4)
    assert all(before[name] is value for name, value in model.named_parameters())


def test_all_or_nothing():
    model = blocks(MambaBlock)
    with torch.no_grad():
        model[2].A_log[0, 0] = float("nan")
    before = dict(model.named_parameters())
    with pytest.raises(NonFiniteError):
        pad_state_dim(model, 8)
    assert dims(model) == [3, 6]
    assert all(before[name] is value for name, value in model.named_parameters())


@pytest.mark.parametrize("name", PADDED)
def test_a_model_of_transformers_can_be_saved_again(name: str, tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    model, kind = model_like(name), KINDS[name]
    whole = logits(model)
    cut_first(model)
    before = logits(model)
    assert relative(before, whole) > 1e-3
    assert model.config.is_heterogeneous
    pad_state_dim(model)
    assert getattr(model.config, kind.states) == 8
    assert relative(logits(model), before) < 2e-6
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(generated(again), generated(model, use_cache=False))


@pytest.mark.parametrize("name", NORMALISED)
def test_what_can_not_be_padded_exactly_is_refused(name: str):
    pytest.importorskip("transformers")
    model = model_like(name)
    cut_first(model)
    before, config = logits(model), model.config.to_dict()
    with pytest.raises(UnsupportedLayerError, match="share_state_dim=True"):
        pad_state_dim(model)
    assert torch.equal(logits(model), before)
    assert model.config.to_dict() == config
