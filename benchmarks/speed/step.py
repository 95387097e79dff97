"""A whole training step of a block against its number of states."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.models.classifier import ResidualBlock
from benchmarks.models.language import MixerBlock
from benchmarks.speed.results import Ratio, Row, Section
from benchmarks.speed.suites import NEAR_FLOOR, StepCase, Suite
from benchmarks.speed.timing import Measure, Report, interleave, local
from lightning_compressm.nn import LRU, S4D, S5, _fused
from lightning_compressm.nn._bank import bank_chunk
from lightning_compressm.nn._chunked import best_chunk
from lightning_compressm.nn._mamba import Mamba2Block, MambaBlock

NOTES = [
    "A step: forward pass of a block, backward pass down to its inputs, AdamW. LRU, S4D and S5 are "
    "in the residual block of the published experiments (BatchNorm, layer, GELU, gated linear "
    "unit), Mamba in a residual block with an RMSNorm.",
    "'no state' is the same block with D u in place of the layer; for Mamba without the scan and "
    "its projections, D u times the gate. It is the floor: what no reduction can make faster.",
    "LRU and S5 choose the faster of two forms for each N: in chunks of Q steps, or as a scan over "
    "all steps. The columns with 'scan' show what a scan at every N would give. S4D chooses chunks "
    "or an FFT.",
]


class Feedthrough(nn.Module):
    """y = D u: what is left of a layer without states."""

    def __init__(self, d_model: int, d_state: int) -> None:
        super().__init__()
        self.D = nn.Parameter(torch.randn(d_model))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.D * inputs


class StatelessMamba(MambaBlock):
    """Projections, convolution and gate of Mamba around D u."""

    def forward(self, inputs: Tensor) -> Tensor:
        x, z = self.in_proj(inputs).mT.chunk(2, 1)
        x = F.silu(self.conv1d(x)[..., : inputs.shape[1]])
        outputs: Tensor = self.out_proj((x * self.D.unsqueeze(-1) * F.silu(z)).mT)
        return outputs


class StatelessMamba2(Mamba2Block):
    """The same of Mamba-2, with its norm."""

    def forward(self, inputs: Tensor) -> Tensor:
        channels = self.out_proj.in_features
        z, rest = self.in_proj(inputs).tensor_split([channels], -1)
        xbc = rest[..., : self.conv1d.in_channels]
        x = F.silu(self.conv1d(xbc.mT)[..., : inputs.shape[1]].mT)[..., :channels]
        y = (x.unflatten(-1, (len(self.D), -1)) * self.D.unsqueeze(-1)).flatten(-2)
        outputs: Tensor = self.out_proj(self.norm(y * F.silu(z)))
        return outputs


LAYERS: dict[str, Callable[[int, int], nn.Module]] = {"LRU": LRU, "S4D": S4D, "S5": S5}
MIXERS: dict[str, tuple[Callable[[int, int], nn.Module], Callable[[int, int], nn.Module]]] = {
    "Mamba": (MambaBlock, StatelessMamba),
    "Mamba-2": (Mamba2Block, StatelessMamba2),
}
CHUNKED = ("LRU", "S5")


def make_block(case: StepCase, states: int | None) -> nn.Module:
    """A block with so many states; None for the one without any."""
    torch.manual_seed(0)
    if case.layer in LAYERS:
        layer = Feedthrough if states is None else LAYERS[case.layer]
        return ResidualBlock(case.width, states or 1, layer, case.dropout)
    with_scan, without = MIXERS[case.layer]
    mixer = without(case.width, 1) if states is None else with_scan(case.width, states)
    return MixerBlock(case.width, mixer)


def forced_scan() -> contextlib.AbstractContextManager[object]:
    """Let LRU and S5 scan over all steps, whatever N is."""
    return patch.object(_fused, "best_chunk", return_value=None)


def training_step(
    block: nn.Module,
    inputs: Tensor,
    grad: Tensor,
    penalty: Callable[[nn.Module], Tensor] | None = None,
) -> Callable[[], None]:
    """A step of training; with `penalty`, its value for the block is part of the loss."""
    # With so small a rate the block stays the same over all repeats.
    optimizer = torch.optim.AdamW(block.parameters(), lr=1e-6, fused=True)
    inputs = inputs.clone().requires_grad_()

    def step() -> None:
        optimizer.zero_grad()
        inputs.grad = None
        outputs = block(inputs)
        if penalty is None:
            outputs.backward(grad)
        else:
            torch.autograd.backward([outputs, penalty(block)], [grad, None])
        optimizer.step()

    return step


def scanning(step: Callable[[], None]) -> Callable[[], None]:
    def forced() -> None:
        with forced_scan():
            step()

    return forced


def inputs_and_grad(case: StepCase) -> tuple[Tensor, Tensor]:
    """What goes into a block, and the loss's gradient at its output."""
    generator = torch.Generator().manual_seed(1)
    shape = (case.batch, case.length, case.width)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def measures_of(case: StepCase, threads: int) -> dict[str, Measure]:
    """Everything that one case compares: no state, every N, and every N as a forced scan."""
    inputs, grad = inputs_and_grad(case)
    steps = {"no state": training_step(make_block(case, None), inputs, grad)}
    for states in case.states:
        steps[f"N={states}"] = training_step(make_block(case, states), inputs, grad)
        if chunk_of(case, states) is not None:
            block = make_block(case, states)
            steps[f"N={states} scan"] = scanning(training_step(block, inputs, grad))
    return {name: local(step, threads) for name, step in steps.items()}


def chunk_of(case: StepCase, states: int) -> int | None:
    """Steps in a chunk that the layer chooses; None for a scan over all steps."""
    if case.layer not in CHUNKED:
        return None
    return best_chunk(case.length, case.width, states)


def form_of(case: StepCase, states: int) -> str | None:
    """What the layer chooses at this size; None where there is no choice."""
    if case.layer == "S4D":
        chunk = bank_chunk(case.batch, case.length, states)
        return f"Q={chunk}" if chunk else "FFT"
    if case.layer not in CHUNKED:
        return None
    chunk = chunk_of(case, states)
    return f"Q={chunk}" if chunk else "scan"


def rows_of(case: StepCase, seconds: dict[str, list[float]]) -> list[Row]:
    sizes = f"B={case.batch} L={case.length} H={case.width}"
    group = f"{case.layer}, {sizes}" + (f" ({case.name})" if case.name else "")
    largest = case.states[0]
    rows = []
    for states in case.states:
        form, own = form_of(case, states), seconds[f"N={states}"]
        cells: dict[str, Ratio | str] = {} if form is None else {"form": form}
        gain = dict(case.gains).get(states)
        near = NEAR_FLOOR if gain is not None and case.layer == "LRU" else None
        cells["/ no state"] = Ratio.of(own, seconds["no state"], near, at_most=True)
        forced = seconds.get(f"N={states} scan")
        if forced is not None:
            cells["scan / no state"] = Ratio.of(forced, seconds["no state"])
        elif case.layer in CHUNKED:
            cells["scan / no state"] = "the same"
        if states != largest:
            cells["largest N / this"] = Ratio.of(seconds[f"N={largest}"], own, gain)
        if states != largest and f"N={largest} scan" in seconds:
            cells["the same, as scans"] = Ratio.of(seconds[f"N={largest} scan"], forced or own)
        raw = {"step": own, "no state": seconds["no state"]}
        raw |= {} if forced is None else {"forced scan": forced}
        rows.append(Row(group, f"N={states}", cells, states, raw))
    return rows


def run(suite: Suite, threads: int, report: Report) -> list[Section]:
    """Measure all cases of a suite."""
    rows = []
    for case in suite.steps:
        measures = measures_of(case, threads)
        found = interleave(measures, suite.rounds, lambda n, c=case: report(f"{c.layer} {n}"))  # type: ignore[misc]
        rows += rows_of(case, found)
    return [Section("step", "Training step of a block", threads, rows, NOTES)]
