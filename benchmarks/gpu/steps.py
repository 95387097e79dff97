"""Training steps against the number of states, all sizes of all layers in turn."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.gpu import files
from benchmarks.gpu.job import Job
from benchmarks.gpu.measuring import on_device, wait
from benchmarks.gpu.sizes import Sizes
from benchmarks.speed.step import chunk_of, inputs_and_grad, make_block, scanning, training_step
from benchmarks.speed.suites import StepCase
from benchmarks.speed.timing import interleave
from lightning_compressm.nn import _forms

NOTE = (
    "A step: forward pass of a residual block, backward pass down to its inputs, AdamW; in float32 "
    "without TF32. `no state` is the same block with D u in place of the layer. `scan` is a layer "
    "that would choose chunks, made to scan over all steps; `plain scan` is that scan in plain "
    "PyTorch in place of the Triton kernel. Medians over rounds in which everything is measured "
    "once, in turn; a ratio is taken within a round, and shown with its lowest and highest value. "
    "MiB: the most memory that a step takes beyond what was there before.\n\n"
)
Step = Callable[[], None]


def plainly(step: Step) -> Step:
    """The same with scans in plain PyTorch."""

    def plain() -> None:
        with patch.object(_forms, "_kernel", lambda device: None):
            step()

    return plain


def steps_of(case: StepCase, device: torch.device) -> dict[str, Step]:
    """Everything that one case compares, by name."""
    inputs, grad = (t.to(device) for t in inputs_and_grad(case))

    def new(states: int | None) -> Step:
        return training_step(make_block(case, states).to(device), inputs, grad)

    steps = {"no state": new(None)}
    for states in case.states:
        steps[f"N={states}"] = new(states)
    largest = case.states[0]
    if chunk_of(case, largest) is not None:
        steps[f"N={largest}, scan"] = scanning(new(largest))
    if case.layer in ("LRU", "S5"):
        steps[f"N={largest}, plain scan"] = plainly(scanning(new(largest)))
    return steps


def memory(step: Step, device: torch.device) -> float | None:
    """MiB that a step takes at most, beyond what is there before it; None on a CPU."""
    if device.type != "cuda":
        return None
    wait(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    wait(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def title(case: StepCase) -> str:
    """Layer and sizes."""
    name = f" ({case.name})" if case.name else ""
    return f"{case.layer} B={case.batch} L={case.length} H={case.width}{name}"


def measure(job: Job, sizes: Sizes) -> tuple[dict[str, Any], str]:
    """Seconds of every round, by case and name; and the table."""
    steps = {
        (title(case), name): step
        for case in sizes.steps
        for name, step in steps_of(case, job.device).items()
    }
    for step in steps.values():  # compiles, and lets optimizers make their state
        step()
    mib = {key: memory(step, job.device) for key, step in steps.items()}
    keys = {f"{case}: {name}": (case, name) for case, name in steps}
    measures = {text: on_device(steps[key], job.device) for text, key in keys.items()}
    seconds = interleave(measures, sizes.rounds)
    found: dict[str, Any] = {}
    for text, (case, name) in keys.items():
        entry = {"seconds": seconds[text], "MiB": mib[case, name]}
        found.setdefault(case, {})[name] = entry
    return found, files.table(HEADER, _rows(found)) + NOTE


HEADER = ("block", "states", "ms", "MiB", "times faster than the largest N", "times `no state`")


def _rows(found: dict[str, Any]) -> list[list[str]]:
    rows = []
    for case, names in found.items():
        floor = names["no state"]["seconds"]
        largest = next(e["seconds"] for n, e in names.items() if n != "no state")
        for name, entry in names.items():
            own, mib = entry["seconds"], entry["MiB"]
            rows.append([
                case, name, f"{1e3 * statistics.median(own):.3g}",
                "" if mib is None else f"{mib:.0f}", ratio(largest, own), ratio(own, floor),
            ])  # fmt: skip
    return rows


def ratio(above: list[float], below: list[float]) -> str:
    """Median, lowest and highest of ratios, round by round."""
    values = [a / b for a, b in zip(above, below, strict=True)]
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"
