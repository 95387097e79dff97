"""The LRU layer against its equations."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_compressm.nn import LRU, _row_blocks
from tests.nn._reference import naive_lru, relative_error

NAMES = ("nu_log", "theta_log", "gamma_log", "B_re", "B_im", "C_re", "C_im", "D")
LENGTHS = (1, 2, 3, 7, 16, 17, 63, 64, 100, 787)


def make(width: int, states: int, dtype: torch.dtype = torch.float64, **arguments: float) -> LRU:
    torch.manual_seed(0)
    return LRU(width, states, dtype=dtype, **arguments)


def assert_same(layer: LRU, inputs: Tensor, tolerance: float) -> None:
    """Compare output and all gradients with the plain equations in double precision."""
    actual, expected = layer(inputs), naive_lru(layer, inputs)
    assert actual.dtype == inputs.dtype
    assert relative_error(actual, expected) < tolerance
    weight = torch.randn(expected.shape, dtype=expected.dtype)
    wanted = [inputs, *layer.parameters()]
    gradients = torch.autograd.grad(actual, wanted, weight.to(actual.dtype))
    references = torch.autograd.grad(expected, wanted, weight)
    for gradient, reference in zip(gradients, references, strict=True):
        assert relative_error(gradient.double(), reference.double()) < tolerance


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 5e-5), (torch.float64, 1e-11), (torch.bfloat16, 0.02)]
)
@pytest.mark.parametrize("length", LENGTHS)
def test_equals_its_equations(length: int, dtype: torch.dtype, tolerance: float):
    inputs = torch.randn(2, length, 3, dtype=dtype, requires_grad=True)
    assert_same(make(3, 5, dtype), inputs, tolerance)


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 5),
    length=st.integers(1, 60),
    width=st.integers(1, 12),
    states=st.integers(1, 9),
    block=st.integers(1, 20_000),
)
def test_equals_its_equations_for_any_size(
    batch: int, length: int, width: int, states: int, block: int
):
    inputs = torch.randn(batch, length, width, dtype=torch.float64, requires_grad=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_row_blocks, "_CPU_BLOCK_BYTES", block)
        assert_same(make(width, states), inputs, 1e-10)


def test_gradcheck():
    layer = make(2, 3)
    names, values = zip(*layer.named_parameters(), strict=True)

    def call(inputs: Tensor, *parameters: Tensor) -> Tensor:
        named = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(layer, named, (inputs,))

    inputs = torch.randn(2, 7, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(call, (inputs, *values))


@pytest.mark.parametrize("frozen", ["nu_log", "B_re", "C_im", "D", "all"])
def test_frozen_parameters(frozen: str):
    layer, inputs = make(2, 3), torch.randn(2, 9, 2, dtype=torch.float64, requires_grad=True)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(frozen not in (name, "all"))
    layer(inputs).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert (parameter.grad is None) == (frozen in (name, "all"))
    (expected,) = torch.autograd.grad(naive_lru(layer, inputs).square().sum(), inputs)
    torch.testing.assert_close(inputs.grad, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_steps_equal_the_sequence(dtype: torch.dtype):
    layer, inputs = make(3, 6, dtype), torch.randn(4, 50, 3, dtype=dtype)
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


def test_gradients_of_steps():
    layer, inputs = make(2, 3), torch.randn(1, 6, 2, dtype=torch.float64)
    state, total = layer.initial_state(1), torch.zeros((), dtype=torch.float64)
    for u in inputs.unbind(1):
        y, state = layer.step(u, state)
        total = total + y.square().sum()
    steps = torch.autograd.grad(total, list(layer.parameters()))
    whole = torch.autograd.grad(layer(inputs).square().sum(), list(layer.parameters()))
    for a, b in zip(steps, whole, strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_computes_in_single_precision():
    layer = make(3, 6, torch.float32, r_min=0.99)
    inputs = torch.randn(2, 300, 3)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = layer(inputs)
        stepped, state = layer.step(inputs[:, 0], layer.initial_state(2))
        outputs.square().sum().backward()
    assert outputs.dtype == torch.float32
    assert state.dtype == torch.complex64
    assert torch.equal(outputs, layer(inputs))
    assert torch.equal(stepped, layer.step(inputs[:, 0], layer.initial_state(2))[0])
    gradient = layer.nu_log.grad
    layer.zero_grad()
    layer(inputs).square().sum().backward()
    assert torch.equal(gradient, layer.nu_log.grad)


def test_autocast_between_other_layers():
    model = nn.Sequential(nn.Linear(1, 3), make(3, 4, torch.float32), nn.Linear(3, 2))
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(torch.randn(2, 20, 1))
        assert outputs.dtype == torch.bfloat16
        outputs.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_long_memory_in_single_precision():
    """Only the rounding of nu_log and theta_log to float32 may show, so compare with those."""
    layer = make(2, 8, torch.float32, r_min=0.998, r_max=0.999)
    inputs = torch.randn(1, 4096, 2)
    assert relative_error(layer(inputs), naive_lru(layer, inputs)) < 5e-6


def test_memory_is_one_copy_of_the_states():
    batch, length, width, states = 3, 300, 32, 32  # many channels: a scan over all steps
    layer, inputs = make(width, states, torch.float32), torch.randn(batch, length, width)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(inputs)
    expected = batch * length * (2 * states + width)
    assert expected <= sum(t.numel() for t in saved) < 1.1 * expected


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: type):
    layer, inputs = make(3, 4), torch.randn(5, 40, 3, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch, mode():
        patch.setattr(_row_blocks, "_CPU_BLOCK_BYTES", 1)
        outputs = layer(inputs)
    assert not outputs.requires_grad
    torch.testing.assert_close(outputs, layer(inputs).detach())


def test_layout_of_inputs_and_gradients_does_not_matter():
    layer, wide = make(3, 4), torch.randn(3, 20, 2, dtype=torch.float64, requires_grad=True)
    inputs = wide.permute(2, 1, 0)
    assert_same(layer, inputs, 1e-11)
    (actual,) = torch.autograd.grad(layer(inputs).sum(), wide)
    (expected,) = torch.autograd.grad(naive_lru(layer, inputs).sum(), wide)
    torch.testing.assert_close(actual, expected)


def test_double_backward_is_refused():
    layer, inputs = make(2, 3), torch.randn(1, 5, 2, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(inputs).square().sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_empty_batch():
    layer = make(2, 3)
    outputs = layer(torch.zeros(0, 5, 2, dtype=torch.float64))
    assert outputs.shape == (0, 5, 2)
    outputs.sum().backward()


def test_deepcopy_and_pickle():
    layer, inputs = make(2, 3, torch.float32), torch.randn(2, 9, 2)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    copies = [
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(buffer, weights_only=False),
    ]
    for twin in copies:
        assert torch.equal(twin(inputs), layer(inputs))
        assert twin.nu_log is not layer.nu_log
        twin.load_state_dict(layer.state_dict())


@pytest.mark.slow
@pytest.mark.filterwarnings("error:Torchinductor does not support")
def test_compiled_model_matches():
    model = nn.Sequential(nn.Linear(2, 3), make(3, 4, torch.float32), nn.GELU(), nn.Linear(3, 2))
    inputs = torch.randn(2, 30, 2)
    compiled = torch.compile(model)
    for part in (compiled, model):
        part(inputs).square().sum().backward()
        if part is compiled:
            gradients = [p.grad.clone() for p in model.parameters()]
            model.zero_grad()
    torch.testing.assert_close(compiled(inputs), model(inputs))
    for gradient, parameter in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-5)


def test_parameters_and_attributes():
    layer = LRU(3, 5)
    shapes = dict.fromkeys(NAMES[:3], (5,)) | dict.fromkeys(NAMES[3:5], (5, 3))
    shapes |= dict.fromkeys(NAMES[5:7], (3, 5)) | {"D": (3,)}
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == shapes
    assert not list(layer.buffers())
    assert all(p.dtype == torch.float32 for p in layer.parameters())
    assert (layer.d_model, layer.d_state) == (3, 5)
    assert repr(layer) == "LRU(d_model=3, d_state=5)"


def test_initial_distribution():
    """Orvieto et al.: uniform on the ring, so |lambda|^2 and the phase are uniform."""
    torch.manual_seed(1)
    layer = LRU(64, 4000, r_min=0.4, r_max=0.8, max_phase=3.0)
    eigenvalues = layer.eigenvalues
    assert eigenvalues.dtype == torch.complex128
    square, phase = eigenvalues.abs().square(), eigenvalues.angle()
    assert 0.16 - 1e-6 <= square.min() < 0.163
    assert 0.637 < square.max() <= 0.64 + 1e-6
    assert square.mean().item() == pytest.approx(0.40, abs=0.01)
    assert 0 < phase.min() < 0.02
    assert 2.98 < phase.max() <= 3.0 + 1e-6
    torch.testing.assert_close(layer.gamma_log.double().exp() ** 2, 1 - square, rtol=1e-5, atol=0)
    for matrix, variance in (
        (layer.B_re, 1 / 128),
        (layer.B_im, 1 / 128),
        (layer.C_re, 1 / 4000),
        (layer.C_im, 1 / 4000),
    ):
        assert matrix.var().item() == pytest.approx(variance, rel=0.03)
        assert matrix.mean().abs() < 0.02 * math.sqrt(variance)


def test_extreme_settings_stay_finite():
    layer = LRU(2, 2000, r_min=0.0, r_max=1 - 1e-9, max_phase=math.tau, dtype=torch.float64)
    assert all(p.isfinite().all() for p in layer.parameters())
    assert (layer.eigenvalues.abs() < 1).all()


def test_a_seed_gives_the_same_layer():
    first, second, other = make(3, 4, torch.float32), make(3, 4, torch.float32), LRU(3, 4)
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(first.B_re, other.B_re)
    torch.testing.assert_close(make(3, 4).B_re.float(), first.B_re)


def test_meta_device_then_materialised():
    layer = LRU(3, 4, device="meta")
    assert all(p.is_meta for p in layer.parameters())
    assert layer(torch.empty(2, 10, 3, device="meta")).shape == (2, 10, 3)
    layer = layer.to_empty(device="cpu")
    torch.manual_seed(0)
    layer.reset_parameters()
    assert torch.equal(layer.C_im, make(3, 4, torch.float32).C_im)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"d_model": 0}, "d_model must be an integer >= 1, got 0"),
        ({"d_state": 0}, "d_state must be an integer >= 1"),
        ({"d_state": 2.0}, "d_state must be an integer"),
        ({"d_state": True}, "d_state must be an integer"),
        ({"r_min": -0.1}, "0 <= r_min < r_max < 1"),
        ({"r_max": 1.0}, "0 <= r_min < r_max < 1"),
        ({"r_min": 0.5, "r_max": 0.5}, "0 <= r_min < r_max < 1"),
        ({"r_min": math.nan}, "0 <= r_min < r_max < 1"),
        ({"max_phase": 0.0}, "max_phase must lie in"),
        ({"max_phase": 7.0}, "max_phase must lie in"),
    ],
)
def test_bad_arguments(arguments: dict[str, float], message: str):
    with pytest.raises(ValueError, match=message):
        LRU(**({"d_model": 2, "d_state": 3} | arguments))


def test_complex_parameters_are_refused():
    with pytest.raises(TypeError, match="real floating-point"):
        LRU(2, 3, dtype=torch.complex64)


@pytest.mark.parametrize("shape", [(5, 2), (1, 5, 3), (1, 1, 5, 2), (1, 0, 2)])
def test_bad_input_shapes(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match="got"):
        LRU(2, 3)(torch.zeros(shape))


def test_bad_input_types():
    layer = LRU(2, 3)
    for dtype in (torch.int64, torch.complex64):
        with pytest.raises(TypeError, match="real floating-point inputs"):
            layer(torch.zeros(1, 5, 2, dtype=dtype))


def test_bad_states():
    layer = LRU(2, 3)
    with pytest.raises(ValueError, match=r"\(batch, N\) = \(4, 3\), got \(4, 2\)"):
        layer.step(torch.zeros(4, 2), torch.zeros(4, 2, dtype=torch.complex64))
    with pytest.raises(TypeError, match="state must be complex"):
        layer.step(torch.zeros(4, 2), torch.zeros(4, 3))
    with pytest.raises(ValueError, match="d_model = 2"):
        layer.step(torch.zeros(4, 3), layer.initial_state(4))
