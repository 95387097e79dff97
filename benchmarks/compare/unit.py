"""One task and one seed: all arms, taking turns in one process."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import lightning as L

from benchmarks.arms import Arm, all_arms
from benchmarks.compare.bench import Bench, Trained, state_dims
from benchmarks.compare.tasks import CompareTask, evaluate
from benchmarks.train.interleave import Turns, run_together

FULL, SMALL, SMALL_AS_BARE = "full", "small", "small-as-bare"
Report = Callable[[str, int], None]


@dataclass(frozen=True)
class Result:
    """One network at the end of one arm's work.

    Attributes:
        task: Name.
        seed: Of everything random.
        arm: Name.
        size: States that were asked for in every layer; None where the arm chooses.
        states: States of every layer.
        accuracy: On the test set, in [0, 1].
        loss: Cross-entropy on the test set.
        after_cut: Test accuracy right after each reduction; the last one for cuts at the end.
        cpu: Processor seconds of training and cutting, without `borrowed`.
        borrowed: Processor seconds of the network that the arm starts from.
        analysis: Processor seconds of looking and reducing in training.
        full_cpu: Processor seconds of the full model that took turns with this one.
        small_cpu: The same of the model from scratch with as many states; None if there is none.
        curves: What was watched over training; see `subspace`.
    """

    task: str
    seed: int
    arm: str
    size: int | None
    states: list[int]
    accuracy: float
    loss: float
    after_cut: list[float] = field(default_factory=list)
    cpu: float = 0.0
    borrowed: float = 0.0
    analysis: float = 0.0
    full_cpu: float = 0.0
    small_cpu: float | None = None
    curves: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain types."""
        return asdict(self)


@dataclass(frozen=True)
class Job:
    """One training: an arm, and the sizes that come out of it."""

    arm: Arm
    sizes: tuple[int | None, ...]

    @property
    def name(self) -> str:
        return "-".join([self.arm.name, *(str(size) for size in self.sizes if size)])


def jobs_of(task: CompareTask, arms: Iterable[str]) -> list[Job]:
    """The trainings that these arms need for a task."""
    known = all_arms()
    jobs: list[Job] = []
    for arm in (known[name] for name in arms):
        if not arm.suits(task):
            continue
        if arm.own_size:
            jobs.append(Job(arm, (None,)))
        elif arm.one_training:
            jobs.append(Job(arm, task.sizes))
        else:
            jobs += [Job(arm, (size,)) for size in task.sizes]
    return jobs


def run_unit(
    task: CompareTask, seed: int, jobs: Sequence[Job], report: Report = lambda *_: None
) -> list[Result]:
    """Do all jobs side by side, the processor going round.

    Args:
        task: What is trained.
        seed: Fixes initialisation, order of the batches and dropout.
        jobs: With all among them that others need.
        report: Called with a job's name and its step.
    """
    turns = Turns()
    needed: dict[str, Future[Trained]] = {j.arm.needs: Future() for j in jobs if j.arm.needs}
    # Who goes first changes from seed to seed.
    first = seed % len(jobs)
    starters = [job for job in (*jobs[first:], *jobs[:first]) if not job.arm.needs]
    for job in starters:
        turns.join(job.name)

    def work(job: Job) -> list[Result]:
        if job.arm.needs:
            needed[job.arm.needs].result()
            turns.join(job.name)
        try:
            turns.wait(job.name)
            beside = job.arm.needs if job.arm.own_size else None
            bench = Bench(task, seed, turns, job.name, needed, partial(report, job.name), beside)
            return do(job, bench)
        except BaseException as error:
            own = needed.get(job.arm.name)
            if own is not None and not own.done():
                own.set_exception(error)
            raise
        finally:
            turns.leave(job.name)

    found = run_together(turns, [partial(work, job) for job in jobs])
    return with_references([result for results in found for result in results])


def with_references(results: Sequence[Result]) -> list[Result]:
    """The same, each with the times of the full and the small model beside it."""
    small: dict[int | None, float | None] = {r.size: r.cpu for r in results if r.arm == SMALL}
    small[None] = next((r.cpu for r in results if r.arm == SMALL_AS_BARE), None)
    full = next((r.cpu for r in results if r.arm == FULL), 0.0)
    return [replace(r, full_cpu=full, small_cpu=small.get(r.size)) for r in results]


def do(job: Job, bench: Bench) -> list[Result]:
    """Train, cut where the arm cuts at the end, and test; hand the network on if it is wanted."""
    arm = job.arm
    if not arm.one_training:
        (size,) = job.sizes
        module = arm.train(bench, size)
        bench.hand_on(arm.name, module)
        return [measure(job, bench, module, size, bench.cpu_at_pace)]
    trained = arm.train(bench, None)
    results, training = [], bench.cpu
    for size in job.sizes:
        assert size is not None
        before = bench.cpu
        module = copy.deepcopy(trained)
        with bench.timed():
            arm.cut(bench, module, size)
        result = measure(job, bench, module, size, training + bench.cpu - before)
        result.after_cut.append(result.accuracy)
        results.append(result)
    return results


def measure(
    job: Job, bench: Bench, module: L.LightningModule, size: int | None, cpu: float
) -> Result:
    """Test a finished network."""
    accuracy, loss = evaluate(module, bench.data)
    measured = bench.measured
    return Result(
        bench.task.name,
        bench.seed,
        job.arm.name,
        size,
        state_dims(module),
        accuracy,
        loss,
        list(measured.after_cut),
        cpu,
        measured.borrowed,
        measured.analysis,
        curves=measured.curves,
    )
