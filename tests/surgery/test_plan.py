"""Plans are data: they can be seen from a parent, merged, saved and sent to other processes."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
import torch
from torch import nn

from lightning_compressm.errors import SurgeryError
from lightning_compressm.nn import LRU
from lightning_compressm.surgery.apply import apply_plan
from lightning_compressm.surgery.plan import (
    Combine,
    Contract,
    Refill,
    Select,
    SurgeryPlan,
    TensorEdit,
)
from tests.deciding import decided
from tests.families.layers import PortedLRU
from tests.surgery.models import SelectCase

EVERY_RULE = SurgeryPlan(
    {
        "a": TensorEdit(torch.randn(2, 3), Select(0, torch.tensor([2, 0]))),
        "b": TensorEdit(torch.randn(2), Refill()),
        "c": TensorEdit(torch.randn(2), Contract(1, {"a": torch.randn(2, 3)})),
        "d": TensorEdit(
            torch.randn(2, dtype=torch.complex128),
            Combine(0, {":re": {"d:re": torch.randn(2, 4)}, ":im": {"d:im": torch.randn(2, 4)}}),
        ),
    },
    {"d_state": 2, "kind": "small", "state": torch.zeros(2)},
)


def _assert_same(a: Any, b: Any) -> None:
    if torch.is_tensor(a):
        assert torch.equal(a, b)
        assert a.dtype == b.dtype
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            _assert_same(a[key], b[key])
    else:
        assert type(a) is type(b)
        assert a == b


def _through_a_file(data: Any) -> Any:
    file = io.BytesIO()
    torch.save(data, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def _lru_plan() -> SurgeryPlan:
    return decided(nn.Sequential(LRU(3, 12)), state_dim=5).plan


def _port_plan() -> SurgeryPlan:
    return decided(nn.Sequential(PortedLRU(3, 2, 12)), state_dim=5).plan


@pytest.mark.parametrize(
    "make",
    [SurgeryPlan, lambda: EVERY_RULE, _lru_plan, _port_plan, lambda: SelectCase().plan()],
    ids=["empty", "every rule", "lru", "port", "select"],
)
def test_round_trip_through_a_checkpoint(make: Any):
    data = make().to_dict()
    _assert_same(_through_a_file(data), data)
    again = SurgeryPlan.from_dict(_through_a_file(data))
    _assert_same(again.to_dict(), data)
    assert bool(again) == bool(data["edits"])


def test_plans_in_a_checkpoint_hold_no_graph_and_plain_types():
    value = torch.ones(2, requires_grad=True) * 2
    data = SurgeryPlan({"a": TensorEdit(value)}, {"n": 2}).to_dict()
    assert not data["edits"]["a"]["value"].requires_grad
    del data["edits"]["a"]["value"]
    assert json.loads(json.dumps(data))["attributes"] == {"n": 2}


def test_a_reloaded_plan_does_the_same():
    torch.manual_seed(1)
    models = [nn.Sequential(LRU(3, 12)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    plan = decided(models[0], state_dim=5).plan
    apply_plan(models[0], plan)
    apply_plan(models[1], SurgeryPlan.from_dict(_through_a_file(plan.to_dict())))
    _assert_same(dict(models[0].state_dict()), dict(models[1].state_dict()))
    assert models[1][0].d_state == 5


def test_prefixed_renames_tensors_attributes_and_sources():
    plan = EVERY_RULE.prefixed("net.ssm")
    assert sorted(plan.edits) == ["net.ssm.a", "net.ssm.b", "net.ssm.c", "net.ssm.d"]
    assert sorted(plan.attributes) == ["net.ssm.d_state", "net.ssm.kind", "net.ssm.state"]
    contract, combine = (plan.edits[f"net.ssm.{n}"].moments for n in "cd")
    assert isinstance(contract, Contract)
    assert list(contract.weights) == ["net.ssm.a"]
    assert isinstance(combine, Combine)
    assert {part: list(s) for part, s in combine.parts.items()} == {
        ":re": ["net.ssm.d:re"],
        ":im": ["net.ssm.d:im"],
    }
    assert isinstance(plan.edits["net.ssm.b"].moments, Refill)
    assert EVERY_RULE.prefixed("") is EVERY_RULE
    assert sorted(EVERY_RULE.prefixed("b").prefixed("a").edits)[0] == "a.b.a"


def test_merge_joins_plans_of_different_layers():
    merged = SurgeryPlan.merge((name, EVERY_RULE) for name in ("x", "y"))
    assert len(merged.edits) == 8
    assert merged.attributes["y.d_state"] == 2
    assert not SurgeryPlan.merge([])


def test_merge_refuses_one_tensor_in_two_plans():
    with pytest.raises(SurgeryError, match=r"\['x.a', 'x.b', 'x.c', 'x.d'\] twice"):
        SurgeryPlan.merge([("x", EVERY_RULE)] * 2)


def test_a_plan_of_attributes_alone_counts():
    assert SurgeryPlan({}, {"d_state": 2})
    assert SurgeryPlan({"a": TensorEdit(torch.ones(1))})
    assert not SurgeryPlan()
