"""The selective scan against a plain loop: outputs and every gradient."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compressm.nn import _selective, selective_scan
from lightning_compressm.nn._dual import state_space_dual
from lightning_compressm.nn._mamba import _convolved
from lightning_compressm.nn._softplus import softplus
from tests.nn._reference import relative_error
from tests.nn._selective_reference import naive_dual, naive_selective

BATCH, DIM, STATES = 2, 4, 3
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")


def arguments(
    length: int,
    form_b: str = "shared",
    form_c: str = "shared",
    batch: int = BATCH,
    dim: int = DIM,
    states: int = STATES,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    forms = {
        "shared": (batch, states, length),
        "groups": (batch, 2, states, length),
        "constant": (dim, states),
    }
    shapes = {
        "u": (batch, dim, length),
        "delta": (batch, dim, length),
        "A": (dim, states),
        "B": forms[form_b],
        "C": forms[form_c],
        "D": (dim,),
        "z": (batch, dim, length),
        "delta_bias": (dim,),
        "initial_state": (batch, dim, states),
    }
    values = {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}
    values["A"] = -2 * torch.rand(dim, states, dtype=dtype)
    return {name: value.requires_grad_() for name, value in values.items()}


def gradients(function: Callable[..., Any], given: dict[str, Tensor]) -> dict[str, Tensor]:
    y, last = function(**given, delta_softplus=True)
    torch.manual_seed(1)
    # The layouts in memory differ, and randn_like would follow them.
    weights = [torch.randn(t.shape, dtype=torch.float64).to(t.dtype) for t in (y, last)]
    loss = (y * weights[0]).sum() + (last * weights[1]).sum()
    found = torch.autograd.grad(loss, list(given.values()))
    return {"y": y, "last": last, **dict(zip(given, found, strict=True))}


def ours(**given: Any) -> Any:
    return selective_scan(**given, return_last_state=True)


@pytest.mark.parametrize("form_c", ["shared", "groups", "constant"])
@pytest.mark.parametrize("form_b", ["shared", "groups", "constant"])
def test_outputs_and_all_gradients_equal_the_loop(form_b: str, form_c: str):
    given = arguments(70, form_b, form_c)
    expected = gradients(naive_selective, given)
    for name, value in gradients(ours, given).items():
        assert value.shape == expected[name].shape
        assert relative_error(value, expected[name]) < 1e-12, name


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 64, 97])
def test_every_length(length: int):
    given = arguments(length)
    expected = gradients(naive_selective, given)
    for name, value in gradients(ours, given).items():
        assert relative_error(value, expected[name]) < 1e-12, name


def test_float32_against_float64():
    given = arguments(300, dtype=torch.float32)
    wide = {n: v.detach().double().requires_grad_() for n, v in given.items()}
    expected = gradients(naive_selective, wide)
    for name, value in gradients(ours, given).items():
        assert value.dtype == torch.float32
        assert relative_error(value.double(), expected[name]) < 1e-5, name


@pytest.mark.parametrize("without", [("D",), ("z",), ("delta_bias",), NAMES[5:]])
def test_optional_arguments(without: tuple[str, ...]):
    given = {n: v for n, v in arguments(40).items() if n not in without}
    y, last = ours(**given)
    expected_y, expected_last = naive_selective(**given)
    assert relative_error(y, expected_y) < 1e-12
    assert relative_error(last, expected_last) < 1e-12
    assert torch.equal(selective_scan(**given), y)


def test_step_sizes_without_softplus():
    given = arguments(40)
    given["delta"] = given["delta"].detach().abs()
    del given["delta_bias"]
    assert relative_error(ours(**given)[0], naive_selective(**given)[0]) < 1e-12


def test_gradcheck():
    given = arguments(5, batch=1, dim=2, states=2)
    function = lambda *v: selective_scan(  # noqa: E731
        **dict(zip(NAMES, v, strict=True)), delta_softplus=True, return_last_state=True
    )
    assert torch.autograd.gradcheck(function, tuple(given.values()))


def test_two_halves_make_the_whole():
    given = {n: v.detach() for n, v in arguments(50).items()}
    y, last = ours(**given)
    along = ("u", "delta", "B", "C", "z")
    first = {n: v[..., :20] if n in along else v for n, v in given.items()}
    second = {n: v[..., 20:] if n in along else v for n, v in given.items()}
    y_first, second["initial_state"] = ours(**first)
    y_second, last_second = ours(**second)
    assert relative_error(torch.cat([y_first, y_second], -1), y) < 1e-12
    assert relative_error(last_second, last) < 1e-12


def test_batches_that_are_cut_into_blocks(monkeypatch: pytest.MonkeyPatch):
    given = arguments(70, "groups", "constant", batch=5)
    whole = gradients(ours, given)
    monkeypatch.setattr(_selective, "_blocks", lambda t: [slice(0, 2), slice(2, 4), slice(4, 5)])
    for name, value in gradients(ours, given).items():
        assert relative_error(value, whole[name]) < 1e-13, name


def test_autocast_computes_in_float32():
    given = {n: v.detach().float().requires_grad_() for n, v in arguments(60).items()}
    plain = gradients(ours, given)
    with torch.autocast("cpu", torch.bfloat16):
        inside = gradients(ours, given)
    for name, value in plain.items():
        assert torch.equal(inside[name], value), name


def test_half_precision_inputs_give_half_precision_outputs():
    given = arguments(40)
    half = {n: v.detach().bfloat16() for n, v in given.items()}
    y, last = ours(**half)
    expected = naive_selective(**{n: v.double() for n, v in half.items()})
    assert y.dtype == torch.bfloat16
    assert last.dtype == torch.float32
    assert relative_error(y.double(), expected[0]) < 1e-2
    assert relative_error(last.double(), expected[1]) < 1e-5


def test_one_float64_argument_makes_the_computation_float64():
    given = {n: v.detach().float() for n, v in arguments(40).items()}
    wide = {n: v.double() for n, v in given.items()}
    mixed = {**given, "A": wide["A"]}
    y, last = ours(**mixed)
    assert y.dtype == torch.float32
    assert relative_error(last, naive_selective(**wide)[1]) < 1e-12


def test_strided_and_expanded_inputs():
    given = {n: v.detach() for n, v in arguments(40).items()}
    y, _ = ours(**given)
    strided = {n: v.mT.contiguous().mT if v.ndim >= 2 else v for n, v in given.items()}
    assert not strided["u"].is_contiguous()
    assert torch.equal(ours(**strided)[0], y)
    given["delta"] = given["delta"][:, :1, :1].expand_as(given["u"])
    assert relative_error(ours(**given)[0], naive_selective(**given)[0]) < 1e-12


def test_states_are_kept_only_at_the_start_of_chunks():
    length, dim, states = 256, 64, 256
    given = arguments(length, batch=1, dim=dim, states=states, dtype=torch.float32)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.nbytes) or t, lambda t: t
    ):
        y = selective_scan(**given)
    y.sum().backward()
    assert 0 < sum(kept) < length * dim * states * 4 / 8, "an eighth of all states"


def test_second_derivatives_are_refused():
    given = arguments(5)
    y = selective_scan(**given)
    (first,) = torch.autograd.grad(y.sum(), given["A"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_time_grows_with_the_length_and_not_with_its_square():
    """An indexing loop in autograd takes 64 times as long for 8 times the length."""

    def seconds(length: int) -> float:
        given = arguments(length, batch=1, dim=16, states=16, dtype=torch.float32)
        times = []
        for _ in range(3):
            start = time.process_time()
            selective_scan(**given).sum().backward()
            times.append(time.process_time() - start)
        return min(times)

    seconds(512)
    assert seconds(4096) < 24 * seconds(512)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"u": torch.ones(2, 4)}, ValueError, r"\(batch, dim, L\)"),
        ({"u": torch.ones(2, 4, 0)}, ValueError, "L >= 1"),
        ({"delta": torch.ones(2, 4, 9)}, ValueError, r"delta must .*\(2, 4, 8\).*got \(2, 4, 9\)"),
        ({"A": torch.ones(3, 3)}, ValueError, r"A must .*dim = 4.*got \(3, 3\)"),
        ({"B": torch.ones(2, 3, 9)}, ValueError, r"B must .*\(2, 3, 8\).*got \(2, 3, 9\)"),
        ({"C": torch.ones(2, 3, 3, 8)}, ValueError, "G divides dim = 4"),
        ({"D": torch.ones(3)}, ValueError, r"D must have shape \(dim,\)"),
        ({"z": torch.ones(2, 3, 8)}, ValueError, "z must have shape"),
        ({"delta_bias": torch.ones(1)}, ValueError, "delta_bias must have shape"),
        ({"initial_state": torch.ones(2, 4, 2)}, ValueError, "initial_state must have shape"),
        ({"A": torch.ones(4, 3, dtype=torch.complex64)}, TypeError, "linear_recurrence"),
        ({"u": torch.ones(2, 4, 8, dtype=torch.int64)}, TypeError, "floating point"),
        (
            {"B": torch.ones(2, 2, 3, 8), "C": torch.ones(2, 4, 3, 8)},
            ValueError,
            "same number of groups",
        ),
    ],
)
def test_refusals(change: dict[str, Tensor], error: type[Exception], words: str):
    given = {n: v.detach().float() for n, v in arguments(8).items()}
    with pytest.raises(error, match=words):
        selective_scan(**{**given, **change})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_softplus_is_exact_where_it_is_tiny_and_where_it_is_large(dtype: torch.dtype):
    values = torch.cat([torch.linspace(-80, 80, 2001), torch.tensor([-1e4, 1e4])]).to(dtype)
    values.requires_grad_()
    wide = values.detach().double().requires_grad_()
    expected = torch.log1p(torch.exp(-wide.abs())) + wide.clamp(min=0)
    error = (softplus(values).double() - expected).abs() / expected.clamp(min=1e-300)
    assert error.max() < 4 * torch.finfo(dtype).eps
    (slope,) = torch.autograd.grad(softplus(values).sum(), values)
    assert torch.allclose(slope, torch.sigmoid(values.detach()), atol=0)
    near = torch.linspace(-5, 5, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(softplus, near)


@pytest.mark.parametrize("states", [16, 64])
def test_decays_that_underflow(states: int):
    """Rates 1 .. N at step sizes near one: most of the decays are denormal or zero."""
    given = arguments(40, states=states, dtype=torch.float32)
    given["A"] = -torch.arange(1.0, states + 1).mul(4).expand(DIM, states).contiguous()
    given["A"].requires_grad_()
    wide = {n: v.detach().double().requires_grad_() for n, v in given.items()}
    expected = gradients(naive_selective, wide)
    for name, value in gradients(ours, given).items():
        assert relative_error(value.double(), expected[name]) < 1e-5, name


@pytest.mark.parametrize("time", [0, 1])
@pytest.mark.parametrize("length", [1, 2, 9])
def test_convolution_with_channels_last_is_that_of_the_layer(length: int, time: int):
    layer = nn.Conv1d(4, 4, 3, groups=4, padding=2).double()
    inputs = torch.randn(2, length, 4, dtype=torch.float64, requires_grad=True)
    given = [inputs, *layer.parameters()]
    expected = layer(inputs.mT)[..., :length].mT
    weights = torch.randn(expected.shape, dtype=torch.float64)
    found = _convolved(inputs.transpose(1, time), layer, time).transpose(1, time)
    assert relative_error(found, expected) < 1e-14
    pairs = [torch.autograd.grad((y * weights).sum(), given) for y in (found, expected)]
    for value, want in zip(*pairs, strict=True):
        assert relative_error(value, want) < 1e-13


@pytest.mark.parametrize("states", [5, 32, 33])
def test_dual_chooses_a_chunk_by_itself(states: int):
    shapes = [(2, 100, 4, 3), (2, 100, 4), (4,), *[(2, 100, 2, states)] * 2]
    x, dt, A, B, C = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    given = [x, dt.abs(), -A.abs(), B, C]
    expected, last = state_space_dual(*given, chunk_size=7)
    found, found_last = state_space_dual(*given)
    assert relative_error(found, expected) < 1e-12
    assert relative_error(found_last, last) < 1e-12


def dual_arguments(length: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    shapes = [(2, length, 4, 3), (2, length, 4), (4,), *[(2, length, 2, 5)] * 2, (2, 4, 3, 5)]
    values = [torch.randn(shape, dtype=dtype) for shape in shapes]
    values[1], values[2] = values[1].abs(), -values[2].abs()
    return [value.requires_grad_() for value in values]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", [1, 7, 8, 29])
def test_dual_equals_the_loop(length: int, packed: bool):
    given = dual_arguments(length)
    seq_idx = torch.randint(0, 3, (2, length)).sort(1).values if packed else None
    y, last = state_space_dual(*given[:5], initial_states=given[5], seq_idx=seq_idx, chunk_size=8)
    expected, expected_last = naive_dual(*given, seq_idx)
    assert relative_error(y, expected) < 1e-12
    assert relative_error(last, expected_last) < 1e-12
    weights = torch.randn_like(y), torch.randn_like(last)
    found, wanted = (
        torch.autograd.grad((a * weights[0]).sum() + (b * weights[1]).sum(), given)
        for a, b in ((y, last), (expected, expected_last))
    )
    for value, want in zip(found, wanted, strict=True):
        assert relative_error(value, want) < 1e-11


def test_dual_biases_limits_skip_and_gate():
    x, dt, A, B, C, start = (t.detach() for t in dual_arguments(20))
    bias, D, z = torch.randn(4).double(), torch.randn(4).double(), torch.randn_like(x)
    step = F.softplus(dt + bias).clamp(0.5, 1.0)
    expected, _ = naive_dual(x, step, A, B, C, start, None)
    gate = z * torch.sigmoid(z)
    for skip in (D, D[:, None].expand(-1, 3)):
        y, _ = state_space_dual(x, dt, A, B, C, skip, z, bias, True, (0.5, 1.0), start)
        assert relative_error(y, (expected + D[:, None] * x) * gate) < 1e-12


def test_dual_survives_strong_decay():
    """Quotients of cumulative products would be 0 / 0 here."""
    given = [t.detach() for t in dual_arguments(200, torch.float32)]
    given[2] = torch.full((4,), -100.0)
    y, last = state_space_dual(*given[:5], initial_states=given[5])
    expected, _ = naive_dual(*(t.double() for t in given), None)
    assert y.isfinite().all()
    assert last.isfinite().all()
    assert relative_error(y.double(), expected) < 1e-4
