"""Hankel singular values and reduction: against textbook methods, and as a share of a training."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.models.classifier import SequenceClassifier
from benchmarks.speed import textbook
from benchmarks.speed.results import Ratio, Row, Section
from benchmarks.speed.step import training_step
from benchmarks.speed.suites import AnalysisCase, ShareCase, Suite
from benchmarks.speed.timing import Measure, Report, Rounds, interleave, local
from lightning_compressm import compress
from lightning_compressm.control import DiagonalLTI, balanced_truncation
from lightning_compressm.families import Family, find_family
from lightning_compressm.nn import LRU

NOTES = [
    "An LRU is reduced to half its states, infinite horizon. Look: all that compress() does, on a "
    "copy: Hankel singular values, the decision, projections, new parameters. BT: the singular "
    "values and the reduced system alone, by balanced_truncation(). Textbook: the same as BT by "
    "dense Gramians in closed form, scipy.linalg.sqrtm, SVD, eigenvectors and solve.",
    "Real: of the 2N real states that the outputs depend on, the package's default. Complex: of "
    "the N complex ones, as published; 'complex textbook / real look' compares the published form "
    "with the package's default.",
]
CHANNELS, CLASSES = 3, 10
_ONCE_MORE = Rounds(2, 2, 0)  # of every seed


def run(suite: Suite, threads: int, report: Report) -> list[Section]:
    """Measure all cases of a suite."""
    rows = [analysis_row(case, suite.seeds, threads, report) for case in suite.analysis]
    share = share_row(suite.share, suite.seeds, threads, report)
    return [
        Section("analysis", "Analysis and reduction of an LRU layer", threads, rows, NOTES),
        Section(
            "share", "Share of a training that the analysis takes", threads, [share[0]], share[1]
        ),
    ]


def look_at(layer: LRU, balance: textbook.Form) -> None:
    states = max(1, layer.d_state // 2)
    compress(copy.deepcopy(layer), state_dim=states, balance=balance, horizon=None)


def system_of(layer: LRU) -> DiagonalLTI:
    family = find_family(layer)
    assert isinstance(family, Family)
    return family.system(layer)


def as_arrays(system: DiagonalLTI) -> textbook.System:
    wide = system.double()
    return textbook.System(*(t.detach().numpy() for t in (wide.eigenvalues, wide.B, wide.C)))


def calls_of(case: AnalysisCase, seed: int) -> dict[str, Callable[[], object]]:
    """Everything that is compared, for one draw of the layer."""
    torch.manual_seed(seed)
    layer = LRU(case.width, case.states)
    lti, half = system_of(layer), max(1, case.states // 2)
    system = as_arrays(lti)
    calls: dict[str, Callable[[], object]] = {
        "look, real": partial(look_at, layer, "real"),
        "look, complex": partial(look_at, layer, "complex"),
        "BT, real": partial(balanced_truncation, lti, half),
        "textbook, real": partial(textbook.truncate, system, half, "real"),
        "textbook, complex": partial(textbook.truncate, system, half, "complex"),
    }
    if case.pymor and importlib.util.find_spec("pymor") is not None:
        silence_pymor()
        calls["pyMOR, real"] = partial(textbook.by_pymor, system, half)
    return calls


def over_seeds(
    make: Callable[[int], dict[str, Measure]], seeds: int, report: Report
) -> dict[str, list[float]]:
    """Measure what `make` returns for each seed, and put the rounds of all seeds together."""
    together: dict[str, list[float]] = {}
    for seed in range(seeds):
        for name, seconds in interleave(make(seed), _ONCE_MORE, report).items():
            together.setdefault(name, []).extend(seconds)
    return together


def analysis_row(case: AnalysisCase, seeds: int, threads: int, report: Report) -> Row:
    def make(seed: int) -> dict[str, Measure]:
        return {name: local(call, threads) for name, call in calls_of(case, seed).items()}

    found = over_seeds(make, seeds, lambda name: report(f"N={case.states}: {name}"))
    real, complex_ = found["look, real"], found["look, complex"]
    cells: dict[str, Ratio | str] = {
        "real: textbook / look": Ratio.of(found["textbook, real"], real, case.target),
        "real: textbook / BT": Ratio.of(found["textbook, real"], found["BT, real"]),
        "complex: textbook / look": Ratio.of(found["textbook, complex"], complex_),
        "complex textbook / real look": Ratio.of(found["textbook, complex"], real),
        "real: pyMOR / look": "not installed" if case.pymor else "left out: slow",
    }
    if "pyMOR, real" in found:
        cells["real: pyMOR / look"] = Ratio.of(found["pyMOR, real"], real)
    return Row(f"LRU, H={case.width}", f"N={case.states}", cells, case.states, found)


def share_row(case: ShareCase, seeds: int, threads: int, report: Report) -> tuple[Row, list[str]]:
    """Relate looks at all blocks to the steps of a run, from one step at a smaller batch."""

    def make(seed: int) -> dict[str, Measure]:
        torch.manual_seed(seed)
        model = SequenceClassifier(
            CHANNELS, CLASSES, case.width, case.states, case.blocks, dropout=0.1
        )
        inputs = torch.randn(case.measured_batch, case.length, CHANNELS)
        step = training_step(model, inputs, torch.randn(case.measured_batch, CLASSES))
        half = max(1, case.states // 2)

        def look() -> None:
            compress(copy.deepcopy(model), state_dim=half, sample=inputs)

        return {"look": local(look, threads), "step": local(step, threads)}

    found = over_seeds(make, seeds, lambda name: report(f"share of a run: {name}"))
    factor = case.batch / case.measured_batch
    looks = [case.looks * seconds for seconds in found["look"]]
    training = [case.steps * factor * seconds for seconds in found["step"]]
    share = Ratio.of(looks, training, case.target, at_most=True, format="percent")
    group = f"{case.blocks} blocks, N={case.states} H={case.width} L={case.length}"
    label = f"{case.looks} looks in {case.steps} steps of batch {case.batch}"
    notes = [
        "Looks and steps are counted at the full size, every look with a reduction of all blocks "
        f"to half. A step was measured with batch {case.measured_batch} and EXTRAPOLATED in "
        f"proportion to batch {case.batch}; the run itself was not made."
    ]
    return Row(group, label, {"analysis / training": share}, seconds=found), notes


def silence_pymor() -> None:
    from pymor.core.logger import set_log_levels

    set_log_levels({"pymor": "ERROR"})
