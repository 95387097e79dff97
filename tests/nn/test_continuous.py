"""What S4D and S5 have in common, against their equations."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_compressm.nn import S4D, S5
from lightning_compressm.nn._discretize import discretize
from tests.nn._reference import relative_error
from tests.nn.continuous import discretized, naive_s4d, naive_s5

LAYERS = [S4D, S5]
METHODS = ["zoh", "bilinear"]
LENGTHS = (1, 2, 3, 4, 5, 16, 17, 100, 787)
Layer = S4D | S5
both = pytest.mark.parametrize("kind", LAYERS)
discretizations = pytest.mark.parametrize("method", METHODS)


def make(
    kind: type[Layer], width: int, states: int, dtype: torch.dtype = torch.float64, **arguments: Any
) -> Any:
    torch.manual_seed(0)
    return kind(width, states, dtype=dtype, **arguments)


def naive(layer: Layer, inputs: Tensor) -> Tensor:
    return naive_s4d(layer, inputs) if isinstance(layer, S4D) else naive_s5(layer, inputs)


def assert_same(layer: Layer, inputs: Tensor, tolerance: float) -> None:
    """Compare output and all gradients with the plain equations in double precision."""
    actual, expected = layer(inputs), naive(layer, inputs)
    assert actual.dtype == inputs.dtype
    assert relative_error(actual, expected) < tolerance
    weight = torch.randn(expected.shape, dtype=actual.dtype)
    wanted = [inputs, *layer.parameters()]
    gradients = torch.autograd.grad(actual, wanted, weight)
    references = torch.autograd.grad(expected, wanted, weight.double())
    for gradient, reference in zip(gradients, references, strict=True):
        assert relative_error(gradient.double(), reference.double()) < tolerance


@discretizations
def test_discretization_is_the_textbooks(method: str):
    decay = torch.logspace(-3, 3, 7, dtype=torch.float64).view(-1, 1, 1)
    frequency = torch.tensor([-70.0, -1.0, 0.0, 1e-3, 40.0], dtype=torch.float64).view(-1, 1)
    step = torch.tensor([1e-3, 0.1, 1.0], dtype=torch.float64)
    re, im, gain_re, gain_im = discretize(decay, frequency, step, method)
    eigenvalues, gain = discretized(torch.complex(-decay, frequency), step, method)
    torch.testing.assert_close(torch.complex(re, im), eigenvalues, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(torch.complex(gain_re, gain_im), gain, rtol=1e-10, atol=1e-15)


def test_slow_states_keep_their_gain():
    """exp(z) - 1 would have no correct digit here; the gain is the step."""
    tiny = torch.full((1,), 1e-18, dtype=torch.float64)
    for method in METHODS:
        _, _, re, im = discretize(tiny, tiny, torch.ones(1, dtype=torch.float64), method)
        torch.testing.assert_close((re, im), (torch.ones_like(tiny), tiny), rtol=1e-9, atol=1e-17)


@discretizations
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 5e-5), (torch.float64, 1e-11), (torch.bfloat16, 0.02)]
)
@pytest.mark.parametrize("length", LENGTHS)
@both
def test_equals_its_equations(
    kind: type[Layer], length: int, dtype: torch.dtype, tolerance: float, method: str
):
    inputs = torch.randn(2, length, 3, dtype=dtype, requires_grad=True)
    assert_same(make(kind, 3, 5, dtype, discretization=method), inputs, tolerance)


@settings(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from(LAYERS),
    method=st.sampled_from(METHODS),
    batch=st.integers(1, 4),
    length=st.integers(1, 60),
    width=st.integers(1, 9),
    states=st.integers(1, 9),
)
def test_equals_its_equations_for_any_size(
    kind: type[Layer], method: str, batch: int, length: int, width: int, states: int
):
    inputs = torch.randn(batch, length, width, dtype=torch.float64, requires_grad=True)
    assert_same(make(kind, width, states, discretization=method), inputs, 1e-9)


@discretizations
@both
def test_gradcheck(kind: type[Layer], method: str):
    layer = make(kind, 2, 3, discretization=method)
    names, values = zip(*layer.named_parameters(), strict=True)

    def call(inputs: Tensor, *parameters: Tensor) -> Tensor:
        named = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(layer, named, (inputs,))

    inputs = torch.randn(2, 7, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(call, (inputs, *values))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@discretizations
@both
def test_steps_equal_the_sequence(kind: type[Layer], method: str, dtype: torch.dtype):
    layer = make(kind, 3, 6, dtype, discretization=method)
    inputs = torch.randn(4, 50, 3, dtype=dtype)
    state, outputs = layer.initial_state(4), []
    assert state.dtype == (torch.complex128 if dtype == torch.float64 else torch.complex64)
    assert not state.any()
    for u in inputs.unbind(1):
        y, state = layer.step(u, state)
        outputs.append(y)
    steps = torch.stack(outputs, 1)
    assert steps.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 0.02}[dtype]
    assert relative_error(steps.double(), layer(inputs).double()) < tolerance


@both
def test_gradients_of_steps(kind: type[Layer]):
    layer, inputs = make(kind, 2, 3), torch.randn(1, 6, 2, dtype=torch.float64)
    state, total = layer.initial_state(1), torch.zeros((), dtype=torch.float64)
    for u in inputs.unbind(1):
        y, state = layer.step(u, state)
        total = total + y.square().sum()
    steps = torch.autograd.grad(total, list(layer.parameters()))
    whole = torch.autograd.grad(layer(inputs).square().sum(), list(layer.parameters()))
    for a, b in zip(steps, whole, strict=True):
        torch.testing.assert_close(a, b)


@both
def test_autocast_computes_in_single_precision(kind: type[Layer]):
    layer, inputs = make(kind, 3, 6, torch.float32), torch.randn(2, 300, 3)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = layer(inputs)
        stepped, state = layer.step(inputs[:, 0], layer.initial_state(2))
        outputs.square().sum().backward()
    assert outputs.dtype == torch.float32
    assert state.dtype == torch.complex64
    assert torch.equal(outputs, layer(inputs))
    assert torch.equal(stepped, layer.step(inputs[:, 0], layer.initial_state(2))[0])
    gradients = [p.grad for p in layer.parameters()]
    layer.zero_grad()
    layer(inputs).square().sum().backward()
    for gradient, parameter in zip(gradients, layer.parameters(), strict=True):
        assert torch.equal(gradient, parameter.grad)


@both
def test_autocast_between_other_layers(kind: type[Layer]):
    model = nn.Sequential(nn.Linear(1, 3), make(kind, 3, 4, torch.float32), nn.Linear(3, 2))
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(torch.randn(2, 20, 1))
        assert outputs.dtype == torch.bfloat16
        outputs.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@both
def test_long_memory_in_single_precision(kind: type[Layer]):
    """Only the rounding of the parameters to float32 may show, so compare with those."""
    layer = make(kind, 2, 8, torch.float32, dt_min=1e-4, dt_max=1e-3)
    inputs = torch.randn(1, 4096, 2)
    assert relative_error(layer(inputs), naive(layer, inputs)) < 5e-6


@both
def test_a_state_without_memory_has_finite_gradients(kind: type[Layer]):
    """lambda = 0, which the bilinear transform reaches: there is no logarithm in the way."""
    layer = make(kind, 2, 3, torch.float32, discretization="bilinear")
    step, decay, frequency = (
        (layer.log_dt, layer.log_A_real, layer.A_imag)
        if isinstance(layer, S4D)
        else (layer.log_step, layer.log_Lambda_re, layer.Lambda_im)
    )
    with torch.no_grad():
        step.fill_(0.0)
        decay.copy_(torch.full_like(decay, 2.0).log())
        frequency.zero_()
    assert layer.eigenvalues.abs().max() < 1e-6
    layer(torch.randn(1, 9, 2)).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@both
def test_without_gradients(kind: type[Layer], mode: type):
    layer, inputs = make(kind, 3, 4), torch.randn(5, 40, 3, dtype=torch.float64)
    with mode():
        outputs = layer(inputs)
    assert not outputs.requires_grad
    torch.testing.assert_close(outputs, layer(inputs).detach())


@both
def test_layout_of_inputs_and_gradients_does_not_matter(kind: type[Layer]):
    layer, wide = make(kind, 3, 4), torch.randn(3, 20, 2, dtype=torch.float64, requires_grad=True)
    inputs = wide.permute(2, 1, 0)
    assert_same(layer, inputs, 1e-11)


@both
def test_empty_batch(kind: type[Layer]):
    outputs = make(kind, 2, 3)(torch.zeros(0, 5, 2, dtype=torch.float64))
    assert outputs.shape == (0, 5, 2)
    outputs.sum().backward()


@both
def test_deepcopy_and_pickle(kind: type[Layer]):
    layer, inputs = make(kind, 2, 3, torch.float32), torch.randn(2, 9, 2)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(inputs), layer(inputs))
        assert twin.D is not layer.D
        twin.load_state_dict(layer.state_dict())


@both
def test_a_smaller_checkpoint_resizes_the_layer(kind: type[Layer]):
    layer, smaller = make(kind, 2, 6), make(kind, 2, 4)
    layer.load_state_dict(smaller.state_dict())
    assert layer.d_state == 4
    inputs = torch.randn(1, 9, 2, dtype=torch.float64)
    assert torch.equal(layer(inputs), smaller(inputs))
    layer.reset_parameters()
    assert layer(inputs).isfinite().all()


@pytest.mark.slow
@pytest.mark.filterwarnings("error:Torchinductor does not support")
@both
def test_compiled_model_matches(kind: type[Layer]):
    model = nn.Sequential(nn.Linear(2, 3), make(kind, 3, 4, torch.float32), nn.Linear(3, 2))
    inputs = torch.randn(2, 30, 2)
    compiled = torch.compile(model)
    compiled(inputs).square().sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(inputs).square().sum().backward()
    torch.testing.assert_close(compiled(inputs), model(inputs))
    for gradient, parameter in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-5)


@both
def test_a_seed_gives_the_same_layer(kind: type[Layer]):
    first, second, other = make(kind, 3, 4), make(kind, 3, 4), kind(3, 4)
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(first.D.float(), other.D)
    torch.testing.assert_close(make(kind, 3, 4, torch.float32).D, first.D.float())


@both
def test_meta_device_then_materialised(kind: type[Layer]):
    layer = kind(3, 4, device="meta")
    assert all(p.is_meta for p in layer.parameters())
    assert layer(torch.empty(2, 10, 3, device="meta")).shape == (2, 10, 3)
    layer = layer.to_empty(device="cpu")
    torch.manual_seed(0)
    layer.reset_parameters()
    same = make(kind, 3, 4, torch.float32)
    assert all(
        torch.equal(a, b) for a, b in zip(layer.parameters(), same.parameters(), strict=True)
    )


@both
def test_steps_are_log_uniform(kind: type[Layer]):
    layer = make(kind, 4000, 1) if kind is S4D else make(kind, 1, 4000, blocks=4000)
    steps = layer.log_dt if kind is S4D else layer.log_step
    low, high = math.log(0.001), math.log(0.1)
    assert low <= steps.min() < low + 0.01
    assert high - 0.01 < steps.max() <= high
    assert steps.mean().item() == pytest.approx((low + high) / 2, abs=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"d_model": 0}, "d_model must be an integer >= 1, got 0"),
        ({"d_state": True}, "d_state must be an integer"),
        ({"d_state": 2.0}, "d_state must be an integer"),
        ({"dt_min": 0.0}, "0 < dt_min <= dt_max"),
        ({"dt_min": 1.0, "dt_max": 0.1}, "0 < dt_min <= dt_max"),
        ({"dt_max": math.inf}, "0 < dt_min <= dt_max"),
        ({"dt_min": math.nan}, "0 < dt_min <= dt_max"),
        ({"discretization": "euler"}, "expected one of zoh, bilinear, got 'euler'"),
    ],
)
@both
def test_bad_arguments(kind: type[Layer], arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        kind(**({"d_model": 2, "d_state": 3} | arguments))


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (S4D, {"init": "random"}, "init: expected one of lin, inv, quad, legs, got 'random'"),
        (S5, {"blocks": 2}, "blocks must divide d_state = 3, got 2"),
        (S5, {"blocks": 0}, "blocks must be an integer >= 1"),
    ],
)
def test_bad_arguments_of_one_layer(kind: type[Layer], arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        kind(2, 3, **arguments)


@both
def test_complex_parameters_are_refused(kind: type[Layer]):
    with pytest.raises(TypeError, match="real floating-point"):
        kind(2, 3, dtype=torch.complex64)


@pytest.mark.parametrize("shape", [(5, 2), (1, 5, 3), (1, 1, 5, 2), (1, 0, 2)])
@both
def test_bad_input_shapes(kind: type[Layer], shape: tuple[int, ...]):
    with pytest.raises(ValueError, match=rf"{kind.__name__} needs .*got"):
        kind(2, 3)(torch.zeros(shape))


@both
def test_bad_input_types(kind: type[Layer]):
    for dtype in (torch.int64, torch.complex64):
        with pytest.raises(TypeError, match="real floating-point inputs"):
            kind(2, 3)(torch.zeros(1, 5, 2, dtype=dtype))


@pytest.mark.parametrize(("kind", "wrong"), [(S4D, (4, 2, 2)), (S4D, (4, 3)), (S5, (4, 2))])
def test_bad_states(kind: type[Layer], wrong: tuple[int, ...]):
    layer = kind(2, 3)
    with pytest.raises(ValueError, match=r"state must have shape \(batch, .*N\) = "):
        layer.step(torch.zeros(4, 2), torch.zeros(wrong, dtype=torch.complex64))
    with pytest.raises(TypeError, match="state must be complex"):
        layer.step(torch.zeros(4, 2), layer.initial_state(4).real)
    with pytest.raises(ValueError, match="d_model = 2"):
        layer.step(torch.zeros(4, 3), layer.initial_state(4))


def _shapes(layer: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in layer.named_parameters()}


@pytest.mark.parametrize(
    ("build", "shapes"),
    [
        (S4D, {"log_dt": (3,), "log_A_real": (3, 5), "A_imag": (3, 5), "C": (3, 5, 2), "D": (3,)}),
        (
            S5,
            dict.fromkeys(("log_Lambda_re", "Lambda_im", "log_step"), (5,))
            | dict.fromkeys(("B_re", "B_im"), (5, 3))
            | dict.fromkeys(("C_re", "C_im"), (3, 5))
            | {"D": (3,)},
        ),
    ],
)
def test_parameters_and_attributes(
    build: Callable[[int, int], nn.Module], shapes: dict[str, tuple[int, ...]]
):
    layer = build(3, 5)
    assert _shapes(layer) == shapes
    assert not list(layer.buffers())
    assert all(p.dtype == torch.float32 for p in layer.parameters())
    assert (layer.d_model, layer.d_state) == (3, 5)
    assert repr(layer) == f"{type(layer).__name__}(d_model=3, d_state=5, discretization='zoh')"
