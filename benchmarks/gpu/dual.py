"""Tokens a second of a Mamba-2 stack in training, at the number of states that we cut it to."""

from __future__ import annotations

import copy
import importlib
import statistics
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from benchmarks.gpu import files
from benchmarks.gpu.job import Job
from benchmarks.gpu.measuring import on_device
from benchmarks.gpu.sizes import DualCase, Sizes
from benchmarks.gpu.steps import ratio
from benchmarks.models.language import MixerBlock
from benchmarks.speed.timing import interleave
from lightning_compressm import compress, find_ssm_layers
from lightning_compressm.nn._mamba import Mamba2Block

OURS = "the package's block in plain PyTorch (mamba-ssm is missing)"
THEIRS = "mamba-ssm's block with its kernels"
HEADER = ("states", "tokens/s", "ms", "times faster than the largest N")


def mixer_of(case: DualCase, device: torch.device) -> tuple[str, Callable[[], nn.Module]]:
    """What the stack is made of, in words and as something that makes one."""
    heads = 2 * case.width // case.head
    if device.type == "cuda" and find_spec("mamba_ssm") is not None:
        block: Any = importlib.import_module("mamba_ssm").Mamba2
        return THEIRS, lambda: block(case.width, d_state=case.states[0], headdim=case.head)
    return OURS, lambda: Mamba2Block(case.width, case.states[0], heads=heads, groups=1)


def cut(full: nn.Module, states: int, sample: torch.Tensor) -> nn.Module:
    """A copy with so many states; not refitted, since only its shapes matter here."""
    model = copy.deepcopy(full)
    compress(model, state_dim=states, sample=sample, refit=False, max_output_error=None)
    got = {layer.state_dim for layer in find_ssm_layers(model).values()}
    if got != {states}:
        raise AssertionError(f"expected layers with {states} states, got {got}")
    return model


def training_step(model: nn.Module, inputs: torch.Tensor) -> Callable[[], None]:
    """Forward pass in bfloat16 by autocast, backward pass, AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(inputs.device.type, torch.bfloat16):
            loss = model(inputs).float().square().mean()
        loss.backward()
        optimizer.step()

    return step


def measure(job: Job, sizes: Sizes) -> tuple[dict[str, Any], str]:
    """Seconds of every round by number of states; and the table."""
    case, device = sizes.dual, job.device
    torch.manual_seed(0)
    words, make = mixer_of(case, device)
    full = nn.Sequential(*(MixerBlock(case.width, make()) for _ in range(case.blocks))).to(device)
    inputs = torch.randn(case.batch, case.length, case.width, device=device)
    sample = inputs[:1, : min(case.length, 256)]
    models = {n: full if n == case.states[0] else cut(full, n, sample) for n in case.states}
    names = {f"N={n}": n for n in case.states}
    steps = {name: training_step(models[n], inputs) for name, n in names.items()}
    measures = {name: on_device(step, device) for name, step in steps.items()}
    seconds = interleave(measures, sizes.rounds)
    tokens = case.batch * case.length
    largest = seconds[f"N={case.states[0]}"]
    rows = [
        [
            name,
            f"{tokens / statistics.median(own):,.0f}",
            f"{1e3 * statistics.median(own):.3g}",
            ratio(largest, own),
        ]
        for name, own in seconds.items()
    ]
    note = (
        f"{case.blocks} Mamba-2 blocks, {words}; H={case.width}, heads of {case.head}, "
        f"B={case.batch}, L={case.length}, bfloat16 by autocast; a step is forward pass, backward "
        "pass and AdamW. Cut by `compress(state_dim=N)`.\n\n"
    )
    found = {"blocks": words, "tokens in a step": tokens, "seconds": seconds}
    return found, files.table(HEADER, rows) + note
