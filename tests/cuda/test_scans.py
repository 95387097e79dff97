"""Scans on CUDA, by the Triton kernel and in plain PyTorch, against those of the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_compressm.nn import _forms, linear_recurrence, selective_scan
from tests.nn._reference import TOLERANCE, problem, relative_error

pytestmark = pytest.mark.cuda

# Around the kernel's tiles of 16 steps and 32 states, and beyond them.
LENGTHS = (1, 15, 16, 17, 127, 787)
STATES = (1, 31, 32, 33, 256, 1024)
PIXELS = 1025


def assert_like_the_cpu(device: torch.device, arguments: tuple[Tensor, ...]) -> None:
    """Outputs and all gradients, against those of the CPU in complex128."""
    tolerance = TOLERANCE[arguments[1].dtype]
    exact = [a.detach().to(torch.complex128).requires_grad_() for a in arguments]
    there = [a.detach().to(device).requires_grad_() for a in arguments]
    expected, actual = linear_recurrence(*exact), linear_recurrence(*there)
    assert actual.dtype == arguments[1].dtype
    assert relative_error(actual.cpu(), expected) < tolerance
    weight = torch.randn_like(expected)
    gradients = torch.autograd.grad(actual, there, weight.to(actual))
    references = torch.autograd.grad(expected, exact, weight)
    for gradient, reference in zip(gradients, references, strict=True):
        assert gradient.device.type == device.type
        assert relative_error(gradient.cpu(), reference) < tolerance


@pytest.mark.usefixtures("triton_scan")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("states", STATES)
@pytest.mark.parametrize("length", LENGTHS)
def test_the_kernel(cuda: torch.device, length: int, states: int, dtype: torch.dtype) -> None:
    arguments = problem((3, length, states), dtype)
    assert_like_the_cpu(cuda, arguments)
    assert_like_the_cpu(cuda, arguments[:2])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("length", [1, 100, PIXELS])
def test_plain_operations(
    device: torch.device, length: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_forms, "_kernel", lambda device: None)
    assert_like_the_cpu(device, problem((3, length, 37), dtype))


@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_any_batch(device: torch.device, batch: tuple[int, ...]) -> None:
    assert_like_the_cpu(device, problem((*batch, 9, 5)))


def test_an_empty_batch(device: torch.device) -> None:
    arguments = [t.detach().to(device).requires_grad_() for t in problem((0, 9, 5))]
    states = linear_recurrence(*arguments)
    gradients = torch.autograd.grad(states.abs().sum(), arguments)
    assert states.shape == (0, 9, 5)
    assert not gradients[0].any()


def test_near_the_unit_circle(device: torch.device) -> None:
    assert_like_the_cpu(device, problem((2, 4001, 3), radius=1.0))


def test_other_layouts(device: torch.device) -> None:
    """Gradients come as they like: here transposed and lazily conjugated."""
    eigenvalues, inputs, _ = (t.detach().to(device) for t in problem((7, 40, 5)))
    found = []
    for copy in (lambda t: t, lambda t: t.mT.contiguous().mT.conj().conj_physical()):
        u = copy(inputs).detach().requires_grad_()
        (gradient,) = torch.autograd.grad(linear_recurrence(eigenvalues, u), u, copy(inputs))
        found.append(gradient)
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.usefixtures("triton_scan")
def test_more_than_two_to_the_31_numbers(cuda: torch.device) -> None:
    """Offsets no longer fit into 32 bits, in the last row."""
    rows, length, states = 3, 1 << 19, 700
    free, _ = torch.cuda.mem_get_info()
    if free < 2.5 * 8 * rows * length * states:
        pytest.skip("needs 22 GB of free memory")
    form = _forms.form_for(torch.empty(0, device=cuda).device, torch.complex64)
    powers = form.powers_of(torch.full((states,), 0.5, device=cuda), length, torch.complex64)
    x = torch.ones(rows, length, states, dtype=torch.complex64, device=cuda)
    form.scan_(x, powers)
    for row in range(rows):  # 1 + 1/2 + 1/4 + ..., which rounds to 2 after 24 steps
        assert (x[row, 30:] == 2).all()
        assert (x[row, 0] == 1).all()


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize(("length", "states"), [(1, 16), (33, 1), (257, 12), (100, 128)])
def test_selective_scan(device: torch.device, length: int, states: int, constant: bool) -> None:
    generator = torch.Generator().manual_seed(length + states)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    u, delta, z, bias = draw(2, 6, length), draw(2, 6, length), draw(2, 6, length), draw(6)
    rates, skip, start = -draw(6, states).exp(), draw(6), draw(2, 6, states)
    B = draw(6, states) if constant else draw(2, 3, states, length)
    C = draw(2, states, length) if constant else draw(2, 3, states, length)
    tensors = [t.detach().requires_grad_() for t in (u, delta, rates, B, C, skip, z, bias, start)]
    results = []
    for where in (torch.device("cpu"), device):
        moved = [t.detach().to(where).requires_grad_() for t in tensors]
        y, last = selective_scan(
            *moved[:8], delta_softplus=True, initial_state=moved[8], return_last_state=True
        )
        gradients = torch.autograd.grad(y.square().sum() + last.square().sum(), moved)
        results.append([t.cpu() for t in (y, last, *gradients)])
    for expected, actual in zip(*results, strict=True):
        assert relative_error(actual, expected) < 1e-9
