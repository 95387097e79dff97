"""What tests of chunk-wise forms share: sizes, and gradients compared with a reference's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.nn._reference import relative_error

SIZES = {
    "batch": st.integers(1, 3),
    "length": st.integers(1, 40),
    "width": st.integers(1, 4),
    "states": st.integers(1, 6),
    "chunk": st.integers(1, 20),
}


def assert_same_with_gradients(actual: Tensor, expected: Tensor, wanted: Sequence[Tensor]) -> None:
    """Equal in double precision, and so are the gradients of everything in ``wanted``."""
    assert relative_error(actual, expected) < 1e-11
    weight = torch.randn_like(expected)
    gradients = torch.autograd.grad(actual, wanted, weight)
    references = torch.autograd.grad(expected, wanted, weight)
    for gradient, reference in zip(gradients, references, strict=True):
        assert relative_error(gradient, reference) < 1e-10
