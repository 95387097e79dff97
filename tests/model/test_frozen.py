"""Averages by hand in a finished model: which module each belongs to, and that it follows."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

from lightning_compressm import compress
from lightning_compressm.errors import UnsupportedLayerError
from lightning_compressm.model.frozen import choose_layers
from lightning_compressm.nn import LRU

from .test_copies import perturbed


def net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, 4), LRU(4, 16)).double()


class Critics(nn.Module):
    """Two networks that are built alike, and an average of each."""

    def __init__(self, distance: float) -> None:
        super().__init__()
        self.targets = nn.ModuleDict()
        for i in (1, 2):
            setattr(self, f"q{i}", net(i))
        for i in (2, 1):
            target = perturbed(deepcopy(getattr(self, f"q{i}")), distance)
            self.targets[f"t{i}"] = target.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q1(x) + self.q2(x)


def test_each_of_two_targets_follows_its_own_critic():
    model, x = Critics(1e-3), torch.randn(2, 30, 2).double()
    chosen = choose_layers(model, averages=["targets.*"])
    assert chosen.twins == {"targets.t1": "q1", "targets.t2": "q2"}
    before = [(model.targets[f"t{i}"](x) - getattr(model, f"q{i}")(x)).norm() for i in (1, 2)]
    compress(model, state_dim=6, averages=["targets.*"])
    for i, far in zip((1, 2), before, strict=True):
        critic, target = getattr(model, f"q{i}"), model.targets[f"t{i}"]
        assert target[1].d_state == critic[1].d_state == 6
        assert (target(x) - critic(x)).norm() < 1.5 * far


def test_an_average_that_could_be_of_two_is_refused():
    model = Critics(1e-3)
    model.targets["t1"].load_state_dict(net(3).state_dict())
    with pytest.raises(UnsupportedLayerError, match=r"may be an average of 'q[12]' or"):
        compress(model, state_dim=6, averages=["targets.*"])
    assert model.q1[1].d_state == model.targets["t2"][1].d_state == 16


def test_an_average_of_nothing_is_refused():
    model = nn.ModuleDict({"net": net(0), "ema": nn.Sequential(LRU(4, 12)).double()})
    with pytest.raises(UnsupportedLayerError, match=r"averages: 'ema.0': expected a trained layer"):
        compress(model, state_dim=6, averages=["ema.*"])


def test_a_frozen_copy_in_a_finished_model_is_refused_and_a_whole_frozen_model_is_not():
    model = nn.ModuleDict({"net": net(0), "ema": net(0).requires_grad_(False)})
    with pytest.raises(UnsupportedLayerError, match=r"averages=\['ema.\*'\]"):
        compress(model, state_dim=6)
    compress(model, state_dim=6, ignore=["ema.*"])
    assert [model[key][1].d_state for key in ("net", "ema")] == [6, 16]
    finished = model.requires_grad_(False)
    compress(finished, state_dim=4)
    assert [finished[key][1].d_state for key in ("net", "ema")] == [4, 4]


def test_patterns_of_averages_match_layers():
    with pytest.raises(ValueError, match="averages: the pattern 'emma' matches no SSM layer"):
        compress(net(0), state_dim=6, averages=["emma"])
