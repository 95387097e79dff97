"""The chunk-wise form of a diagonal recurrence against the scan over all steps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from lightning_compressm.nn import LRU, _fused
from lightning_compressm.nn._chunked import best_chunk, chunked_diagonal
from tests.nn._reference import naive_lru, relative_error
from tests.nn.chunks import SIZES, assert_same_with_gradients


def parts(layer: LRU, dtype: torch.dtype) -> tuple[Tensor, ...]:
    decay, phase = layer._decay_and_phase()
    return torch.complex(-decay, phase).exp(), *layer._weights(dtype)


@settings(max_examples=40, deadline=None)
@given(**SIZES)
def test_any_chunk_gives_the_equations(
    batch: int, length: int, width: int, states: int, chunk: int
) -> None:
    torch.manual_seed(0)
    layer = LRU(width, states, dtype=torch.float64)
    inputs = torch.randn(batch, length, width, dtype=torch.float64, requires_grad=True)
    expected = naive_lru(layer, inputs)
    actual = chunked_diagonal(chunk, inputs, *parts(layer, torch.float64))
    assert_same_with_gradients(actual, expected, [inputs, *layer.parameters()])


@pytest.mark.parametrize(("radius", "tolerance"), [(0.999, 5e-5), (0.99999, 5e-3)])
def test_single_precision_over_many_steps(radius: float, tolerance: float) -> None:
    torch.manual_seed(0)
    layer = LRU(2, 64, r_min=radius - 1e-6, r_max=radius)
    inputs = torch.randn(1, 16_000, 2)
    assert best_chunk(16_000, 2, 64) is not None
    assert relative_error(layer(inputs).double(), naive_lru(layer, inputs)) < tolerance


def test_autocast_leaves_it_alone_in_both_passes() -> None:
    torch.manual_seed(0)
    layer, inputs = LRU(4, 32), torch.randn(2, 50, 4)
    assert best_chunk(50, 4, 32) is not None
    plain = layer(inputs)
    plain.sum().backward()
    wanted = [parameter.grad for parameter in layer.parameters()]
    layer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = layer(inputs)
        mixed.sum().backward()
    assert torch.equal(plain, mixed)
    for parameter, gradient in zip(layer.parameters(), wanted, strict=True):
        assert torch.equal(parameter.grad, gradient)


def test_second_derivatives_are_refused() -> None:
    layer, inputs = LRU(2, 32), torch.randn(1, 30, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(inputs).square().sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_memory_does_not_grow_with_the_states_of_every_step() -> None:
    """What is kept: inputs, states at chunk ends, and matrices of the size of a chunk."""
    batch, length, width, states = 4, 2048, 4, 256
    layer, inputs = LRU(width, states), torch.randn(batch, length, width)
    chunk = best_chunk(length, width, states)
    assert chunk is not None
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(inputs)
    every_step = batch * length * states * 8
    assert sum(saved.values()) < every_step / 5


def test_which_form_is_chosen() -> None:
    """Many states and few channels: chunks, shorter ones with fewer states; else a scan."""
    assert best_chunk(784, 8, 256) == 17
    assert best_chunk(784, 8, 16) == 4
    assert best_chunk(1024, 512, 384) is None
    assert best_chunk(1024, 128, 384) is None
    assert best_chunk(2, 8, 256) is None
    assert best_chunk(10, 1, 10_000) == 10


@pytest.mark.parametrize("size", [(3, 40, 2, 64), (2, 30, 40, 8)])
def test_both_forms_agree(size: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    batch, length, width, states = size
    torch.manual_seed(0)
    layer = LRU(width, states, dtype=torch.float64)
    inputs = torch.randn(batch, length, width, dtype=torch.float64)
    outputs = []
    for chunk in (None, 7):
        monkeypatch.setattr(_fused, "best_chunk", lambda *_, chunk=chunk: chunk)
        outputs.append(layer(inputs))
    torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-11)
