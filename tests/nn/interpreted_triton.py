"""The Triton kernel under Triton's interpreter: run by test_triton.py in a process of its own."""

from __future__ import annotations

import types

import pytest
import torch

from lightning_compressm.nn import LRU, _forms, linear_recurrence
from tests.nn._reference import TOLERANCE, problem
from tests.nn.test_forms import run
from tests.nn.test_scan import assert_same


@pytest.fixture(autouse=True)
def kernel(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """CPU tensors go to the kernel, in tiles that the interpreter gets through quickly."""
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    assert triton.knobs.runtime.interpret, "without TRITON_INTERPRET=1 the kernel needs a GPU"
    from lightning_compressm.nn import _triton

    monkeypatch.setattr(_triton, "STEPS", 4)
    monkeypatch.setattr(_triton, "STATES", 4)
    monkeypatch.setattr(_forms, "TWO_LEVEL", _forms._form("triton", _triton))
    return _triton


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("length", "states"), [(1, 1), (1, 5), (3, 4), (4, 7), (5, 1), (8, 4), (23, 6)]
)
def test_equals_the_loop(length: int, states: int, dtype: torch.dtype) -> None:
    arguments = problem((2, length, states), dtype)
    assert_same(arguments, TOLERANCE[dtype])
    assert_same(arguments[:2], TOLERANCE[dtype])


@pytest.mark.parametrize("batch", [(), (1,), (2, 3)])
def test_any_batch(batch: tuple[int, ...]) -> None:
    assert_same(problem((*batch, 9, 3)), 1e-11)


def test_tiles_of_full_size(kernel: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    form = _forms.TWO_LEVEL
    monkeypatch.undo()
    assert kernel.STEPS > 4
    _forms._try_out(form, torch.device("cpu"))


def test_an_empty_batch_has_no_gradient() -> None:
    eigenvalues, inputs, start = problem((0, 5, 3))
    states = linear_recurrence(eigenvalues, inputs, start)
    (gradient,) = torch.autograd.grad(states.abs().sum(), eigenvalues)
    assert states.shape == (0, 5, 3)
    assert not gradient.any()


def test_nothing_but_the_rows_is_written(kernel: types.ModuleType) -> None:
    buffer = torch.randn(4, 5, 3, dtype=torch.complex64)
    before = buffer.clone()
    powers = kernel.powers_of(torch.full((3,), 0.5 + 0.1j), 5, buffer.dtype)
    kernel.scan_(buffer[1:3], powers)
    assert torch.equal(buffer[[0, 3]], before[[0, 3]])
    assert not torch.equal(buffer[1:3], before[1:3])


def test_other_layouts_are_refused(kernel: types.ModuleType) -> None:
    powers = kernel.powers_of(torch.full((3,), 0.5 + 0.1j), 5, torch.complex64)
    with pytest.raises(ValueError, match="needs contiguous tensors, got strides"):
        kernel.scan_(torch.ones(2, 5, 6, dtype=torch.complex64)[..., ::2], powers)


@pytest.mark.parametrize(("width", "states"), [(16, 5), (2, 64)])
def test_layers_compute_the_same(width: int, states: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = LRU(width, states, dtype=torch.float64)
    actual = run(layer, 13)
    monkeypatch.undo()
    torch.testing.assert_close(actual, run(layer, 13))
