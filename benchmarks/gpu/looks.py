"""What a look and a cut take, on the device and on the CPU."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.gpu import files
from benchmarks.gpu.job import Job
from benchmarks.gpu.measuring import wait
from benchmarks.gpu.sizes import LookCase, Sizes
from lightning_compressm import compress, hankel_spectra
from lightning_compressm.nn import LRU, S4D, S5
from lightning_compressm.nn._mamba import Mamba2Block, MambaBlock

LAYERS: dict[str, Callable[[int, int], nn.Module]] = {
    "LRU": LRU, "S4D": S4D, "S5": S5, "Mamba": MambaBlock, "Mamba-2": Mamba2Block,
}  # fmt: skip
REPEATS = 3
HEADER = (
    "layer", "states", "first look and cut, ms", "look, ms", "look and cut, ms",
    "on the CPU, ms", "CPU / device",
)  # fmt: skip
NOTE = (
    "Look: Hankel singular values of one layer. Look and cut: `compress` with AdamW carried along, "
    "the run on the sample included; the first one also loads libraries. On the CPU: the same look "
    "and cut, once, with the layer there. Wall time, the device waited for; medians of up to "
    f"{REPEATS} after the first.\n\n"
)


def once(layer: nn.Module, case: LookCase, device: torch.device) -> dict[str, float]:
    """Seconds of a look at a copy of the layer, and of a cut of it."""
    model = copy.deepcopy(layer).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    sample = torch.randn(case.batch, case.length, case.width, device=device)
    model(sample).square().mean().backward()
    optimizer.step()
    wait(device)
    start = time.perf_counter()
    hankel_spectra(model, sample=sample)
    wait(device)
    middle = time.perf_counter()
    compress(
        model, state_dim=case.kept, sample=sample, max_output_error=None, optimizers=[optimizer]
    )
    wait(device)
    return {"look": middle - start, "cut": time.perf_counter() - middle}


def measure(job: Job, sizes: Sizes) -> tuple[dict[str, Any], str]:
    """Seconds by case, on the device several times if there is time; and the table."""
    end = time.perf_counter() + sizes.rounds.seconds
    found: dict[str, Any] = {"threads of the CPU": torch.get_num_threads()}
    rows = []
    for case in sizes.looks:
        torch.manual_seed(0)
        layer = LAYERS[case.layer](case.width, case.states)
        times = [once(layer, case, job.device)]
        while len(times) < 2 or (len(times) <= REPEATS and time.perf_counter() < end):
            times.append(once(layer, case, job.device))
        there = once(layer, case, torch.device("cpu")) if case.on_cpu else None
        name = f"{case.layer} H={case.width}"
        found[f"{name} N={case.states}"] = {"device": times, "cpu": there}
        look, cut = (statistics.median(t[k] for t in times[1:]) for k in ("look", "cut"))
        rows.append(
            [
                name,
                f"{case.states} to {case.kept}",
                f"{1e3 * times[0]['cut']:.1f}",
                f"{1e3 * look:.1f}",
                f"{1e3 * cut:.1f}",
                "" if there is None else f"{1e3 * there['cut']:.1f}",
                "" if there is None else f"{there['cut'] / cut:.2f}",
            ]
        )
    return found, files.table(HEADER, rows) + NOTE
