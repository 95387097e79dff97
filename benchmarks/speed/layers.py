"""The recurrence alone, forward and backward, against other ways to compute it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.speed import peers
from benchmarks.speed.jax_client import JaxError, JaxLayer
from benchmarks.speed.results import Ratio, Row, Section
from benchmarks.speed.step import forced_scan
from benchmarks.speed.suites import LayerCase, Suite
from benchmarks.speed.timing import Measure, Report, interleave, local
from lightning_compressm.nn import LRU
from lightning_compressm.nn._chunked import best_chunk

OURS = "ours"
FORCED = "ours, forced scan over all steps"
JAX = "published layer, JAX"
NOTES = [
    "The same LRU layer, parameters and inputs, forward and backward pass of all parameters and "
    "the inputs. How many times longer each takes than ours.",
    "Published layer: our own writing of it in JAX (jit, vmap, associative_scan), in a process of "
    "its own on the same core, which measures in turn with ours. Its outputs and gradients are "
    "checked against ours first.",
]


def problem(case: LayerCase) -> tuple[LRU, Tensor, Tensor]:
    """A layer, its inputs, and the gradient of a loss by its outputs."""
    torch.manual_seed(0)
    shape = (case.batch, case.length, case.width)
    return LRU(case.width, case.states), torch.randn(shape), torch.randn(shape)


def both_passes(
    form: Callable[[LRU, Tensor], Tensor], layer: LRU, inputs: Tensor, grad: Tensor
) -> None:
    inputs = inputs.detach().requires_grad_()
    torch.autograd.grad(form(layer, inputs), (inputs, *layer.parameters()), grad)


def ours(layer: LRU, inputs: Tensor) -> Tensor:
    outputs: Tensor = layer(inputs)
    return outputs


def scanned(layer: LRU, inputs: Tensor) -> Tensor:
    with forced_scan():
        return ours(layer, inputs)


def run(suite: Suite, threads: int, report: Report, jax_python: Path | None) -> list[Section]:
    """Measure all cases of a suite."""
    rows: list[Row] = []
    with ExitStack() as stack:
        try:
            jax: JaxLayer | str = stack.enter_context(JaxLayer(jax_python, threads))
        except JaxError as error:
            jax = str(error)
        for case in suite.layers:
            rows += measure(case, suite, threads, report, jax)
    notes = [*NOTES, *([] if isinstance(jax, str) else [f"JAX {jax.version}."])]
    return [Section("layer", "LRU layer against other implementations", threads, rows, notes)]


def measure(
    case: LayerCase, suite: Suite, threads: int, report: Report, jax: JaxLayer | str
) -> list[Row]:
    """Measure one case; `jax` may be the reason why it is not there."""
    layer, inputs, grad = problem(case)
    chunk = best_chunk(case.length, case.width, case.states)
    forced = scanned if chunk else "the same: ours is that scan here"
    forms: dict[str, peers.Form | str] = {OURS: ours, FORCED: forced, **peers.forms()}
    missing = {name: form for name, form in forms.items() if isinstance(form, str)}
    measures: dict[str, Measure] = {
        name: local(partial(both_passes, form, layer, inputs, grad), threads)
        for name, form in forms.items()
        if not isinstance(form, str)
    }
    if isinstance(jax, str):
        missing[JAX] = jax
    else:
        report(f"{JAX}: compiling")
        jax.load(layer, inputs, grad)
        measures[JAX] = jax.measure
    found = interleave(measures, suite.rounds, report)
    group = f"B={case.batch} L={case.length} H={case.width} N={case.states}; ours: "
    group += f"in chunks of {chunk}" if chunk else "a scan over all steps"
    rows = []
    for name in (JAX, *(name for name in forms if name != OURS)):
        target = case.target if name == JAX else None
        ratio = (
            Ratio((), target, missing=missing[name])
            if name in missing
            else Ratio.of(found[name], found[OURS], target)
        )
        raw = {} if name in missing else {name: found[name], OURS: found[OURS]}
        rows.append(Row(group, name, {"times ours": ratio}, seconds=raw))
    return rows
