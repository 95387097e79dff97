"""Clocks for work that a device does while Python goes on."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from benchmarks.speed.timing import Measure


def wait(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def on_device(call: Callable[[], object], device: torch.device) -> Measure:
    """Measure work that need not wait for the device: by CUDA's events, else on the wall.

    The time between two events holds gaps in which the device waits for Python, as training does.
    """
    if device.type != "cuda":
        return on_the_wall(call, device)

    def measure(count: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        wait(device)
        start.record()
        for _ in range(count):
            call()
        end.record()
        wait(device)
        return start.elapsed_time(end) / 1e3 / count

    return measure


def on_the_wall(call: Callable[[], object], device: torch.device) -> Measure:
    """Measure work that goes to and fro between device and CPU, such as an analysis."""

    def measure(count: int) -> float:
        wait(device)
        start = time.perf_counter()
        for _ in range(count):
            call()
        wait(device)
        return (time.perf_counter() - start) / count

    return measure
