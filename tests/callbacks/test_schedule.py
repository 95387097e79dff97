"""When to look: windows in shares and in steps, intervals, and at least once."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lightning_compressm.callbacks.schedule import Schedule, Window


@pytest.mark.parametrize(
    ("window", "total", "expected"),
    [
        ((0.0, 0.1), 2000, (0, 200)),
        ((0.05, 0.1), 2000, (100, 200)),
        ((0.0, 1.0), 100, (0, 99)),
        ((0.0, 0.1), 3, (0, 1)),
        ((0.0, 0.1), 2, (0, 1)),
        ((0, 0.5), 100, (0, 50)),
        ((0.0, 1), 100, (0, 99)),
        ((0, 200), 2000, (0, 200)),
        ((100, 400), None, (100, 400)),
        ((100, 400), -1, (100, 400)),
        ((100, 400), float("inf"), (100, 400)),
        ((100, 400), 300, (100, 299)),
        ((0, 1), 1000, (0, 1)),
        ([0.1, 0.2], 100, (10, 20)),
    ],
)
def test_resolving(window: Any, total: float | None, expected: tuple[int, int]):
    assert Schedule(window).resolve(total) == Window(*expected)


@pytest.mark.parametrize("total", [None, float("inf"), float("nan"), -1, 0])
def test_a_share_of_an_endless_run_asks_for_steps(total: float | None):
    with pytest.raises(
        ValueError, match=r"window=\(0.0, 0.1\) is a share.*Give the window in optim"
    ):
        Schedule((0.0, 0.1)).resolve(total)


@pytest.mark.parametrize(("window", "total"), [((500, 600), 500), ((0.9, 1.0), 2), ((10, 20), 3)])
def test_a_window_after_the_run_is_refused(window: Any, total: int):
    with pytest.raises(ValueError, match="starts after the run's last step but one"):
        Schedule(window).resolve(total)


@pytest.mark.parametrize(
    "window",
    [
        (0.1, 0.1),
        (0.2, 0.1),
        (-0.1, 0.1),
        (-5, 10),
        (5, 5),
        (0.1,),
        (0.0, 0.1, 0.2),
        ("0", "1"),
        (True, 2),
        None,
        0.1,
        "ab",
        (float("nan"), 0.5),
        (0.1, float("nan")),
        (None, 0.5),
    ],
)
def test_windows_that_can_not_be_meant(window: Any):
    with pytest.raises(ValueError, match="window: expected"):
        Schedule(window)


@pytest.mark.parametrize("window", [(0.0, 1.5), (0.0, 200), (0, 2.0), (0.5, 100)])
def test_shares_above_one_are_told_to_be_integers(window: Any):
    with pytest.raises(ValueError, match="Write integers to mean optimizer steps"):
        Schedule(window)


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "2"])
@pytest.mark.parametrize("name", ["every_n_epochs", "every_n_steps"])
def test_intervals_out_of_range(name: str, value: Any):
    with pytest.raises(ValueError, match=f"{name}: expected an integer >= 1"):
        Schedule(**{name: value})


def test_integers_mean_steps_and_floats_shares():
    assert not Schedule((0, 1)).is_share
    assert Schedule((0.0, 1.0)).is_share
    assert Schedule((0, 1.0)).is_share


def test_a_window_includes_both_ends():
    window = Window(3, 5)
    assert [step for step in range(8) if window.contains(step)] == [3, 4, 5]


def test_epoch_ends():
    schedule, window = Schedule((0, 100), every_n_epochs=2), Window(0, 100)
    due = [epoch for epoch in range(8) if schedule.due_at_epoch_end(window, 10, epoch)]
    assert due == [1, 3, 5, 7]
    assert not schedule.due_at_epoch_end(window, 101, 1)
    assert schedule.due_at_epoch_end(window, 100, 1)


def test_every_n_steps_replaces_epoch_ends():
    schedule, window = Schedule((0, 20), every_n_steps=5), Window(4, 20)
    due = [step for step in range(1, 31) if schedule.due_at_step(window, step - 1, step, 1)]
    assert due == [5, 10, 15, 20]
    assert not any(schedule.due_at_epoch_end(window, step, 0) for step in range(30))


def test_several_optimizer_steps_in_a_batch_miss_no_interval():
    schedule, window = Schedule((0, 20), every_n_steps=5), Window(0, 20)
    due = [step for step in range(3, 31, 3) if schedule.due_at_step(window, step - 3, step, 1)]
    assert due == [6, 12, 15]


def test_without_a_look_the_windows_last_step_is_due():
    schedule, window = Schedule((0, 20)), Window(0, 20)
    assert [s for s in range(1, 23) if schedule.due_at_step(window, s - 1, s, 0)] == [20, 21, 22]
    assert not any(schedule.due_at_step(window, s - 1, s, 1) for s in range(1, 23))


def test_a_run_too_short_for_a_reduction_has_none():
    window = Schedule((0.0, 1.0)).resolve(1)
    assert window == Window(0, 0)
    assert not any(Schedule().due_at_step(window, s - 1, s, 0) for s in range(3))


@given(
    total=st.integers(1, 400),
    start=st.floats(0, 0.99),
    length=st.floats(0.01, 1),
    per_epoch=st.integers(1, 120),
    every_n_epochs=st.integers(1, 4),
    every_n_steps=st.none() | st.integers(1, 50),
)
def test_every_run_looks_at_least_once_and_never_outside(
    total: int,
    start: float,
    length: float,
    per_epoch: int,
    every_n_epochs: int,
    every_n_steps: int | None,
):
    schedule = Schedule((start, min(1.0, start + length)), every_n_epochs, every_n_steps)
    assume(total > 1 and round(start * total) < total)
    window = schedule.resolve(total)
    looks: list[int] = []
    for step in range(1, total):  # nothing is trained after the last step
        if schedule.due_at_step(window, step - 1, step, len(looks)):
            looks.append(step)
        if step % per_epoch == 0 and step not in looks:
            epoch = step // per_epoch - 1
            if schedule.due_at_epoch_end(window, step, epoch):
                looks.append(step)
    assert looks
    assert all(window.start <= step <= window.end < total for step in looks)


@pytest.mark.parametrize(
    ("window", "total", "looks"),
    [
        ((0.1, 0.4), 1000, (100, 200, 300, 400)),
        ((0.1, 0.4), 5, (1, 2)),  # each step once
        ((0.0, 0.3), 10, (1, 2, 3)),  # none before the first step
        ((10, 40), None, (10, 20, 30, 40)),
        ((10, 40), 26, (10, 15, 20, 25)),  # the last step is left to training
    ],
)
def test_a_number_of_looks_is_spread_over_the_window(window, total, looks):
    schedule = Schedule(window, spread=4)
    resolved = schedule.resolve(total)
    assert resolved.looks == looks
    due = [s for s in range(1, 500) if schedule.due_at_step(resolved, s - 1, s, looks=1)]
    assert tuple(due) == looks
    assert not any(schedule.due_at_epoch_end(resolved, s, 0) for s in looks)
