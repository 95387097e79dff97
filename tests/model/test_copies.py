"""Averaged copies of a model: found, and given the same projection."""

from __future__ import annotations

from contextlib import ExitStack
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from lightning_compressm import compress, find_ssm_layers
from lightning_compressm.errors import UnsupportedLayerError
from lightning_compressm.families import registered_families
from lightning_compressm.model.change import change
from lightning_compressm.model.copies import find_copies
from lightning_compressm.nn import LRU, S4D
from lightning_compressm.surgery.plan import SurgeryPlan
from tests.deciding import decided

FAMILIES = sorted(registered_families())


class Net(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: torch.Tensor) -> Any:
        out = self.layer(x)
        return out[0] if isinstance(out, tuple) else out


def perturbed(model: nn.Module, size: float) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(size * parameter.abs().mean() * noise)
    return model


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("refit", [True, False])
def test_an_average_stays_as_close_to_the_model_as_it_was(name: str, refit: bool) -> None:
    """The outputs of model and average differ by much the same before and after a cut."""
    torch.manual_seed(0)
    layer, inputs = registered_families()[name].example(d_state=8)
    model = Net(layer).double() if not any(p.is_complex() for p in layer.parameters()) else None
    assert model is not None
    inputs = inputs.double()
    average = AveragedModel(model)
    perturbed(average.module, 1e-3)
    with torch.no_grad():
        before = (model(inputs) - average.module(inputs)).norm()
    holder = nn.ModuleDict({"model": model, "average": average})
    holder.forward = model.forward  # type: ignore[method-assign]
    compress(holder, state_dim=6, sample=inputs, refit=refit, max_output_error=None)
    family = registered_families()[name]
    assert family.state_dim(average.module.layer) == 6 == family.state_dim(model.layer)
    with torch.no_grad():
        after = (model(inputs) - average.module(inputs)).norm()
    assert 0 < after < 3 * before


def test_averaging_goes_on_in_the_same_coordinates() -> None:
    """An average that catches up with a model at rest ends at the model."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4), LRU(4, 24)).double()
    average = AveragedModel(model, avg_fn=get_ema_avg_fn(0.5))
    average.update_parameters(model)
    perturbed(average.module, 1e-2)
    change(model, decided(model, state_dim=6).plan, averages=[average])
    x = torch.randn(2, 10, 2, dtype=torch.double)
    last = float((model(x) - average(x)).detach().norm())
    for _ in range(10):
        average.update_parameters(model)
        error = float((model(x) - average(x)).detach().norm())
        assert error < 0.7 * last
        last = error


def test_layers_of_an_average_are_not_reduced_on_their_own() -> None:
    model = nn.ModuleDict({"net": nn.Sequential(LRU(4, 8))})
    model["ema"] = AveragedModel(model["net"])
    assert list(find_ssm_layers(model)) == ["net.0"]
    report = compress(model, state_dim=3)
    assert [event.layer for event in report.events] == ["net.0"]
    assert model["ema"].module[0].d_state == 3


def test_what_counts_as_a_copy() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(LRU(4, 8)), S4D(4, 8))
    part = deepcopy(model[1])
    other = nn.Sequential(nn.Linear(4, 4), nn.Sequential(S4D(4, 8)), LRU(4, 8))
    candidates = [deepcopy(model), part, model, model[1], other, nn.ReLU(), "text", None]
    found = find_copies(model, candidates)
    assert [(copy.path, copy.root) for copy in found] == [("", candidates[0]), ("1", part)]


def test_undo_brings_model_and_average_back() -> None:
    model = nn.Sequential(LRU(4, 8))
    average = AveragedModel(model)
    before = [*model.parameters(), *average.parameters()]
    plan = decided(model, state_dim=3).plan
    undo = ExitStack()
    change(model, plan, averages=[average], undo=undo)
    assert (model[0].d_state, average.module[0].d_state) == (3, 3)
    undo.close()
    after = [*model.parameters(), *average.parameters()]
    assert all(a is b for a, b in zip(before, after, strict=True))
    assert (model[0].d_state, average.module[0].d_state) == (8, 8)


def test_a_family_that_does_not_say_how_copies_follow_is_refused_first() -> None:
    model = nn.Sequential(LRU(4, 8))
    average = AveragedModel(model)
    plan = decided(model, state_dim=3).plan
    silent = SurgeryPlan(plan.edits, plan.attributes)
    with pytest.raises(UnsupportedLayerError, match=r"'0\.nu_log' is reduced, but its family"):
        change(model, silent, averages=[average])
    assert model[0].d_state == 8
    change(model, silent)
    assert model[0].d_state == 3


def test_a_plan_with_projections_survives_a_file(tmp_path: Any) -> None:
    model = nn.Sequential(LRU(4, 8)).double()
    average = AveragedModel(model)
    plan = decided(model, state_dim=3).plan
    torch.save(plan.to_dict(), tmp_path / "plan.pt")
    loaded = SurgeryPlan.from_dict(torch.load(tmp_path / "plan.pt", weights_only=True))
    change(model, loaded, averages=[average])
    x = torch.randn(2, 10, 4, dtype=torch.double)
    torch.testing.assert_close(model(x), average(x), rtol=1e-9, atol=1e-12)
