"""S4D's own: its kernel, and how it starts."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_compressm.nn import S4D
from lightning_compressm.nn._convolution import _fast_size


@pytest.mark.parametrize("method", ["zoh", "bilinear"])
@pytest.mark.parametrize("length", [1, 2, 3, 10, 37])
def test_kernel_is_the_impulse_response(length: int, method: str):
    layer = S4D(3, 4, discretization=method, dtype=torch.float64)
    impulse = torch.zeros(1, length, 3, dtype=torch.float64)
    impulse[:, 0] = 1
    response = layer(impulse)[0].T
    response[:, 0] -= layer.D
    torch.testing.assert_close(layer.kernel(length), response, rtol=1e-10, atol=1e-12)


def test_kernel_in_half_precision_comes_in_single():
    assert S4D(3, 4, dtype=torch.bfloat16).kernel(5).dtype == torch.float32


@pytest.mark.parametrize("length", [0, 2.0, True])
def test_kernel_needs_a_length(length: object):
    with pytest.raises(ValueError, match="length must be an integer >= 1"):
        S4D(3, 4).kernel(length)


def test_channels_do_not_mix():
    layer, inputs = S4D(3, 4), torch.randn(1, 20, 3)
    other = inputs.clone()
    other[..., 1] = 0
    assert torch.equal(layer(inputs)[..., [0, 2]], layer(other)[..., [0, 2]])
    assert not torch.equal(layer(inputs)[..., 1], layer(other)[..., 1])


@pytest.mark.parametrize(
    ("init", "expected"),
    [
        # Gu et al. 2022 with N = 6 real, that is 3 complex states: pi n, and
        # N/pi (N/(2n+1) - 1); the quadratic one is (1+2n)^2/pi.
        ("lin", [0.0, math.pi, 2 * math.pi]),
        ("inv", [30 / math.pi, 6 / math.pi, 1.2 / math.pi]),
        ("quad", [1 / math.pi, 9 / math.pi, 25 / math.pi]),
    ],
)
def test_starts_as_published(init: str, expected: list[float]):
    layer = S4D(2, 3, init=init, dtype=torch.float64)
    expected_rows = torch.tensor([expected, expected], dtype=torch.float64)
    torch.testing.assert_close(layer.A_imag.detach(), expected_rows)
    torch.testing.assert_close(layer.log_A_real.exp().detach(), torch.full_like(expected_rows, 0.5))


def test_legs_starts_from_hippo():
    """The inverse law is the published approximation of these eigenvalues: largest ones agree."""
    legs, inverse = S4D(1, 64, init="legs").A_imag[0], S4D(1, 64, init="inv").A_imag[0]
    largest = legs.sort(descending=True).values
    torch.testing.assert_close(largest[:3], inverse[:3], rtol=0.05, atol=0)
    assert largest.min() > 0


def test_read_out_has_unit_variance():
    torch.manual_seed(0)
    C = torch.view_as_complex(S4D(200, 50).C.detach())
    assert C.abs().square().mean().item() == pytest.approx(1.0, rel=0.05)
    assert C.mean().abs() < 0.05


@pytest.mark.parametrize("least", [1, 2, 3, 31, 97, 1000, 1567, 2047, 8191])
def test_sizes_of_transforms(least: int):
    size = _fast_size(least)
    assert least <= size <= max(4, 1.25 * least)
    for factor in (2, 3, 5):
        while size % factor == 0:
            size //= factor
    assert size == 1
