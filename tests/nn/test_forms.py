"""Which form of the scan runs where, and that the one for devices without kernels is right."""

from __future__ import annotations

import importlib.util
import math
import sys
import types
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lightning_compressm.nn import LRU, S5, _forms, _log_depth, linear_recurrence
from tests.nn._reference import TOLERANCE, naive_recurrence, problem, relative_error
from tests.nn.test_scan import LENGTHS, assert_same

KERNEL = "lightning_compressm.nn._triton"
CUDA, SINGLE = torch.device("cuda:0"), torch.complex64


@pytest.fixture
def log_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the CPU runs is the log-depth form."""
    monkeypatch.setattr(_forms, "TWO_LEVEL", _forms.LOG_DEPTH)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """A CUDA device of capability 9.0 with a working Triton, as far as the rule can see."""
    kernel = types.ModuleType(KERNEL)
    for name in ("powers_of", "scan_", "adjoint_scan_"):
        setattr(kernel, name, getattr(_log_depth, name))
    monkeypatch.setitem(sys.modules, KERNEL, kernel)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(_forms, "_try_out", lambda form, device: None)
    _forms._kernel.cache_clear()
    yield kernel
    _forms._kernel.cache_clear()


@pytest.mark.parametrize(
    ("device", "dtype", "name"),
    [
        ("cpu", torch.complex64, "two-level"),
        ("cpu", torch.complex128, "two-level"),
        ("cuda", torch.complex64, "triton"),
        ("cuda:0", torch.complex128, "triton"),
        ("cuda", torch.complex32, "log-depth"),
        ("mps", torch.complex64, "log-depth"),
        ("xpu", torch.complex64, "log-depth"),
    ],
)
@pytest.mark.usefixtures("cuda")
def test_the_rule(device: str, dtype: torch.dtype, name: str):
    assert _forms.form_for(torch.device(device), dtype).name == name


@pytest.mark.parametrize(
    ("target", "attribute", "value"),
    [
        (importlib.util, "find_spec", lambda name: None),
        (torch.cuda, "get_device_capability", lambda device: (7, 5)),
        (torch.version, "hip", "6.4"),
    ],
)
@pytest.mark.usefixtures("cuda")
def test_without_triton_scans_take_log_depth(
    monkeypatch: pytest.MonkeyPatch, target: object, attribute: str, value: object
):
    monkeypatch.setattr(target, attribute, value)
    assert _forms.form_for(CUDA, SINGLE).name == "log-depth"


@pytest.mark.usefixtures("cuda")
def test_a_kernel_that_fails_its_trial_is_named_once(monkeypatch: pytest.MonkeyPatch):
    def no_compiler(form: object, device: torch.device) -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(_forms, "_try_out", no_compiler)
    with pytest.warns(RuntimeWarning, match="does not work on cuda:0 .*find C compiler"):
        assert _forms.form_for(CUDA, SINGLE).name == "log-depth"
    assert _forms.form_for(CUDA, SINGLE).name == "log-depth"


def test_a_package_that_breaks_on_import_is_named(
    cuda: types.ModuleType, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, cuda.__name__, None)
    with pytest.warns(RuntimeWarning, match="ModuleNotFoundError"):
        assert _forms.form_for(CUDA, SINGLE).name == "log-depth"


@pytest.mark.parametrize("broken", ["scan_", "adjoint_scan_"])
def test_the_trial_compares_results(broken: str):
    _forms._try_out(_forms.LOG_DEPTH, torch.device("cpu"))

    def wrong(states: Tensor, *rest: Tensor, **options: bool) -> object:
        result = getattr(_log_depth, broken)(states, *rest, **options)
        states[-1, -1] = 0
        return result

    form = _forms.LOG_DEPTH._replace(**{broken: wrong})
    with pytest.raises(AssertionError, match="not close"):
        _forms._try_out(form, torch.device("cpu"))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.usefixtures("log_depth")
def test_log_depth_equals_the_loop(length: int, dtype: torch.dtype):
    arguments = problem((2, length, 5), dtype)
    assert_same(arguments, TOLERANCE[dtype])
    assert_same(arguments[:2], TOLERANCE[dtype])


@pytest.mark.usefixtures("log_depth")
def test_log_depth_for_every_short_length():
    for length in range(1, 70):
        assert_same(problem((length, 2)), 1e-11)


@pytest.mark.usefixtures("log_depth")
def test_log_depth_of_other_layouts_and_batches():
    eigenvalues, inputs, start = problem((3, 11, 4))
    swapped = inputs.transpose(0, 1).contiguous().transpose(0, 1).conj()
    actual = linear_recurrence(eigenvalues, swapped, start)
    assert relative_error(actual, naive_recurrence(eigenvalues, inputs.conj(), start)) < 1e-11
    empty = linear_recurrence(eigenvalues, inputs[:0], start[:0])
    (gradient,) = torch.autograd.grad(empty.abs().sum(), eigenvalues)
    assert not gradient.any()


@pytest.mark.parametrize("length", [1, 6])
@pytest.mark.usefixtures("log_depth")
def test_log_depth_gradcheck(length: int):
    assert torch.autograd.gradcheck(linear_recurrence, problem((2, length, 3)))


@pytest.mark.usefixtures("log_depth")
def test_log_depth_refuses_double_backward():
    eigenvalues, inputs, _ = problem((2, 5, 3))
    output = linear_recurrence(eigenvalues, inputs).abs().sum()
    (gradient,) = torch.autograd.grad(output, inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.abs().sum().backward()


@pytest.mark.usefixtures("log_depth")
def test_log_depth_stays_accurate_with_slow_eigenvalues():
    phases = torch.linspace(0, 6, 8, dtype=torch.float64)
    eigenvalues = torch.polar(torch.full_like(phases, 0.999), phases)
    inputs = torch.randn(1, 4096, 8, dtype=SINGLE)
    actual = linear_recurrence(eigenvalues, inputs)
    assert relative_error(actual, naive_recurrence(eigenvalues, inputs.to(torch.complex128))) < 2e-6


@pytest.mark.parametrize("length", [1, 2, 100, 1024, 5000])
def test_log_depth_needs_few_kernels(length: int):
    states = torch.ones(1, length, 2, dtype=SINGLE)
    powers = _log_depth.powers_of(torch.tensor([0.5, 0.9j]), length, SINGLE)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        _log_depth.scan_(states, powers)
    kernels = sum(e.count for e in profile.key_averages() if e.key == "aten::addcmul_")
    assert kernels <= 2 * math.ceil(math.log2(length))


def layers() -> list[torch.nn.Module]:
    """Layers that scan all steps, and (with few channels for each state) chunk ends."""
    double = torch.float64
    return [LRU(32, 6, dtype=double), LRU(2, 64, dtype=double), S5(8, 16).double()]


def run(layer: torch.nn.Module, length: int) -> list[Tensor]:
    """Output and gradients of a layer for inputs that are the same every time."""
    generator = torch.Generator().manual_seed(0)
    width, dtype = layer.d_model, next(layer.parameters()).dtype
    inputs = torch.randn(2, length, width, generator=generator, dtype=dtype).requires_grad_()
    output = layer(inputs)
    weight = torch.randn(output.shape, generator=generator, dtype=dtype)
    return [output, *torch.autograd.grad(output, [inputs, *layer.parameters()], weight)]


@pytest.mark.parametrize("length", [1, 37])
@pytest.mark.parametrize("layer", layers(), ids=lambda layer: type(layer).__name__)
def test_layers_compute_the_same_in_log_depth(
    layer: torch.nn.Module, length: int, monkeypatch: pytest.MonkeyPatch
):
    expected = run(layer, length)
    monkeypatch.setattr(_forms, "TWO_LEVEL", _forms.LOG_DEPTH)
    torch.testing.assert_close(run(layer, length), expected)
