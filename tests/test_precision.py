"""Double precision, or the CPU where a device has none; devices are named, none is needed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_compressm._precision import back_to, double, wide_dtype, with_cpu_fallback

CPU, CUDA, MPS = (torch.device(name) for name in ("cpu", "cuda", "mps"))


class Elsewhere:
    """Stands for a tensor on another device: tells where it would go, and as what."""

    def __init__(self, device: torch.device, is_complex: bool = False):
        self.device, self.is_complex = device, lambda: is_complex

    def to(self, *goal: Any) -> tuple[Any, ...]:
        return tuple(str(part) for part in goal)


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [
        (torch.bfloat16, torch.float64),
        (torch.float32, torch.float64),
        (torch.complex64, torch.complex128),
    ],
)
def test_double_keeps_values_and_real_or_complex(dtype: torch.dtype, wide: torch.dtype):
    values = torch.tensor([0.5, -3.0], dtype=dtype)
    got = double(values)
    assert got.dtype == wide
    assert torch.equal(got.to(dtype), values)
    assert double(got) is got


def test_a_device_without_float64_sends_double_precision_to_the_cpu():
    assert double(Elsewhere(CUDA)) == ("cuda", "torch.float64")  # type: ignore[arg-type]
    assert double(Elsewhere(CUDA, True)) == ("cuda", "torch.complex128")  # type: ignore[arg-type]
    assert double(Elsewhere(MPS)) == ("cpu", "torch.float64")  # type: ignore[arg-type]
    assert [wide_dtype(d) for d in (CPU, CUDA, MPS)] == [torch.float64] * 2 + [torch.float32]


def test_values_go_back_where_the_device_can_hold_them():
    values = torch.ones(2, dtype=torch.float64)
    assert back_to(values, MPS) is values
    assert back_to(values, torch.device("meta")).device.type == "meta"


@pytest.mark.parametrize(
    ("device", "works", "tried"),
    [
        (CPU, True, [CPU]),
        (CUDA, True, [CUDA]),
        (CUDA, False, [CUDA, CPU]),
        (MPS, True, [CPU]),
    ],
)
def test_where_it_is_computed(device: torch.device, works: bool, tried: list[torch.device]):
    seen: list[torch.device] = []

    def compute(there: torch.device) -> torch.device:
        seen.append(there)
        if there.type != "cpu" and not works:
            raise NotImplementedError("no such kernel")
        return there

    assert with_cpu_fallback(compute, device) == tried[-1]
    assert seen == tried


def test_errors_of_the_cpu_and_lack_of_memory_are_passed_on():
    def fails(there: torch.device) -> None:
        raise RuntimeError(f"on {there}")

    with pytest.raises(RuntimeError, match="on cpu"):
        with_cpu_fallback(fails, CUDA)

    def full(there: torch.device) -> None:
        raise torch.OutOfMemoryError(f"on {there}")

    with pytest.raises(torch.OutOfMemoryError, match="on cuda"):
        with_cpu_fallback(full, CUDA)
