"""Which parameters get longer steps, by how much, and what of it is saved."""

from __future__ import annotations

import pickle
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Adagrad, AdamW, NAdam, Optimizer

from lightning_compressm.errors import CheckpointError
from lightning_compressm.families import registered_families
from lightning_compressm.model.layers import select_layers
from lightning_compressm.reduction.decide import decide
from lightning_compressm.reduction.policy import ReductionPolicy
from lightning_compressm.reduction.recorder import CallRecorder
from lightning_compressm.surgery import learning_speed
from lightning_compressm.surgery.learning_speed import LearningSpeed, state_parameters
from lightning_compressm.surgery.plan import SurgeryPlan, TensorEdit

STATES = {
    "LRU": {"nu_log", "theta_log", "gamma_log", "B_re", "B_im", "C_re", "C_im"},
    "S4": {"A_real", "A_imag", "B", "P", "C"},
    "S4D": {"log_A_real", "A_imag", "C"},
    "S4D kernel": {"A_real", "A_imag", "B", "C"},
    "S5": {"log_Lambda_re", "Lambda_im", "log_step", "B_re", "B_im", "C_re", "C_im"},
    # Their projections hold rows of other things beside those of the states.
    "Mamba": {"A_log"},
    "Mamba, B and C normalised": {"A_log", "b_layernorm.weight", "c_layernorm.weight"},
    "Mamba-2": set(),
    "Zamba": {"A_log"},
}


@pytest.mark.parametrize("name", STATES)
def test_parameters_that_consist_of_states(name: str):
    torch.manual_seed(0)
    layer, x = registered_families()[name].example()
    model = nn.ModuleDict({"layer": layer, "layers": nn.Linear(4, 8)})
    found = select_layers(model)
    with CallRecorder(found) as recorder:
        layer(x)
    plan = decide(model, found, ReductionPolicy(state_dim=4), recorder.seen).plan
    other = SurgeryPlan({"layers.weight": TensorEdit(torch.zeros(4, 4))})
    names = state_parameters(model, SurgeryPlan.merge([("", plan), ("", other)]), "layer", 8, 4)
    assert set(names) == {f"layer.{own}" for own in STATES[name]}


def test_a_tensor_that_keeps_its_shape_is_none_of_them():
    layer = nn.Linear(4, 8)
    plan = SurgeryPlan({"weight": TensorEdit(torch.zeros(8, 4)), "bias": TensorEdit(torch.ones(4))})
    assert state_parameters(layer, plan, "", 8, 4) == ["bias"]


class Two(nn.Module):
    """A parameter of states, and one that trains at another rate."""

    def __init__(self) -> None:
        super().__init__()
        self.states = nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.other = nn.Parameter(torch.ones(3, dtype=torch.float64))

    def groups(self, rate: float = 0.4) -> list[dict[str, Any]]:
        return [{"params": [self.states], "lr": 0.1}, {"params": [self.other], "lr": rate}]

    def backward(self) -> None:
        (self.states * self.other).sum().backward()


def moved(optimizer: Optimizer, model: Two) -> Tensor:
    model.zero_grad()
    model.backward()
    before = model.states.detach().clone()
    optimizer.step()
    return model.states.detach() - before


def following(now: int = 2, full: int = 16) -> LearningSpeed:
    speed = LearningSpeed()
    speed.follow(["states"], full, now)
    return speed


@pytest.mark.parametrize(("rate", "factor"), [(0.4, 4), (3.2, 8), (0.05, 1), (0.0, 1)])
@pytest.mark.parametrize("own", [0.1, 0.0])
def test_rates_that_stay_on_a_device(
    rate: float, own: float, factor: float, monkeypatch: pytest.MonkeyPatch
):
    """Those of a CPU are read; here they are not, as on a device, where reading would wait."""
    monkeypatch.setattr(learning_speed, "_rate", lambda group: group["lr"])
    ends = []
    for speed in (following(), LearningSpeed()):
        model = Two()
        groups = [
            g | {"lr": torch.tensor(g["lr"], dtype=torch.float64)} for g in model.groups(rate)
        ]
        groups[0]["lr"].fill_(own)
        optimizer = AdamW(groups, foreach=False)
        speed.attach(model, [optimizer])
        ends.append(moved(optimizer, model))
    torch.testing.assert_close(ends[0], (factor if own else 1) * ends[1], rtol=1e-12, atol=0)
    assert torch.equal(*ends) == (factor == 1 or own == 0)


def test_groups_that_train_nothing_set_no_limit():
    model = Two()
    model.other.requires_grad_(False)
    speed = following()
    speed.attach(model, [AdamW([*model.groups(), {"params": [], "lr": 1.0}])])
    assert speed.factors() == {}
    model.other.requires_grad_(True)
    assert speed.factors() == {"states": 4.0}


@pytest.mark.parametrize(("other", "factor"), [(NAdam, 4.0), (Adagrad, None)])
def test_only_rates_of_one_unit_are_compared(other: Any, factor: float | None):
    model, speed = Two(), following()
    own, rest = model.groups()
    speed.attach(model, [AdamW([own]), other([rest])])
    assert speed.factors().get("states") == factor


def test_states_that_come_back_end_it():
    speed = following(now=4, full=8)
    speed.follow(["states"], 4, 2)
    assert speed.state_dict() == {"states": [8, 2]}
    speed.follow(["states"], 2, 4)
    assert speed.state_dict() == {"states": [8, 4]}
    speed.follow(["states"], 4, 8)
    assert speed.state_dict() == {}


def test_a_parameter_put_in_the_place_of_another_is_followed():
    model, speed = Two(), following()
    optimizer = AdamW(model.groups())
    speed.attach(model, [optimizer])
    model.states = nn.Parameter(torch.ones(2, dtype=torch.float64))
    assert speed.factors() == {}
    optimizer.param_groups[0]["params"][:] = [model.states]
    assert speed.factors() == {"states": 4.0}


def test_copies_are_attached_to_nothing():
    model, speed = Two(), following()
    optimizer = AdamW(model.groups())
    speed.attach(model, [optimizer])
    for copy in (deepcopy(speed), pickle.loads(pickle.dumps(speed))):
        assert copy.state_dict() == speed.state_dict()
        assert copy.factors() == {}
    own, plain = deepcopy((model, optimizer)), Two()
    assert torch.equal(moved(own[1], own[0]), moved(AdamW(plain.groups()), plain))
    assert pickle.loads(pickle.dumps(optimizer)).param_groups[0]["lr"] == 0.1
    speed.attach(model, [optimizer])  # again, as a second fit does: not twice as long
    twice = moved(optimizer, model)
    once, other = Two(), following()
    alone = AdamW(once.groups())
    other.attach(once, [alone])
    assert torch.equal(twice, moved(alone, once))


def test_an_exception_inside_a_step_is_forgotten():
    model, speed = Two(), following()
    optimizer = AdamW(model.groups())
    speed.attach(model, [optimizer])

    def fails() -> float:
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        optimizer.step(fails)
    with torch.no_grad():
        model.states += 1.0  # between two steps, so no part of an update
    assert moved(optimizer, model).abs().max() < 1


def test_names_of_another_model_are_refused():
    speed = LearningSpeed()
    speed.load_state_dict({"net.states": [8, 2]})
    model = Two()
    optimizer = AdamW(model.groups())
    with pytest.raises(CheckpointError, match=r"got \['net.states'\], which it has not"):
        speed.attach(model, [optimizer])
    assert not optimizer._optimizer_step_pre_hooks
