"""Optimizer state through a change of basis, tensor by tensor, against plain linear algebra."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_compressm.surgery.apply import Replacement
from lightning_compressm.surgery.moments import transport_states, truncate_state
from lightning_compressm.surgery.plan import (
    Combine,
    Contract,
    MomentRule,
    Refill,
    Select,
    TensorEdit,
)

OLD, NEW, WIDTH = 6, 2, 3


def _replacement(rule: MomentRule, dim: int = 0, *, dtype: Any = None) -> Replacement:
    shapes = [(n, WIDTH) if dim == 0 else (WIDTH, n) for n in (OLD, NEW)]
    old, new = (torch.randn(shape, dtype=dtype) for shape in shapes)
    return Replacement(old, new, TensorEdit(new, rule))


def _one(rule: MomentRule, state: dict[str, Any], dim: int = 0) -> dict[str, Any] | None:
    return transport_states({"w": _replacement(rule, dim)}, {"w": state}).get("w")


@pytest.mark.parametrize("dim", [0, 1])
def test_gradients_follow_the_matrix_and_their_squares_its_square(dim: int):
    matrix = torch.randn(NEW, OLD, dtype=torch.float64)
    shape = (OLD, WIDTH) if dim == 0 else (WIDTH, OLD)
    m, v = torch.randn(shape), torch.rand(shape)
    state = _one(Combine(dim, {"": {"w": matrix}}), {"exp_avg": m, "exp_avg_sq": v}, dim)

    def apply(a: Tensor, x: Tensor) -> Tensor:
        return (a @ x.double() if dim == 0 else x.double() @ a.mT).float()

    torch.testing.assert_close(state["exp_avg"], apply(matrix, m))
    torch.testing.assert_close(state["exp_avg_sq"], apply(matrix.square(), v))
    assert state["exp_avg"].dtype == torch.float32
    assert state["exp_avg"].is_contiguous()


def test_several_sources_add_up_and_missing_ones_count_nothing():
    a, b = (torch.randn(NEW, OLD, dtype=torch.float64) for _ in range(2))
    rule = Combine(0, {"": {"w": a, "u": b, "frozen": b}})
    replaced = {name: _replacement(rule) for name in ("w", "u")}
    m = {name: torch.randn(OLD, WIDTH) for name in ("w", "u")}
    states = transport_states(replaced, {name: {"exp_avg": m[name]} for name in m})
    expected = (a @ m["w"].double() + b @ m["u"].double()).float()
    torch.testing.assert_close(states["w"]["exp_avg"], expected)
    torch.testing.assert_close(states["u"]["exp_avg"], expected)


def test_complex_moments_mix_their_parts():
    re, im = (torch.randn(NEW, OLD, dtype=torch.float64) for _ in range(2))
    rule = Combine(0, {":re": {"w:re": re, "w:im": -im}, ":im": {"w:re": im, "w:im": re}})
    m = torch.randn(OLD, WIDTH, dtype=torch.complex128)
    replaced = {"w": _replacement(rule, dtype=torch.complex128)}
    state = transport_states(replaced, {"w": {"exp_avg": m}})["w"]
    torch.testing.assert_close(state["exp_avg"], torch.complex(re, im) @ m)


def test_a_state_made_of_nothing_starts_from_the_mean():
    """A padded state comes from no old one: a second moment of zero would make its steps huge."""
    matrix = torch.eye(NEW, OLD, dtype=torch.float64)
    matrix[1] = 0
    v = torch.rand(OLD, WIDTH)
    state = _one(Combine(0, {"": {"w": matrix}}), {"exp_avg": v, "exp_avg_sq": v})
    torch.testing.assert_close(state["exp_avg_sq"][0], v[0])
    torch.testing.assert_close(state["exp_avg_sq"][1], v.mean().expand(WIDTH))
    assert not state["exp_avg"][1].any()


def test_averages_over_the_changed_dimension_stay():
    """Adafactor keeps one average over rows, one over columns."""
    matrix = torch.randn(NEW, OLD, dtype=torch.float64)
    row, column = torch.rand(OLD, 1), torch.rand(1, WIDTH)
    state = _one(Combine(0, {"": {"w": matrix}}), {"row_var": row, "col_var": column})
    torch.testing.assert_close(state["row_var"], (matrix.square() @ row.double()).float())
    assert torch.equal(state["col_var"], column)


def test_contraction_is_the_chain_rule_of_a_gain():
    weights, m = torch.randn(NEW, WIDTH, dtype=torch.float64), torch.randn(OLD, WIDTH)
    matrix = torch.randn(NEW, OLD, dtype=torch.float64)
    old, new = torch.randn(OLD), torch.randn(NEW)
    replaced = {
        "gain": Replacement(old, new, TensorEdit(new, Contract(1, {"w": weights}))),
        "w": _replacement(Combine(0, {"": {"w": matrix}})),
    }
    v = torch.rand(OLD)
    states = transport_states(
        replaced, {"gain": {"exp_avg": old, "exp_avg_sq": v}, "w": {"exp_avg": m}}
    )
    expected = (weights * (matrix @ m.double())).sum(1)
    torch.testing.assert_close(states["gain"]["exp_avg"].double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(states["gain"]["exp_avg_sq"], (2 * v.mean()).expand(NEW))


def test_refilling():
    v = torch.rand(OLD, WIDTH)
    state = _one(
        Refill(), {"exp_avg": v - 0.5, "exp_avg_sq": v, "step_size": v, "momentum_buffer": v}
    )
    assert not state["exp_avg"].any()
    assert not state["momentum_buffer"].any()
    torch.testing.assert_close(state["exp_avg_sq"], (2 * v.mean()).expand(NEW, WIDTH))
    torch.testing.assert_close(state["step_size"], v.mean().expand(NEW, WIDTH))


def test_averaged_weights_become_the_new_weights():
    replacement = _replacement(Refill())
    state = transport_states({"w": replacement}, {"w": {"ax": torch.randn(OLD, WIDTH)}})["w"]
    assert torch.equal(state["ax"], replacement.new)
    assert state["ax"] is not replacement.new


def test_state_of_unknown_optimizers_is_sliced_or_started_anew():
    """Schedule-free optimizers keep a point of the weights' own space, for one."""
    state = {"exp_avg_sq": torch.rand(OLD, WIDTH), "z": torch.randn(OLD, WIDTH)}
    kept = _one(Select(0, torch.tensor([4, 1])), state)
    assert torch.equal(kept["z"], state["z"][[4, 1]])
    matrix = torch.randn(NEW, OLD, dtype=torch.float64)
    for rule in (Refill(), Combine(0, {"": {"w": matrix}})):
        assert _one(rule, state) is None


def test_moments_of_optimizers_like_adam_are_known_by_their_names():
    signed, positive = torch.randn(OLD, WIDTH), torch.rand(OLD, WIDTH)
    state = _one(Refill(), {"exp_avg_slow": signed, "exp_avg_slow_sq": positive})
    assert not state["exp_avg_slow"].any()
    torch.testing.assert_close(state["exp_avg_slow_sq"], (2 * positive.mean()).expand(NEW, WIDTH))


@pytest.mark.parametrize(
    "value", [torch.ones(5), torch.ones(OLD), torch.ones(OLD + 1, WIDTH), torch.ones(1, OLD, WIDTH)]
)
def test_state_of_another_shape_is_dropped_with_its_parameter(value: Tensor):
    moments = {"step": torch.tensor(4.0), "exp_avg": torch.ones(OLD, WIDTH), "odd": value}
    for rule in (Refill(), Select(0, torch.arange(NEW))):
        assert _one(rule, moments) is None
    assert truncate_state(_replacement(Refill()), moments) is None


def test_counters_and_flags_are_kept_as_copies():
    step = torch.tensor(7.0)
    moments = {"step": step, "ready": True, "buffer": None, "scale": torch.ones(1)}
    for state in (_one(Refill(), moments), truncate_state(_replacement(Refill()), moments)):
        assert state["step"] == 7
        assert state["step"] is not step
        assert (state["ready"], state["buffer"], state["scale"]) == (True, None, torch.ones(1))


def test_truncation_slices_whatever_the_basis():
    m = torch.randn(OLD, WIDTH)
    state = truncate_state(_replacement(Refill()), {"exp_avg": m, "row_var": m[:, :1]})
    assert torch.equal(state["exp_avg"], m[:NEW])
    assert torch.equal(state["row_var"], m[:NEW, :1])
    state["exp_avg"].zero_()
    assert m[:NEW].any()
