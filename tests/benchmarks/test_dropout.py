from __future__ import annotations

import pytest
import torch

from benchmarks.models.dropout import Dropout


@pytest.mark.parametrize("p", [0.1, 0.5, 0.75])
def test_activations_are_dropped_with_probability_p_and_independently(p: float) -> None:
    torch.manual_seed(0)
    kept = Dropout(p)(torch.ones(1000, 1001)) != 0
    # Four standard deviations of the share of a million draws, and of neighbouring pairs.
    assert kept.double().mean() == pytest.approx(1 - p, abs=4e-3 * (p * (1 - p)) ** 0.5)
    flat = kept.flatten().double()
    for distance in (1, 2, 1001):
        pairs = (flat[distance:] - (1 - p)) * (flat[:-distance] - (1 - p))
        assert pairs.mean() == pytest.approx(0, abs=4e-3 * p * (1 - p))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_gradient_goes_through_the_same_mask(dtype: torch.dtype) -> None:
    # Drawn in single precision: in bfloat16 older versions of torch draw exact zeros.
    inputs = torch.randn(7, 9, 5).mT.to(dtype).requires_grad_()
    outputs = Dropout(0.25)(inputs)
    outputs.sum().backward()
    assert outputs.dtype == dtype
    assert torch.equal(outputs, inputs * inputs.grad)
    expected = (outputs != 0).to(dtype) / 0.75
    assert torch.equal(inputs.grad, expected)


def test_torch_seeds_it() -> None:
    masks = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        masks.append(Dropout(0.5)(torch.ones(100)))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


@pytest.mark.parametrize("p", [0.0, 1.0, 1 - 1e-12])
def test_extreme_probabilities(p: float) -> None:
    inputs = torch.randn(1000)
    expected = inputs if p == 0 else torch.zeros(1000)
    assert torch.equal(Dropout(p)(inputs), expected)


def test_evaluation_drops_nothing() -> None:
    inputs = torch.randn(10)
    assert Dropout(0.5).eval()(inputs) is inputs
