"""The comparison: arms find themselves, turns change nothing, results last, figures are right."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from rich.console import Console

from benchmarks import arms
from benchmarks.arms import all_arms
from benchmarks.arms._base import change_loss, keep_states
from benchmarks.arms.distillation import divergence
from benchmarks.arms.last import infinity_norms
from benchmarks.common import workers
from benchmarks.common.command import quiet
from benchmarks.compare import command as compare
from benchmarks.compare.bench import Bench
from benchmarks.compare.methods_page import Report, make_methods_page, states
from benchmarks.compare.statistics import Difference, accuracy, difference, time_to_full
from benchmarks.compare.store import Store, missing_jobs
from benchmarks.compare.subspace import dominant_subspace, overlap
from benchmarks.compare.suites import SUITES
from benchmarks.compare.tasks import TASKS, evaluate
from benchmarks.compare.unit import Result, jobs_of, run_unit
from benchmarks.data.mqar import IGNORED, SIZES, MQARDataModule
from benchmarks.train.interleave import Turns
from lightning_compressm import HankelRegularizer
from lightning_compressm.control import DiagonalLTI
from lightning_compressm.nn import LRU

TINY = TASKS["digits"].shortened(20, 4)
NEW_ARM = """
from benchmarks.arms._base import InTraining

class Fraction(InTraining):
    name = "folded"
    label = "a new arm"
    about = "From a file of its own."

    def options(self, task):
        return {"balance": "folded"}
"""


def result(arm: str, seed: int, accuracy: float, size: int | None = 4, cpu: float = 1.0) -> Result:
    return Result(
        "digits", seed, arm, size, [size or 128], accuracy, 1.0, [0.1], cpu, full_cpu=2.0,
        small_cpu=0.5,
    )  # fmt: skip


# -- arms --------------------------------------------------------------------------------------


def test_all_arms_are_found_and_described() -> None:
    found = all_arms()
    assert {"full", "small", "published", "ours", "post-training", "regularizer"} <= found.keys()
    assert {"last", "ghost", "distillation", "random", "smallest"} <= found.keys()
    assert all(arm.label and arm.about.endswith(".") for arm in found.values())


def test_a_file_more_is_an_arm_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "new_arm.py").write_text(NEW_ARM)
    with monkeypatch.context() as patch:
        patch.setattr(arms, "__path__", [*arms.__path__, str(tmp_path)])
        assert all_arms()["folded"].label == "a new arm"
        jobs = jobs_of(TINY, ["full", "folded"])
        quiet()
        results = run_unit(TINY, 0, jobs)
        page = make_methods_page(Report([TINY], results, "a command", {"torch": "2"}))
    assert "| a new arm | 4 |" in page
    sys.modules.pop("benchmarks.arms.new_arm")
    assert "folded" not in all_arms()


def test_arms_do_what_suits_a_task() -> None:
    linear = {job.arm.name for job in jobs_of(TASKS["digits"], all_arms())}
    selective = {job.arm.name for job in jobs_of(TASKS["recall-mamba"], all_arms())}
    assert "published" in linear - selective
    assert "ghost" in selective - linear
    assert [job.sizes for job in jobs_of(TASKS["digits"], ["small", "last", "full"])] == [
        (8,), (4,), (8, 4), (None,),
    ]  # fmt: skip


def test_kept_states_stay_as_they_are() -> None:
    torch.manual_seed(0)
    layer = LRU(3, 8)
    with torch.no_grad():
        for lost in (1, 2, 5):
            layer.B_re[lost] = layer.B_im[lost] = 0
    inputs = torch.randn(2, 20, 3)
    before = layer(inputs)
    keep_states(layer, infinity_norms, 5)
    assert layer.d_state == 5
    torch.testing.assert_close(layer(inputs), before)


def test_the_divergence_is_between_answers_that_are_asked_for() -> None:
    torch.manual_seed(0)
    logits, others = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    targets = torch.full((2, 5), IGNORED)
    targets[:, 2] = 1
    assert float(divergence(logits, logits, targets)) == pytest.approx(0, abs=1e-6)
    apart = divergence(logits, others, targets)
    assert apart > 0
    others[:, 0] += 100 * torch.randn(2, 3)
    torch.testing.assert_close(divergence(logits, others, targets), apart)


def test_a_changed_loss_is_what_is_trained_until_it_is_taken_back() -> None:
    module, data = TINY.build(0)
    batch = next(iter(data.train_dataloader()))
    plain = module.training_step(batch, 0)
    undo = change_loss(module, lambda loss, batch: loss + len(batch[1]))
    torch.manual_seed(1)
    changed = module.training_step(batch, 0).item()
    undo()
    torch.manual_seed(1)
    assert changed == pytest.approx(module.training_step(batch, 0).item() + 50)
    assert isinstance(plain, torch.Tensor)


def test_the_penalty_up_to_the_cut_ends_there(monkeypatch: pytest.MonkeyPatch) -> None:
    quiet()
    calls: list[int] = []
    original = HankelRegularizer.__call__

    def counted(penalty: HankelRegularizer, model: torch.nn.Module) -> torch.Tensor:
        calls.append(1)
        return original(penalty, model)

    monkeypatch.setattr(HankelRegularizer, "__call__", counted)
    (penalized,) = run_unit(TINY, 0, jobs_of(TINY, ["ours-penalized"]))
    assert penalized.states == [4]
    assert len(calls) == 1 + TINY.look, "once for its size, then in every step before the cut"


# -- units -------------------------------------------------------------------------------------


def test_turns_do_not_change_what_comes_out() -> None:
    quiet()
    together = run_unit(TINY, 3, jobs_of(TINY, ["full", "small", "ours", "distillation"]))
    by_arm = {r.arm: r for r in together}
    for name in ("small", "ours"):
        (alone,) = run_unit(TINY, 3, jobs_of(TINY, [name]))
        assert (alone.accuracy, alone.loss) == (by_arm[name].accuracy, by_arm[name].loss)
    assert by_arm["ours"].states == by_arm["small"].states == [4]
    assert len(by_arm["ours"].after_cut) == 1
    assert by_arm["ours"].analysis > 0
    assert by_arm["distillation"].borrowed == by_arm["full"].cpu > 0
    assert by_arm["ours"].full_cpu == by_arm["full"].cpu
    assert by_arm["ours"].small_cpu == by_arm["small"].cpu


def test_an_arm_that_ends_alone_is_timed_at_its_pace_beside_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    turns = Turns()
    turns.join("bare")
    monkeypatch.setattr(turns, "pass_on", lambda name: None)
    bench = Bench(TINY, 0, turns, "small", {}, beside="bare")
    watcher = bench._watcher
    for step, seconds in ((25, 3.0), (50, 4.0), (75, 4.5)):
        if step == 75:
            turns.leave("bare")
        watcher.watch.stop()
        watcher.watch.cpu = seconds
        watcher.after_step(SimpleNamespace(global_step=step), None)
    assert bench.cpu >= 4.5
    assert bench.cpu_at_pace == 4.0 / 50 * TINY.steps


def test_an_arm_that_fails_ends_the_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    quiet()

    def fail(*_: object) -> L.LightningModule:
        raise RuntimeError("no luck")

    monkeypatch.setattr(type(all_arms()["full"]), "train", fail)
    with pytest.raises((RuntimeError, CancelledError)):
        run_unit(TINY, 0, jobs_of(TINY, ["full", "small", "distillation"]))


def test_a_test_leaves_the_mode_as_it_was() -> None:
    module, data = TINY.build(0)
    module.train()
    module.model.blocks[0].eval()
    evaluate(module, data)
    assert module.training
    assert not module.model.blocks[0].training


# -- files -------------------------------------------------------------------------------------


def test_results_are_read_back_and_replaced(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.load(TINY, 0) == []
    store.save(TINY, 0, [result("ours", 0, 0.5), result("full", 0, 0.9, size=None)])
    store.save(TINY, 0, [result("ours", 0, 0.6)])
    assert {(r.arm, r.accuracy) for r in store.load(TINY, 0)} == {("ours", 0.6), ("full", 0.9)}
    assert store.load(TINY, 1) == []
    assert store.load(TINY.shortened(30, 4), 0) == [], "another recipe"


def test_only_what_is_missing_is_trained_beside_its_references() -> None:
    jobs = jobs_of(TINY, ["full", "small", "ours", "random"])
    there = [result(job.arm.name, 0, 0.5, size=job.sizes[0]) for job in jobs]
    assert missing_jobs(jobs, there) == []
    partly = [r for r in there if r.arm != "random"]
    assert [job.arm.name for job in missing_jobs(jobs, partly)] == ["full", "small", "random"]


# -- figures -----------------------------------------------------------------------------------


def test_differences_are_taken_seed_by_seed() -> None:
    ours = [result("ours", seed, 0.5 + 0.1 * seed) for seed in range(3)]
    others = [result("small", seed, 0.4 + 0.1 * seed) for seed in (2, 1, 0, 7)]
    gap = difference(ours, others, accuracy)
    assert gap is not None
    assert (gap.mean, gap.seeds) == (pytest.approx(0.1), 3)
    assert gap.error == pytest.approx(0, abs=1e-12)
    assert difference(ours, [], accuracy) is None


@pytest.mark.parametrize(
    ("mean", "error", "verdict"),
    [
        (0.1, 0.04, "better"),
        (-0.1, 0.04, "worse"),
        (0.1, 0.06, "within noise"),
        (0.1, None, "one seed"),
    ],
)
def test_two_standard_errors_decide(mean: float, error: float | None, verdict: str) -> None:
    assert Difference(mean, error, 5).verdict == verdict


def test_a_borrowed_model_costs_its_time() -> None:
    assert time_to_full(replace(result("last", 0, 0.5, cpu=0.5), borrowed=2.0)) == 1.25


def test_states_of_layers_and_seeds() -> None:
    runs = [SimpleNamespace(states=s) for s in ([4, 6], [4, 8])]
    assert states(runs) == "4, 6–8"  # type: ignore[arg-type]
    assert states([SimpleNamespace(states=[4, 4])]) == "4"  # type: ignore[list-item]


def test_the_dominant_subspace_is_that_of_the_strong_states() -> None:
    torch.manual_seed(0)
    eigenvalues = torch.polar(torch.full((6,), 0.9), torch.linspace(0.3, 2.5, 6)).to(torch.cdouble)
    gains = torch.tensor([1.0, 1e-4, 1e-4, 1.0, 1e-4, 1e-4])
    system = DiagonalLTI(eigenvalues, torch.diag(gains).to(torch.cdouble), torch.eye(6).cdouble())
    basis = dominant_subspace(system, 2, horizon=50)
    assert basis.shape == (12, 4)
    energy = basis.square().sum(1)
    torch.testing.assert_close(energy[[0, 3, 6, 9]], torch.ones(4).double(), rtol=0, atol=1e-3)
    assert overlap(basis, basis) == pytest.approx(1)
    other = dominant_subspace(replace(system, B=system.B.flip(0)), 2, horizon=50)
    assert overlap(basis, other) < 0.01


def test_the_page_says_where_nothing_is_won() -> None:
    results = [
        r
        for seed in range(3)
        for r in (
            replace(result("full", seed, 0.9, size=None, cpu=2.0), small_cpu=None),
            result("small", seed, 0.8 + 0.01 * seed),
            result("ours", seed, 0.8 + 0.01 * seed, cpu=1.9),
            result("published", seed, 0.7 + 0.02 * seed),
        )
    ]
    page = make_methods_page(Report([TINY], results, "python -m x", {"torch": "2"}))
    assert "python -m x" in page
    assert "| ours | 4 | 0.810 ± 0.010 | 0.100 ± 0.000 |" in page
    assert "small from scratch is as good, within noise" in page
    assert "training takes 0.95 of the full time" in page
    assert "| digits, 4 | **+9.0 ± 0.6** |" in page


def test_variants_of_ours_are_compared_in_one_table() -> None:
    results = [
        result(arm, seed, value)
        for seed in range(2)
        for arm, value in (("early", 0.7 + 0.02 * seed), ("ours", 0.8 + 0.01 * seed))
    ]
    page = make_methods_page(Report([TINY], results, "a command", {"torch": "2"}))
    assert "| `ours` | 0.805 |\n| `early` | 0.710 (**-9.5 ± 0.5**) |" in page


# -- the command -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", [["--suite", "what"], ["--arms", "nobody"], ["--tasks", "x"], ["--workers", "0"]]
)
def test_arguments_that_can_not_be_meant(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        compare.main(arguments)


PARENT = """
import multiprocessing, os, time
from concurrent.futures import ProcessPoolExecutor
from benchmarks.common.processes import start

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(1, context, start)
    print(pool.submit(os.getpid).result(), flush=True)
    pool.submit(time.sleep, 600)
    time.sleep(600)
"""


def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    environment = {**os.environ, "PYTHONPATH": str(Path(compare.__file__).parents[2])}
    with subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment
    ) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        parent.kill()
        # The worker holds the pipe's other end too: it is read to its end when nobody is left.
        with ThreadPoolExecutor(1) as pool:
            rest = pool.submit(parent.stdout.read)
            try:
                assert rest.result(timeout=30) == ""
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker, signal.SIGKILL)


def test_the_page_compares_the_default_window_with_a_later_one() -> None:
    results = [
        replace(result(arm, seed, value, size=None, cpu=cpu), states=[left, left + 2])
        for seed in range(2)
        for arm, value, left, cpu in (
            ("defaults", 0.8, 30, 1.8), ("defaults-late", 0.9 + 0.01 * seed, 10, 1.6),
        )
    ]  # fmt: skip
    page = make_methods_page(Report([TINY], results, "a command", {"torch": "2"}))
    assert "| digits, 128 | 31 | 11 | **+10.5 ± 0.5** | 0.90 (0.90 to 0.90) | 0.80" in page


def few_pairs(seed: int) -> MQARDataModule:
    return MQARDataModule(batch_size=4, seed=seed, n_tokens=16, pairs=3, length=9)


class Here(ThreadPoolExecutor):
    """In place of processes, which would import everything again."""

    def __init__(self, workers: int, *_: object) -> None:
        super().__init__(1)


@pytest.mark.slow
@pytest.mark.usefixtures("mamba_ssm")
def test_smoke_suite_and_its_resumption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split, size in {"train": 640, "val": 50, "test": 100}.items():
        monkeypatch.setitem(SIZES, split, size)
    digits, recall = SUITES["smoke"].tasks
    tiny = {"steps": 20, "d_state": 16, "calibration_batches": 1}
    tasks = (replace(digits, **tiny), replace(recall, make_data=few_pairs, **tiny))
    monkeypatch.setitem(SUITES, "smoke", replace(SUITES["smoke"], tasks=tasks))
    monkeypatch.setattr(workers, "ProcessPoolExecutor", Here)
    said = io.StringIO()
    monkeypatch.setattr(compare, "make_console", lambda: Console(file=said, width=100))
    assert compare.main(["--suite", "smoke", "--output", str(tmp_path)]) == 0
    numbers = json.loads((tmp_path / "smoke.json").read_text())
    arms_there = {(r["task"], r["arm"]) for r in numbers["results"]}
    for task in SUITES["smoke"].tasks:
        expected = {name for name, arm in all_arms().items() if arm.suits(task)}
        assert {arm for name, arm in arms_there if name == task.name} == expected
    page = (tmp_path / "smoke.md").read_text()
    assert all(arm.label in page for arm in all_arms().values())
    assert "(pictures/compare-smoke-digits.png)" in page
    assert (tmp_path / "pictures/compare-smoke-digits.png").stat().st_size > 10_000
    monkeypatch.setattr(compare, "draw_all", lambda *_: [])  # takes seconds, and was seen to work
    assert compare.main(["--suite", "smoke", "--output", str(tmp_path)]) == 0
    assert "Everything is there already." in said.getvalue()
    assert (tmp_path / "smoke.md").read_text() == page


@pytest.mark.slow
def test_another_process_trains_what_this_one_writes(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["--suite", "smoke", "--tasks", "digits", "--arms", "small", "--workers", "1"]
    assert compare.main([*words, "--output", str(tmp_path)]) == 0
    assert "GPU available" not in "".join(capfd.readouterr()), "Lightning is quiet there"
    (digits,) = (task for task in SUITES["smoke"].tasks if task.name == "digits")
    assert {r.arm for r in Store(tmp_path / "smoke").load(digits, 0)} == {"full", "small"}
    assert "| small from scratch | 4 |" in (tmp_path / "smoke.md").read_text()
