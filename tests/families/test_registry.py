"""Who knows which layer: registration, order of asking, other packages' entry points."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from typing import Any

import pytest
import torch
from torch import nn

from lightning_compressm import compress, find_ssm_layers, register_family
from lightning_compressm.families import Family, _registry, find_family, registered_families
from lightning_compressm.families.lru import LRUFamily
from lightning_compressm.nn import LRU
from tests.families.layers import Decay, DecayFamily


def test_the_packages_own_families_are_there():
    assert isinstance(registered_families()["LRU"], LRUFamily)


def test_the_mapping_is_a_copy():
    registered_families().clear()
    assert "LRU" in registered_families()


def test_a_users_own_layer_is_found_reduced_and_loaded():
    register_family(DecayFamily)
    model = nn.Sequential(nn.Linear(2, 3), Decay(3, 12), nn.Linear(3, 2))
    (layer,) = find_ssm_layers(model).values()
    assert (layer.name, layer.family.name, layer.state_dim) == ("1", "Decay", 12)
    x = torch.randn(2, 30, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(x).square().mean().backward()
    optimizer.step()
    before = model(x)
    report = compress(model, state_dim=11, optimizers=[optimizer])
    assert report.events[0].family == "Decay"
    assert model[1].state_dim == model[1].state_size == 11
    assert (model(x) - before).norm() < 0.2 * before.norm()
    model(x).square().mean().backward()
    optimizer.step()


def test_an_unknown_layer_is_not_found():
    assert find_family(Decay(3, 4)) is None
    assert find_ssm_layers(nn.Sequential(Decay(3, 4))) == {}


def test_the_latest_to_register_is_asked_first():
    class Mine(LRUFamily):
        name = "Mine"

    register_family(Mine)
    assert isinstance(find_family(LRU(2, 4)), Mine)


def test_registering_a_name_again_replaces_the_family():
    class Again(DecayFamily):
        pass

    register_family(DecayFamily)
    register_family(Again)
    assert isinstance(registered_families()["Decay"], Again)
    assert list(registered_families()).count("Decay") == 1


def test_registering_returns_the_class():
    assert register_family(DecayFamily) is DecayFamily


class _Unfinished(Family):
    name = "Unfinished"

    def matches(self, module: nn.Module) -> bool:
        return False


class _Nameless(DecayFamily):
    name = None  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("thing", "message"),
    [
        (DecayFamily(), "expected a subclass of Family"),
        (Decay, "expected a subclass of Family"),
        ("LRU", "expected a subclass of Family"),
        (None, "expected a subclass of Family"),
        (_Unfinished, "_Unfinished lacks state_axes, system, write"),
        (_Nameless, "needs a class attribute `name`"),
        (Family, "Family lacks matches"),
    ],
)
def test_what_is_no_family_is_refused(thing: Any, message: str):
    before = registered_families()
    with pytest.raises(TypeError, match=message):
        register_family(thing)
    assert registered_families() == before


def test_a_family_without_an_example_says_so():
    class Plain(DecayFamily):
        example = Family.example

    with pytest.raises(NotImplementedError, match="Plain ships no example"):
        Plain().example()


@pytest.fixture
def _undiscovered(monkeypatch: pytest.MonkeyPatch):
    _registry._discover.cache_clear()
    yield
    _registry._discover.cache_clear()


@pytest.mark.usefixtures("_undiscovered")
def test_families_of_other_packages_are_found_by_entry_point(monkeypatch: pytest.MonkeyPatch):
    groups = []

    def entry_points(group: str) -> list[EntryPoint]:
        groups.append(group)
        return [EntryPoint("decay", "tests.families.layers:DecayFamily", group)]

    monkeypatch.setattr(_registry, "entry_points", entry_points)
    assert find_family(Decay(3, 4)).name == "Decay"
    assert find_family(LRU(2, 4)).name == "LRU"
    registered_families()
    assert groups == ["lightning_compressm.families"], "looked up once"


@pytest.mark.usefixtures("_undiscovered")
def test_a_users_family_goes_before_discovered_ones(monkeypatch: pytest.MonkeyPatch):
    class Mine(DecayFamily):
        name = "Mine"

    register_family(Mine)
    entry = EntryPoint("decay", "tests.families.layers:DecayFamily", "")
    monkeypatch.setattr(_registry, "entry_points", lambda group: [entry])
    assert find_family(Decay(3, 4)).name == "Mine"
    assert "Decay" in registered_families()


@pytest.mark.usefixtures("_undiscovered")
def test_an_entry_point_that_is_no_family_is_named(monkeypatch: pytest.MonkeyPatch):
    entry = EntryPoint("bad", "tests.families.layers:Decay", "")
    monkeypatch.setattr(_registry, "entry_points", lambda group: [entry])
    with pytest.raises(TypeError, match="expected a subclass of Family"):
        registered_families()
