"""The page about the house: the files it names exist, and what it says is enough to add things."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn

from benchmarks import arms
from lightning_compressm import CompreSSMCallback, compress, find_ssm_layers
from lightning_compressm.callbacks import _strategy
from lightning_compressm.control.criteria import CRITERIA
from lightning_compressm.families import _registry
from lightning_compressm.nn import LRU
from lightning_compressm.reduction import analysis

from .callbacks.helpers import Classifier, loader, trainer

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "house.md"

FAMILY = """
from lightning_compressm import register_family
from lightning_compressm.families.lru import LRUFamily

@register_family
class ShoutingFamily(LRUFamily):
    name = "LOUD"

    def matches(self, module):
        return super().matches(module) and hasattr(module, "loud")
"""

CRITERION = """
from lightning_compressm.control.criteria import register_criterion

@register_criterion("last_states")
def last_states(statistics, generator):
    import torch
    return torch.arange(statistics.energy.shape[-1]).expand_as(statistics.energy)
"""

KIND = """
from lightning_compressm.reduction.analysis import analyses
from lightning_compressm.reduction.linear import analyse_linear
from house_family import ShoutingFamily

LOOKED_AT = []

@analyses(ShoutingFamily)
def analyse_loud(layer, policy, seen, processes, spectrum_only=False):
    LOOKED_AT.append(layer.name)
    return analyse_linear(layer, policy, seen, processes, spectrum_only)
"""

STRATEGY = """
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning_compressm.callbacks._strategy import refreshes

class Own(SingleDeviceStrategy):
    pass

REFRESHED = []

@refreshes(Own)
def refresh(strategy, undo):
    REFRESHED.append(strategy)
    return lambda: None
"""

ARM = """
from benchmarks.arms.full import Full

class Quiet(Full):
    name = "quiet"
"""

SOURCES = {
    "family": FAMILY,
    "criterion": CRITERION,
    "kind": KIND,
    "strategy": STRATEGY,
}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Imports files of one's own, and forgets what they have registered."""
    tables: list[dict[Any, Any]] = [
        _registry._families,
        CRITERIA,
        analysis._analysers,
        _strategy._REFRESH,
    ]
    _registry.registered_families()
    before = [dict(table) for table in tables]
    for name, source in SOURCES.items():
        (tmp_path / f"house_{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    yield lambda name: importlib.import_module(f"house_{name}")
    for table, content in zip(tables, before, strict=True):
        table.clear()
        table.update(content)
    for name in SOURCES:
        sys.modules.pop(f"house_{name}", None)


def _loud() -> nn.Module:
    layer = LRU(2, 8)
    layer.loud = True
    return layer


def test_the_page_names_files_that_exist():
    named = set(re.findall(r"`((?:lightning_compressm|benchmarks)/[\w/.]+)`", PAGE.read_text()))
    assert len(named) >= 6
    assert not [name for name in named if not (ROOT / name).exists()]


def test_the_page_names_every_room():
    package = ROOT / "lightning_compressm"
    rooms = {p.name for p in package.iterdir() if p.is_dir() and not p.name.startswith("__")}
    text = PAGE.read_text()
    assert not [room for room in rooms if f" {room}/ " not in text]


def test_a_family_is_one_file(package: Any):
    package("family")
    layer = _loud()
    assert find_ssm_layers(layer)[""].family.name == "LOUD"
    assert compress(layer, state_dim=3).events[0].family == "LOUD"


def test_a_criterion_is_one_function(package: Any):
    from lightning_compressm.families import registered_families

    package("criterion")
    layer, inputs = registered_families()["Mamba"].example(d_state=6)
    rates = layer.A_log[:, 3:].detach().clone()
    compress(layer, state_dim=3, sample=inputs, criterion="last_states", max_output_error=None)
    assert torch.equal(layer.A_log, rates)


def test_a_kind_of_layer_is_one_file(package: Any):
    kind = package("kind")
    model = nn.Sequential(_loud(), LRU(2, 8))
    report = compress(model, state_dim=3)
    assert [event.action for event in report.events] == ["reduce", "reduce"]
    assert kind.LOOKED_AT == ["0"]


def test_a_strategy_is_one_function(package: Any, tmp_path: Path):
    own = package("strategy")
    callback = CompreSSMCallback(state_dim=4, window=(0, 6), verbose=False)
    strategy = own.Own(accelerator="cpu", device=torch.device("cpu"))
    assert isinstance(strategy, SingleDeviceStrategy)
    fit = trainer(tmp_path, callback, strategy=strategy, accelerator="auto", max_epochs=2)
    fit.fit(Classifier(), loader())
    assert [strategy] == own.REFRESHED
    assert set(callback.state_dims.values()) == {4}


def test_an_arm_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "quiet.py").write_text(ARM)
    monkeypatch.setattr(arms, "__path__", [*arms.__path__, str(tmp_path)])
    assert "quiet" in arms.all_arms()
    sys.modules.pop("benchmarks.arms.quiet", None)
