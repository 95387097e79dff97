"""When to look at the spectra: a window of the run, an interval, and at least one look.

Nothing here knows a Trainer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from lightning_compressm._rules import COUNT, optional

__all__ = ["Looks", "Schedule", "Window", "schedule_of"]

ENDLESS = (500, 1000, 2000, 4000)  # steps after which runs of unknown length are looked at


@dataclass(frozen=True)
class Window:
    """Optimizer steps between which a run may be reduced, both included.

    Example:
        >>> Window(0, 10).contains(10)
        True
    """

    start: int
    end: int
    looks: tuple[int, ...] = field(default=(), repr=False)
    """Steps after which to look; if there are none, the schedule's interval says it."""

    def contains(self, step: int) -> bool:
        """Whether a look after ``step`` optimizer steps lies inside."""
        return self.start <= step <= self.end


# Looks after 10, 20 and 30%: with a second halving before 20% of the run, what is learnt slowly
# ended less accurate, and later looks save less than they cost (docs/defaults.md).
BY_LOSS, LOOKS_BY_LOSS = (0.1, 0.3), 3
BY_ENERGY = (0.0, 0.1)  # as published


@dataclass(frozen=True)
class Schedule:
    """The user's wishes, not yet tied to a run.

    Args:
        window: two floats: shares of the run in [0, 1]; two ints: optimizer steps. If one is a
            float, both are shares.
        every_n_epochs: look at the end of every n-th epoch.
        every_n_steps: instead, look every n optimizer steps.
        spread: instead, so many looks, evenly from the window's start to its end, unless there are
            ``every_n_steps``; in a run of unknown length, after 500 steps and ever later ones.

    Raises:
        ValueError: for values out of range.

    Example:
        >>> Schedule((0.0, 0.1)).resolve(2000)
        Window(start=0, end=200)
        >>> Schedule((100, 400)).resolve(None)
        Window(start=100, end=400)
    """

    window: tuple[int | float, int | float] = (0.0, 0.1)
    every_n_epochs: int = 1
    every_n_steps: int | None = None
    spread: int = 0

    def __post_init__(self) -> None:
        """Refuse windows that can't be meant."""
        COUNT.check("every_n_epochs", self.every_n_epochs)
        optional(COUNT).check("every_n_steps", self.every_n_steps)
        window = self.window
        if not _is_pair_of_numbers(window) or not 0 <= window[0] < window[1]:
            raise ValueError(
                "window: expected (start, end) with 0 <= start < end, two floats for shares of the "
                f"run or two integers for optimizer steps; got {window!r}."
            )
        if self.is_share and window[1] > 1:
            raise ValueError(
                f"window: shares of the run lie in [0, 1], got {window!r}. Write integers to mean "
                "optimizer steps."
            )

    @property
    def is_share(self) -> bool:
        """Whether the window is given in shares of the run."""
        return any(isinstance(x, float) for x in self.window)

    @property
    def _spreads(self) -> bool:
        """Whether the number of looks is given, instead of an interval."""
        return self.spread > 0 and not self.every_n_steps

    def _planned(self, start: int, end: int) -> tuple[int, ...]:
        """Steps after which to look, where their number is given; never before the first step."""
        if not self._spreads:
            return ()
        parts = max(1, self.spread - 1)
        steps = {round(start + (end - start) * i / parts) for i in range(parts + 1)}
        return tuple(sorted(step for step in steps if step))

    def resolve(self, total_steps: float | None) -> Window:
        """Tie the window to a run of ``total_steps`` optimizer steps (``None`` if unknown).

        The last step of a run never belongs to the window: nothing would train after it.

        Raises:
            ValueError: for a window in shares of an endless run, or one after the run's end.
        """
        known = total_steps is not None and isfinite(total_steps) and total_steps > 0
        start, end = self.window
        if self.is_share:
            if not known and self._spreads:
                return Window(0, ENDLESS[-1], ENDLESS)
            if not known:
                raise ValueError(
                    f"window={self.window!r} is a share of a run whose number of steps is unknown "
                    "(no max_steps, or an epoch of unknown length, or a changing accumulation of "
                    "gradients). Give the window in optimizer steps, e.g. window=(0, 2000), or set "
                    "Trainer(max_steps=...)."
                )
            assert total_steps is not None
            start, end = round(start * total_steps), max(1, round(end * total_steps))
        last = int(total_steps) - 1 if known and total_steps is not None else int(end)
        if start > last:
            raise ValueError(
                f"window={self.window!r} starts after the run's last step but one ({last}). Choose "
                "an earlier window, or train longer."
            )
        start, end = int(start), min(int(end), last)
        return Window(start, end, self._planned(start, end))

    def due_at_epoch_end(self, window: Window, step: int, epoch: int) -> bool:
        """Whether to look at the end of ``epoch`` (from 0) after ``step`` optimizer steps."""
        on_interval = (
            not (self.every_n_steps or self.spread) and (epoch + 1) % self.every_n_epochs == 0
        )
        return on_interval and window.contains(step)

    def due_at_step(self, window: Window, before: int, step: int, looks: int) -> bool:
        """Whether to look right after a batch.

        Args:
            window: of this run.
            before: optimizer steps until the batch.
            step: optimizer steps after it; one more, or several with several optimizers.
            looks: how many looks there have been.
        """
        if window.looks and any(before < planned <= step for planned in window.looks):
            return True
        n = self.every_n_steps
        if n and step // n > before // n and window.contains(step):
            return True
        return looks == 0 and step >= window.end >= 1


@dataclass
class Looks:
    """The looks of one run: which there were, and whether it is time for one.

    Attributes:
        schedule: the user's wishes.
        window: those tied to this run; ``None`` before :meth:`begin`.
        count: looks so far.
        at_step: optimizer steps done at the latest one, -1 before the first.
        epoch: the latest one at whose end it was asked whether to look, -1 before the first.
        overdue: whether one waits for what it needs (data, or a first validation).
        step: optimizer steps that the run has done.

    Example:
        >>> looks = Looks(Schedule(window=(0, 10), every_n_steps=5))
        >>> looks.begin(0, total_steps=lambda: 100)
        >>> [step for step in range(1, 13) if looks.advance(step) and looks.due_after_step()]
        [5, 10, 11, 12]
        >>> looks.done()
        >>> looks.advance(13) and looks.due_after_step()
        False
    """

    schedule: Schedule
    window: Window | None = None
    count: int = 0
    at_step: int = -1
    epoch: int = -1
    overdue: bool = False
    step: int = 0
    _before: int = 0

    def begin(self, step: int, total_steps: Callable[[], float | None], epoch: int = 0) -> None:
        """Start or go on at ``step`` optimizer steps; a window that is tied stays what it is.

        Args:
            step: optimizer steps done before.
            epoch: the one that begins or goes on, from 0.
            total_steps: gives those of the whole run, ``None`` if unknown; asked only if needed.

        Raises:
            ValueError: for a window that this run can't have.
        """
        self.step = self._before = step
        if self.window is None:
            self.window = self.schedule.resolve(total_steps())
            self.epoch = epoch - 1  # nothing is made up for that came before

    @property
    def too_short(self) -> bool:
        """Whether the run ends before anything could be looked at."""
        return self.window is not None and self.window.end < 1

    @property
    def to_come(self) -> bool:
        """Whether there may be another look."""
        return self.window is not None and (self.overdue or self.step <= self.window.end)

    def advance(self, step: int) -> bool:
        """Take note of the optimizer steps done after a batch; whether there were new ones."""
        self._before, self.step = self.step, step
        return step != self._before

    def due_after_step(self) -> bool:
        """Whether to look right after the latest optimizer step."""
        return self.window is not None and (
            self.overdue
            or self.schedule.due_at_step(self.window, self._before, self.step, self.count)
        )

    def end_epoch(self, epoch: int) -> bool:
        """Whether to look, asked once at the end of each epoch; later only if it was missed then.

        So that a run that goes on in the middle of an epoch does not make up for one that it had.
        """
        due = epoch > self.epoch and self.due_after_epoch(epoch)
        self.epoch = max(epoch, self.epoch)
        return due

    def due_after_epoch(self, epoch: int) -> bool:
        """Whether to look at the end of ``epoch``, from 0, unless it was looked at already."""
        return (
            self.window is not None
            and epoch >= 0
            and 0 < self.step != self.at_step
            and self.schedule.due_at_epoch_end(self.window, self.step, epoch)
        )

    def done(self) -> None:
        """Take note of a look."""
        self.count += 1
        self.at_step, self.overdue = self.step, False

    def state_dict(self) -> dict[str, Any]:
        """Plain types only."""
        window = self.window
        return {
            "window": None if window is None else [window.start, window.end, *window.looks],
            "looks": self.count,
            "looked_at_step": self.at_step,
            "epoch": self.epoch,
        }


def schedule_of(
    by_loss: bool,
    window: tuple[int | float, int | float] | None,
    every_n_epochs: int,
    every_n_steps: int | None,
) -> Schedule:
    """The schedule that goes with a rule, where the user leaves ``window`` open.

    Args:
        by_loss: whether cuts are tried on the loss, which brings its own number of looks.
        window: as in :class:`Schedule`; ``None`` for what goes with the rule.
        every_n_epochs: as in :class:`Schedule`.
        every_n_steps: as in :class:`Schedule`.

    Raises:
        ValueError: for values out of range.

    Example:
        >>> schedule_of(True, None, 1, None).resolve(2000).looks
        (200, 400, 600)
    """
    if window is None:
        window = BY_LOSS if by_loss else BY_ENERGY
    return Schedule(window, every_n_epochs, every_n_steps, LOOKS_BY_LOSS if by_loss else 0)


def _is_pair_of_numbers(value: object) -> bool:
    numbers = isinstance(value, tuple | list) and all(
        isinstance(x, int | float) and not isinstance(x, bool) for x in value
    )
    return numbers and len(value) == 2  # type: ignore[arg-type]
