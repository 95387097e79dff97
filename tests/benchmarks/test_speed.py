"""The speed benchmark compares things that compute the same; how fast they are is not tested."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("scipy")

from benchmarks.common.command import parse
from benchmarks.speed import analysis, layers, memory, peers, selective, step, textbook
from benchmarks.speed import command as speed
from benchmarks.speed.jax_client import JaxError, JaxLayer
from benchmarks.speed.results import Ratio, Row, Section, missed
from benchmarks.speed.suites import (
    FULL,
    QUICK,
    SUITES,
    AnalysisCase,
    LayerCase,
    SelectiveCase,
    ShareCase,
    StepCase,
    Suite,
)
from benchmarks.speed.timing import Rounds, interleave, limited
from lightning_compressm.control import balanced_truncation
from lightning_compressm.nn import LRU, _fused, selective_scan

ONCE = Rounds(2, 2, 0)
TINY = Suite(
    steps=(
        StepCase("LRU", 2, 20, 2, (8, 3)),
        StepCase("S5", 2, 20, 2, (8, 3), 0.1),
        StepCase("S4D", 2, 20, 2, (8, 3)),
        StepCase("Mamba", 2, 20, 4, (8, 3)),
        StepCase("Mamba-2", 2, 20, 4, (8, 3)),
    ),
    layers=(LayerCase(2, 20, 2, 8, target=1e9), LayerCase(2, 20, 16, 4)),
    selective=(SelectiveCase(2, 20, 8, (8, 3)),),
    analysis=(AnalysisCase(8, 4, target=1e-9),),
    share=ShareCase(2, 8, 4, 20, 50, 2, 1000, 5, target=1e9),
    memory=(LayerCase(2, 20, 2, 8),),
    penalties=(StepCase("LRU", 2, 20, 2, (8, 3, 2)),),
    rounds=ONCE,
    seeds=1,
    mamba_ssm=False,
)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selective, "installed", lambda _: False)  # importing them takes long
    # Nothing is repeated to fill a stretch of time: these times mean nothing anyway.
    monkeypatch.setattr("benchmarks.speed.timing._SHORTEST", 1e-9)
    for name in SUITES:
        monkeypatch.setitem(SUITES, name, TINY)


def no_report(_: str) -> None:
    pass


def test_everything_is_measured_saved_and_drawn(
    tiny: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads, cores = torch.get_num_threads(), _cores()
    # A Python that is not there: the row says so, and all else goes on.
    arguments = ["--out", str(tmp_path / "a/speed.1"), "--jax-python", str(tmp_path / "python")]
    assert speed.main([*arguments, "--suite", "quick"]) == 0
    printed = capsys.readouterr().out
    assert "pip install jax" in printed
    assert "EXTRAPOLATED" in printed
    content = json.loads((tmp_path / "a/speed.1.json").read_text())
    assert content["device"] == "CPU"
    assert {"suite", "threads", "versions", "sections"} <= content.keys()
    assert content["seconds"].keys() == {"wall", "processor"}
    parts = [section["part"] for section in content["sections"]]
    assert parts == [
        "step", "layer", "selective", "selective_blocks", "analysis", "share", "penalty",
        "memory",
    ]  # fmt: skip
    for section in content["sections"]:
        assert section["rows"]
        for row in section["rows"]:
            assert {"group", "label", "states", "cells", "raw"} == row.keys()
            for cell in row["cells"].values():
                if isinstance(cell, dict) and cell["values"]:
                    assert cell["low"] <= cell["median"] <= cell["high"]
    assert (tmp_path / "a/speed.1.png").stat().st_size > 10_000
    assert (torch.get_num_threads(), _cores()) == (threads, cores)
    # Only the layer's target can't be met here, and it was not measured: that counts as missed.
    assert len(content["targets_missed"]) == 1
    assert "published layer" in content["targets_missed"][0]
    monkeypatch.setattr(speed, "draw", lambda *_: None)  # takes seconds, and was seen to work
    assert speed.main([*arguments, "--targets"]) == 1
    assert "target missed" in capsys.readouterr().out


def _cores() -> object:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None


def test_command_line(tmp_path: Path) -> None:
    def read(*words: str) -> speed.Settings:
        return parse(speed.Settings, "speed", None, words)

    assert read() == speed.Settings()
    assert read("--threads", "1", "2").threads == (1, 2)
    assert read("--jax-python", "there").jax_python == Path("there")
    with pytest.raises(SystemExit):
        read("--threads", "0")
    assert read("--parts", "step", "step").parts == ("step",)
    with pytest.raises(SystemExit):
        read("--targets", "--parts", "layer")
    with pytest.raises(SystemExit):  # targets are about the full sizes
        read("--suite", "quick", "--targets")


def test_targets_are_where_they_were_promised() -> None:
    assert [case.target for case in FULL.layers] == [20, 5, 4]
    assert [case.target for case in FULL.analysis if case.states == 384] == [2.5]
    assert FULL.share.target == 0.01
    assert [case.target for case in FULL.selective] == [50]
    gains = [(case.states[0], *gain) for case in FULL.steps for gain in case.gains]
    assert gains == [(256, 16, 3.5), (256, 16, 3.5), (384, 93, 1.6), (384, 32, 3.0), (128, 12, 6.5)]
    assert not any(case.target for case in (*QUICK.layers, *QUICK.analysis, QUICK.share))


def test_ratios_and_targets() -> None:
    ratio = Ratio.of([4.0, 6.0, 2.0], [2.0, 2.0, 2.0], target=2.0)
    assert ratio.values == (2.0, 3.0, 1.0)
    assert ratio.met is True
    assert ratio.text == "2x (1-3); target >= 2x: met"
    assert replace(ratio, target=2.1).met is False
    assert replace(ratio, target=2.1, at_most=True).met is True
    assert replace(ratio, target=None).met is None
    assert Ratio((), 2.0, missing="not there").text == "not there; target >= 2x: MISSED"
    share = Ratio((0.002,), 0.01, at_most=True, format="percent")
    assert share.text == "0.2%; target < 1%: met"
    rows = [
        Row("g", "fast", {"x": ratio}),
        Row("g", "slow", {"x": replace(ratio, target=9), "y": "a word"}),
    ]
    assert missed([Section("layer", "t", 1, rows)]) == [
        "g, slow, x: 2x (1-3); target >= 9x: MISSED"
    ]


def test_measured_in_turn_every_round_starting_with_another() -> None:
    order: list[str] = []

    def measure(name: str):
        def call(count: int) -> float:
            order.append(name)
            return 0.9

        return call

    found = interleave({name: measure(name) for name in "abc"}, Rounds(2, 9, 0))
    assert found == {name: [0.9, 0.9] for name in "abc"}  # no time is left after two rounds
    assert "".join(order) == "aabbcc" + "abc" + "bca"


def test_short_calls_are_repeated() -> None:
    counts: list[int] = []

    def measure(count: int) -> float:
        counts.append(count)
        return 0.03

    interleave({"": measure}, ONCE)
    assert counts == [1, 1, 4, 4]


def test_threads_and_cores_are_given_back() -> None:
    before = (torch.get_num_threads(), _cores())
    with limited(1):
        assert torch.get_num_threads() == 1
    assert before == (torch.get_num_threads(), _cores())


@pytest.mark.parametrize("case", [LayerCase(2, 37, 3, 5), LayerCase(3, 50, 2, 40)])
def test_peers_compute_what_the_layer_computes(case: LayerCase) -> None:
    layer, inputs, grad = layers.problem(case)
    inputs.requires_grad_()

    def passes(form: peers.Form) -> list[torch.Tensor]:
        outputs = form(layer, inputs)
        return [outputs, *torch.autograd.grad(outputs, (inputs, *layer.parameters()), grad)]

    expected = passes(layers.ours)
    for form in (layers.scanned, *peers.forms().values()):
        if isinstance(form, str):
            continue
        for got, wanted in zip(passes(form), expected, strict=True):
            assert (got - wanted).norm() <= 1e-4 * wanted.norm()


def test_a_forced_scan_ends_with_its_context() -> None:
    own = _fused.best_chunk
    with step.forced_scan():
        assert _fused.best_chunk(784, 8, 256) is None
    assert _fused.best_chunk is own
    assert own(784, 8, 256) is not None


@pytest.mark.parametrize("case", TINY.steps, ids=lambda case: case.layer)
def test_blocks_without_states_keep_the_shape(case: StepCase) -> None:
    inputs = torch.randn(2, 20, case.width)
    for states in (None, *case.states):
        assert step.make_block(case, states)(inputs).shape == inputs.shape


def test_a_penalty_changes_the_step_by_its_gradient() -> None:
    torch.manual_seed(0)
    block = torch.nn.Linear(2, 2)
    inputs, grad = torch.ones(1, 2), torch.ones(1, 2)
    step.training_step(block, inputs, grad)()
    plain = block.weight.grad
    step.training_step(block, inputs, grad, lambda b: 3 * b.weight.sum())()
    assert plain is not None
    assert block.weight.grad is not None
    torch.testing.assert_close(block.weight.grad, plain + 3)


@pytest.mark.slow
@pytest.mark.parametrize("package", ["transformers", "mamba_ssm"])
def test_other_packages_are_measured(tiny: None, package: str, monkeypatch) -> None:
    pytest.importorskip(package if package == "transformers" else "einops")
    if not find_spec(package):
        pytest.skip(f"{package} is not installed")
    monkeypatch.setattr(selective, "installed", lambda name: name == package)
    scans, blocks = selective.run(replace(TINY, mamba_ssm=True), 1, no_report)
    found = [row.label for row in scans.rows if isinstance(row.cells["times ours"], Ratio)]
    assert len(found) == 1
    assert package in found[0]
    assert len(blocks.rows) == (4 if package == "transformers" else 2)


def test_a_scan_that_computes_something_else_is_refused() -> None:
    tensors = selective.arguments(TINY.selective[0])
    selective.check("ours", selective_scan, tensors)
    with pytest.raises(RuntimeError, match="expected other to agree"):
        selective.check("other", lambda *t: selective_scan(*t) + 1, tensors)


@pytest.mark.parametrize("form", ["real", "complex"])
def test_the_textbook_method_agrees_with_ours(form: textbook.Form) -> None:
    torch.manual_seed(0)
    lti = analysis.system_of(LRU(3, 12))
    ours = balanced_truncation(lti, 6, balance=form)
    theirs = textbook.truncate(analysis.as_arrays(lti), 6, form)
    np.testing.assert_allclose(theirs.sigma, ours.sigma.detach().numpy(), rtol=1e-6, atol=1e-8)
    times = np.arange(30)[:, None]

    def response(eigenvalues, B, C):  # summed over both sides, so that bases do not matter
        return ((eigenvalues**times) * (B.sum(1) * C.sum(0))).sum(1).real

    reduced = (t.detach().numpy() for t in (ours.system.eigenvalues, ours.system.B, ours.system.C))
    wanted = response(*reduced)
    got = response(theirs.eigenvalues, theirs.B, theirs.C)
    np.testing.assert_allclose(got, wanted, atol=1e-5 * np.abs(wanted).max())


def test_pymor_agrees_with_the_textbook_method() -> None:
    pytest.importorskip("pymor")
    analysis.silence_pymor()
    torch.manual_seed(0)
    system = analysis.as_arrays(analysis.system_of(LRU(3, 6)))
    sigma = textbook.by_pymor(system, 3)
    wanted = textbook.truncate(system, 3, "real").sigma
    np.testing.assert_allclose(sigma, wanted[: len(sigma)], rtol=1e-5, atol=1e-7)


def test_saved_bytes_count_every_storage_once() -> None:
    layer = torch.nn.Linear(4, 4, bias=False)
    inputs = torch.randn(10, 4, requires_grad=True)

    def call(u: torch.Tensor) -> torch.Tensor:
        return layer(u) + layer(u[:5]).sum() + u.exp()

    # The inputs, once for both products, and the result of exp; not the weight.
    assert memory.saved_bytes(call, layer, inputs) == 2 * inputs.nbytes


WORKER = """
import json, sys
print(json.dumps({"jax": "0"}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    if "load" in request:
        import numpy as np
        case = np.load(request["load"])
        np.savez("%s", outputs=case["inputs"], grad=case["inputs"])
        print(json.dumps({"outputs": "%s"}), flush=True)
    elif request["measure"] == 13:
        sys.exit("that was unlucky")
    else:
        print(json.dumps({"cpu": 2.0, "wall": 3.0}), flush=True)
"""


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the JAX process, which speaks as it does and computes nothing."""
    script, out = tmp_path / "worker.py", tmp_path / "out.npz"
    script.write_text(WORKER.replace("%s", out.as_posix()))
    monkeypatch.setattr("benchmarks.speed.jax_client.WORKER", script)


def test_the_other_process_is_measured_by_the_clock_in_use(worker: None) -> None:
    with JaxLayer(None, 1) as one, JaxLayer(Path(sys.executable), 2) as two:
        assert (one.measure(1), two.measure(1)) == (2.0, 3.0)


def test_another_result_of_the_other_process_is_refused(worker: None) -> None:
    with JaxLayer(None, 1) as jax, pytest.raises(JaxError, match="agree with ours"):
        jax.load(*layers.problem(LayerCase(2, 9, 2, 3)))


def test_death_of_the_other_process_is_told(worker: None) -> None:
    start = time.monotonic()
    with JaxLayer(None, 1) as jax, pytest.raises(JaxError, match="unlucky"):
        jax.measure(13)
    assert time.monotonic() - start < 60


def test_a_python_without_jax_says_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(JaxError, match="pip install jax"):
        JaxLayer(tmp_path / "python", 1)
