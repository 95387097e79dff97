"""The two-level scan against a plain loop."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_compressm.nn import _row_blocks, _two_level, linear_recurrence
from tests.nn._reference import TOLERANCE, naive_recurrence, problem, relative_error

LENGTHS = (1, 2, 3, 7, 16, 17, 63, 64, 100, 787)


def assert_same(arguments: tuple[Tensor, ...], tolerance: float) -> None:
    """Compare outputs and every gradient with those of the loop, run in complex128."""
    exact = [a.detach().to(torch.complex128).requires_grad_() for a in arguments]
    actual, expected = linear_recurrence(*arguments), naive_recurrence(*exact)
    assert actual.dtype == arguments[1].dtype
    assert relative_error(actual, expected) < tolerance
    weight = torch.randn(expected.shape, dtype=expected.dtype)
    gradients = torch.autograd.grad(actual, arguments, weight.to(actual.dtype))
    references = torch.autograd.grad(expected, exact, weight)
    for argument, gradient, reference in zip(arguments, gradients, references, strict=True):
        assert gradient.dtype == argument.dtype
        assert relative_error(gradient, reference) < tolerance


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("length", LENGTHS)
def test_equals_the_loop(length: int, dtype: torch.dtype):
    arguments = problem((2, length, 5), dtype)
    assert_same(arguments, TOLERANCE[dtype])
    assert_same(arguments[:2], TOLERANCE[dtype])


@settings(max_examples=40, deadline=None)
@given(
    batch=st.lists(st.integers(1, 3), max_size=3),
    length=st.integers(1, 90),
    states=st.integers(1, 6),
    radius=st.floats(0.0, 1.0),
    block=st.integers(1, 4000),
)
def test_equals_the_loop_for_any_size(
    batch: list[int], length: int, states: int, radius: float, block: int
):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_row_blocks, "_CPU_BLOCK_BYTES", block)
        assert_same(problem((*batch, length, states), radius=radius), 1e-10)


@pytest.mark.parametrize("length", [1, 2, 5, 12])
def test_gradcheck(length: int):
    assert torch.autograd.gradcheck(linear_recurrence, problem((2, length, 3)))


@pytest.mark.parametrize("wants", [(0,), (1,), (2,), (0, 2)])
def test_gradients_only_where_wanted(wants: tuple[int, ...]):
    arguments = problem((2, 9, 3))
    kept = [arguments[i] for i in wants]
    some = [a if i in wants else a.detach() for i, a in enumerate(arguments)]
    part = torch.autograd.grad(linear_recurrence(*some).abs().sum(), kept)
    full = torch.autograd.grad(naive_recurrence(*arguments).abs().sum(), kept)
    for a, b in zip(part, full, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("cut", [1, 20, 36])
def test_two_halves_are_the_whole(cut: int):
    eigenvalues, inputs, start = problem((2, 37, 4))
    whole = linear_recurrence(eigenvalues, inputs, start)
    first = linear_recurrence(eigenvalues, inputs[:, :cut], start)
    second = linear_recurrence(eigenvalues, inputs[:, cut:], first[:, -1])
    torch.testing.assert_close(torch.cat((first, second), 1), whole)
    arguments = (eigenvalues, inputs, start)
    weight = torch.randn_like(whole)
    in_one = torch.autograd.grad(whole, arguments, weight)
    in_two = torch.autograd.grad(torch.cat((first, second), 1), arguments, weight)
    for a, b in zip(in_one, in_two, strict=True):
        torch.testing.assert_close(a, b)


def test_slow_eigenvalues_stay_accurate_in_single_precision():
    """Powers come from double precision: with |lambda| = .999 the error stays near rounding."""
    phases = torch.linspace(0, 6, 8, dtype=torch.float64)
    eigenvalues = torch.polar(torch.full_like(phases, 0.999), phases)
    inputs = torch.randn(1, 4096, 8, dtype=torch.complex64)
    actual = linear_recurrence(eigenvalues, inputs)
    assert actual.dtype == torch.complex64
    assert relative_error(actual, naive_recurrence(eigenvalues, inputs.to(torch.complex128))) < 2e-6


def test_unstable_and_zero_eigenvalues():
    eigenvalues = torch.tensor([1.01, -1.0, 0.0], dtype=torch.complex128, requires_grad=True)
    _, inputs, start = problem((2, 50, 3))
    assert_same((eigenvalues, inputs, start), 1e-11)


@pytest.mark.parametrize("kind", ["transposed", "strided", "expanded", "conjugated"])
def test_layout_of_the_inputs_does_not_matter(kind: str):
    eigenvalues, inputs, start = problem((4, 4, 4))
    layouts = {
        "transposed": inputs.transpose(0, 1),
        "strided": torch.cat((inputs, inputs), 1)[:, ::2],
        "expanded": inputs[:1].expand(3, 4, 4),
        "conjugated": inputs.conj(),
    }
    view = layouts[kind]
    before = inputs.detach().clone()
    begin = start[: view.shape[0]]
    actual, expected = (f(eigenvalues, view, begin) for f in (linear_recurrence, naive_recurrence))
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(inputs, before, rtol=0, atol=0)
    for a, b in zip(
        torch.autograd.grad(actual.abs().sum(), (eigenvalues, inputs, start)),
        torch.autograd.grad(expected.abs().sum(), (eigenvalues, inputs, start)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_expanded_gradient():
    """`sum` hands the backward pass a tensor whose memory is shared by all its elements."""
    eigenvalues, inputs, _ = problem((2, 10, 3))
    (actual,) = torch.autograd.grad(linear_recurrence(eigenvalues, inputs).sum().real, inputs)
    (expected,) = torch.autograd.grad(naive_recurrence(eigenvalues, inputs).sum().real, inputs)
    torch.testing.assert_close(actual, expected)


def test_empty_batch():
    eigenvalues, inputs, start = problem((0, 5, 3))
    states = linear_recurrence(eigenvalues, inputs, start)
    assert states.shape == (0, 5, 3)
    states.abs().sum().backward()
    assert eigenvalues.grad is not None
    assert not eigenvalues.grad.any()


def test_double_backward_is_refused():
    eigenvalues, inputs, _ = problem((2, 5, 3))
    output = linear_recurrence(eigenvalues, inputs).abs().sum()
    (gradient,) = torch.autograd.grad(output, inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.abs().sum().backward()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: type):
    arguments = problem((2, 20, 3))
    with mode():
        states = linear_recurrence(*arguments)
    assert not states.requires_grad
    torch.testing.assert_close(states, linear_recurrence(*arguments).detach())


def test_autocast_changes_nothing():
    arguments = problem((2, 20, 3), torch.complex64)
    with torch.autocast("cpu", torch.bfloat16):
        states = linear_recurrence(*arguments)
        states.abs().sum().backward()
    assert torch.equal(states, linear_recurrence(*arguments))


def test_saves_the_states_once():
    batch, length, states = 3, 400, 16
    arguments = problem((batch, length, states), torch.complex64)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        linear_recurrence(*arguments)
    assert sum(t.numel() for t in saved) < 1.1 * batch * length * states


def test_chunks_need_few_steps():
    for length in range(1, 1200):
        chunk = _two_level.chunk_length(length)
        assert 1 <= chunk <= length
        assert chunk + length // chunk + length % chunk <= 2.5 * length**0.5 + 3


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((3,), (5, 4)), r"eigenvalues must have shape \(N,\) with N = 4"),
        (((2, 4), (5, 4)), "eigenvalues must have shape"),
        (((0,), (5, 0)), "N = 0 >= 1"),
        (((4,), (4,)), "inputs must have shape"),
        (((4,), (2, 0, 4)), "at least one step"),
        (((4,), (2, 5, 4), (4,)), r"initial_state must have shape .* = \(2, 4\)"),
        (((4,), (2, 5, 4), (3, 4)), "initial_state"),
    ],
)
def test_bad_shapes(shapes: tuple[tuple[int, ...], ...], message: str):
    with pytest.raises(ValueError, match=message):
        linear_recurrence(*(torch.zeros(shape, dtype=torch.complex64) for shape in shapes))


@pytest.mark.parametrize("real", range(3))
def test_real_tensors_are_refused(real: int):
    arguments = [a.detach() for a in problem((2, 5, 3))]
    arguments[real] = arguments[real].real
    name = ("eigenvalues", "inputs", "initial_state")[real]
    with pytest.raises(TypeError, match=f"{name} must be complex64 or complex128, got"):
        linear_recurrence(*arguments)
