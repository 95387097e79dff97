"""Selective layers: the scan against other ways to compute it, and whole blocks against N."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.models.language import MixerBlock
from benchmarks.speed.results import Ratio, Row, Section
from benchmarks.speed.step import training_step
from benchmarks.speed.suites import SelectiveCase, Suite
from benchmarks.speed.timing import Measure, Report, interleave, local
from lightning_compressm.compat import enable_mamba_ssm_cpu
from lightning_compressm.nn import selective_scan
from lightning_compressm.nn._mamba import Mamba2Block, MambaBlock

Scan = Callable[..., Any]
OURS = "ours"
SLOW_PATH = "transformers' slow path"
OUR_SCAN: Scan = selective_scan
# Work within Mamba-2's chunks does not depend on N: the length of a chunk decides the gain.
CHUNKS = (64, 256)
HEADS = 4
NOTES = [
    "The scan: forward and backward pass of all arguments, how many times longer than ours. "
    "transformers' and mamba_ssm's are their pure PyTorch paths, which are what a CPU gets. Both "
    "index the sequence step by step, so that their backward pass is quadratic in the length: "
    "that they gain more from fewer states is an artefact of this, and is not shown as a gain.",
    "Blocks: a training step at the largest N over one at the smallest.",
]


def arguments(case: SelectiveCase) -> dict[str, Any]:
    """Arguments of the scan, as a Mamba block with twice as many channels inside makes them."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    dim, states = 2 * case.width, case.states[0]
    sequence, shared = (case.batch, dim, case.length), (case.batch, states, case.length)
    decays = -torch.arange(1.0, states + 1).expand(dim, states)
    tensors = {
        "u": normal(*sequence),
        "delta": F.softplus(normal(*sequence) - 2),
        "A": decays.contiguous(),
        "B": normal(*shared),
        "C": normal(*shared),
        "D": torch.ones(dim),
        "z": normal(*sequence),
    }
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


def both_passes(scan: Scan, tensors: dict[str, Any], grad: Tensor) -> Callable[[], None]:
    def call() -> None:
        torch.autograd.grad(scan(*tensors.values()), list(tensors.values()), grad)

    return call


def transformers_scan() -> Scan | str:
    """The fallback of transformers' Mamba, or why it is not there."""
    if not installed("transformers"):
        return "not installed: pip install transformers"
    hush_transformers()  # it tells that it takes its slow path, which is what is measured
    module = importlib.import_module("transformers.models.mamba.modeling_mamba")
    scan = getattr(module, "mamba_selective_scan", None)
    if scan is None:
        return "no mamba_selective_scan in this version of transformers"
    # Where enable_fast_mamba_cpu() has put ours in its place, the original is kept here.
    original: Scan = getattr(scan, "_compressm_slow", scan)
    return original


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def hush_transformers() -> None:
    importlib.import_module("transformers.utils.logging").set_verbosity_error()


def mamba_ssm_scan(wanted: bool) -> Scan | str:
    """The reference implementation of mamba_ssm, or why it is not there."""
    if not installed("mamba_ssm"):
        return "not installed: see docs/supported.md"
    if not wanted:
        return "left out: --suite full measures it"  # importing it takes longer than all else
    enable_mamba_ssm_cpu()
    module = importlib.import_module("mamba_ssm.ops.selective_scan_interface")
    scan: Scan = module.selective_scan_ref
    return scan


class MixerOutput(nn.Module):
    """A mixer of transformers that takes its inputs by the name they have there."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.mixer(inputs)
        return outputs


def mamba2_mixer(width: int, states: int, chunk: int) -> nn.Module:
    """Transformers' Mamba-2 layer."""
    module: Any = importlib.import_module("transformers.models.mamba2.modeling_mamba2")
    config: Any = importlib.import_module("transformers").Mamba2Config(
        hidden_size=width,
        state_size=states,
        num_heads=HEADS,
        head_dim=2 * width // HEADS,
        n_groups=1,
        chunk_size=chunk,
        num_hidden_layers=1,
    )
    mixer: nn.Module = module.Mamba2Mixer(config, layer_idx=0)
    return mixer


def run(suite: Suite, threads: int, report: Report) -> list[Section]:
    """Measure all cases of a suite."""
    scans, blocks = [], []
    for case in suite.selective:
        scans += scan_rows(case, suite, threads, report)
        blocks += block_rows(case, suite, threads, report)
    return [
        Section("selective", "Selective scan against other implementations", threads, scans, NOTES),
        Section("selective_blocks", "Training step of Mamba blocks", threads, blocks),
    ]


def scan_rows(case: SelectiveCase, suite: Suite, threads: int, report: Report) -> list[Row]:
    tensors = arguments(case)
    grad = torch.ones_like(tensors["u"])
    scans: dict[str, Scan | str] = {
        SLOW_PATH: transformers_scan(),
        "mamba_ssm's reference": mamba_ssm_scan(suite.mamba_ssm),
    }
    found = {n: s for n, s in scans.items() if not isinstance(s, str)}
    for name, scan in found.items():
        check(name, scan, tensors)
    measures: dict[str, Measure] = {
        name: local(both_passes(scan, tensors, grad), threads)
        for name, scan in {OURS: OUR_SCAN, **found}.items()
    }
    seconds = interleave(measures, suite.rounds, report)
    dim = 2 * case.width
    group = f"B={case.batch} L={case.length}, {dim} channels, N={case.states[0]}"
    rows = []
    for name, reason in scans.items():
        if isinstance(reason, str):
            rows.append(Row(group, name, {"times ours": reason}))
            continue
        raw = {name: seconds[name], OURS: seconds[OURS]}
        target = case.target if name == SLOW_PATH else None
        ratio = Ratio.of(seconds[name], seconds[OURS], target)
        rows.append(Row(group, name, {"times ours": ratio}, seconds=raw))
    return rows


def check(name: str, scan: Scan, tensors: dict[str, Any]) -> None:
    """Raise unless another scan computes what ours does."""
    with torch.no_grad():
        ours: Tensor = OUR_SCAN(*tensors.values())
        theirs: Tensor = scan(*tensors.values())
    if not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3):
        raise RuntimeError(
            f"expected {name} to agree with selective_scan, got a difference of "
            f"{(ours - theirs).abs().max():.2g}; its times would compare nothing"
        )


def block_rows(case: SelectiveCase, suite: Suite, threads: int, report: Report) -> list[Row]:
    ends = (case.states[0], case.states[-1])
    makers: dict[str, Callable[[int], nn.Module]] = {
        "Mamba (the package's block)": lambda n: MambaBlock(case.width, n),
        "Mamba-2 (the package's block)": lambda n: Mamba2Block(case.width, n),
    }
    if installed("transformers"):
        for chunk in CHUNKS:
            makers[f"transformers' Mamba2Mixer, chunks of {chunk}"] = lambda n, c=chunk: (  # type: ignore[misc]
                MixerOutput(mamba2_mixer(case.width, n, c))
            )
    shape = (case.batch, case.length, case.width)
    inputs, grad = torch.randn(shape), torch.randn(shape)
    group = f"B={case.batch} L={case.length} H={case.width}, N={ends[0]} over N={ends[1]}"
    rows = []
    for name, make in makers.items():
        steps = {
            f"N={n}": training_step(MixerBlock(case.width, make(n)), inputs, grad) for n in ends
        }
        measures = {n: local(step, threads) for n, step in steps.items()}
        seconds = interleave(measures, suite.rounds, lambda n, m=name: report(f"{m} {n}"))  # type: ignore[misc]
        large, small = (seconds[f"N={n}"] for n in ends)
        rows.append(Row(group, name, {"large / small": Ratio.of(large, small)}, seconds=seconds))
    return rows
