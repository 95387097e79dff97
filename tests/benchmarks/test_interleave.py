from __future__ import annotations

import threading
from concurrent.futures import CancelledError, ThreadPoolExecutor

import pytest
import torch

from benchmarks.train.interleave import Stopwatch, TimedTurns, Turns
from benchmarks.train.trainer import TASKS, build, make_trainer


def test_turns_alternate() -> None:
    turns, log = Turns(), []

    def work(name: str) -> None:
        turns.wait(name)
        for _ in range(3):
            log.append(name)
            turns.pass_on(name)
        turns.leave(name)

    for name in "ab":
        turns.join(name)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, "ab"))
    assert log == list("ababab")


def test_the_other_does_not_change_ones_random_numbers() -> None:
    def draw(names: str) -> torch.Tensor:
        turns, drawn = Turns(), []

        def work(name: str) -> None:
            turns.wait(name)
            torch.manual_seed(ord(name))
            for _ in range(3):
                number = torch.rand(1)
                if name == "a":
                    drawn.append(number)
                turns.pass_on(name)
            turns.leave(name)

        for name in names:
            turns.join(name)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(work, names))
        return torch.cat(drawn)

    assert torch.equal(draw("a"), draw("ab"))


def test_closing_releases_who_waits() -> None:
    turns = Turns()
    turns.join("first")
    turns.join("second")
    waiting = threading.Event()

    def work() -> None:
        waiting.set()
        turns.wait("second")

    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(work)
        waiting.wait()
        turns.close()
        with pytest.raises(CancelledError):
            job.result(timeout=60)


def test_the_stopwatch_adds_up_and_may_be_stopped_twice() -> None:
    watch = Stopwatch()
    watch.start()
    watch.stop()
    first = watch.wall
    watch.stop()
    assert watch.wall == first > 0
    watch.start()
    watch.stop()
    assert watch.wall > first
    assert watch.cpu >= 0


def test_a_training_is_the_same_alone_and_in_company() -> None:
    def train(turns: Turns, name: str, seed: int) -> torch.Tensor:
        turns.wait(name)
        module, data = build(TASKS["digits"], seed, d_state=6, d_model=4)
        make_trainer(50, [TimedTurns(turns, name)]).fit(module, data)
        turns.leave(name)
        return module.model.head.weight.detach().clone()

    alone = Turns()
    alone.join("a")
    expected = train(alone, "a", 0)
    together = Turns()
    together.join("a")
    together.join("b")
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(train, together, "ab"[seed], seed) for seed in (0, 1)]
    assert torch.equal(jobs[0].result(), expected)
    assert not torch.equal(jobs[1].result(), expected)
