"""The chunk-wise form of a bank of systems against the equations and the convolution by FFT."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from lightning_compressm.nn import S4D, s4d
from lightning_compressm.nn._bank import bank_chunk, chunked_bank
from tests.nn._reference import relative_error
from tests.nn.chunks import SIZES, assert_same_with_gradients

CHUNKED = {"batch": 4, "length": 300, "states": 5}


def in_chunks(layer: S4D, inputs: Tensor, chunk: int) -> Tensor:
    re, im, *gains = layer._discrete()
    return chunked_bank(chunk, inputs, (re, im), layer._read_out(*gains), layer.D)


def step_by_step(layer: S4D, inputs: Tensor) -> Tensor:
    outputs, state = [], layer.initial_state(len(inputs))
    for u in inputs.unbind(1):
        y, state = layer.step(u, state)
        outputs.append(y)
    return torch.stack(outputs, 1)


@settings(max_examples=40, deadline=None)
@given(**SIZES)
def test_any_chunk_gives_the_equations(
    batch: int, length: int, width: int, states: int, chunk: int
) -> None:
    torch.manual_seed(0)
    layer = S4D(width, states, dtype=torch.float64)
    inputs = torch.randn(batch, length, width, dtype=torch.float64, requires_grad=True)
    expected = step_by_step(layer, inputs)
    actual = in_chunks(layer, inputs, chunk)
    assert_same_with_gradients(actual, expected, [inputs, *layer.parameters()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_layer_takes_it_and_gets_what_fft_gives(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layer = S4D(6, CHUNKED["states"], dtype=dtype)
    inputs = torch.randn(CHUNKED["batch"], CHUNKED["length"], 6, dtype=dtype, requires_grad=True)
    wanted, weight = [inputs, *layer.parameters()], torch.randn_like(inputs)
    assert bank_chunk(**CHUNKED) is not None
    outputs = layer(inputs)
    gradients = torch.autograd.grad(outputs, wanted, weight)
    monkeypatch.setattr(s4d, "bank_chunk", lambda *_: None)
    convolved = layer(inputs)
    references = torch.autograd.grad(convolved, wanted, weight)
    tolerance = 2e-5 if dtype == torch.float32 else 1e-11
    assert not torch.equal(outputs, convolved)
    for actual, expected in zip((outputs, *gradients), (convolved, *references), strict=True):
        assert relative_error(actual, expected) < tolerance


def test_single_precision_over_many_steps() -> None:
    torch.manual_seed(0)
    layer = S4D(2, 8, dt_min=1e-4, dt_max=1e-3)
    inputs = torch.randn(1, 16_000, 2)
    assert bank_chunk(1, 16_000, 8) is not None
    wide = S4D(2, 8, dtype=torch.float64)
    wide.load_state_dict(layer.state_dict())
    assert relative_error(layer(inputs).double(), wide(inputs.double())) < 5e-5


def test_autocast_leaves_it_alone_in_both_passes() -> None:
    torch.manual_seed(0)
    layer = S4D(4, CHUNKED["states"])
    inputs = torch.randn(CHUNKED["batch"], CHUNKED["length"], 4)
    plain = layer(inputs)
    plain.sum().backward()
    gradients = {name: p.grad.clone() for name, p in layer.named_parameters()}
    layer.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = layer(inputs)
        outputs.sum().backward()
    assert torch.equal(outputs, plain)
    for name, p in layer.named_parameters():
        assert torch.equal(p.grad, gradients[name]), name


def test_few_sequences_of_many_states_and_many_of_few_are_run_in_chunks() -> None:
    assert bank_chunk(16, 1024, 16) == 32
    assert bank_chunk(2, 8192, 128) == 32
    assert bank_chunk(2048, 1, 4) == 1
    assert bank_chunk(50, 784, 64) is None
    assert bank_chunk(1, 256, 4) is None
    assert bank_chunk(0, 1024, 4) is None
