"""When to look at the spectra: a window of the run, an interval, and at least one look."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

from lightning_compressm.reduction.policy import check_count

__all__ = ["Schedule", "Window"]


@dataclass(frozen=True)
class Window:
    """Optimizer steps between which a run may be reduced, both included.

    Example:
        >>> Window(0, 10).contains(10)
        True
    """

    start: int
    end: int

    def contains(self, step: int) -> bool:
        """Whether a look after ``step`` optimizer steps lies inside."""
        return self.start <= step <= self.end


@dataclass(frozen=True)
class Schedule:
    """The user's wishes, not yet tied to a run.

    Args:
        window: two floats: shares of the run in [0, 1]; two ints: optimizer steps. If one is a
            float, both are shares.
        every_n_epochs: look at the end of every n-th epoch.
        every_n_steps: instead, look every n optimizer steps.

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

    def __post_init__(self) -> None:
        """Refuse windows that can't be meant."""
        check_count("every_n_epochs", self.every_n_epochs)
        check_count("every_n_steps", self.every_n_steps, optional=True)
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

    def resolve(self, total_steps: float | None) -> Window:
        """Tie the window to a run of ``total_steps`` optimizer steps (``None`` if unknown).

        The last step of a run never belongs to the window: nothing would train after it.

        Raises:
            ValueError: for a window in shares of an endless run, or one after the run's end.
        """
        known = total_steps is not None and isfinite(total_steps) and total_steps > 0
        start, end = self.window
        if self.is_share:
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
        return Window(int(start), min(int(end), last))

    def due_at_epoch_end(self, window: Window, step: int, epoch: int) -> bool:
        """Whether to look at the end of ``epoch`` (from 0) after ``step`` optimizer steps."""
        on_interval = self.every_n_steps is None and (epoch + 1) % self.every_n_epochs == 0
        return on_interval and window.contains(step)

    def due_at_step(self, window: Window, before: int, step: int, looks: int) -> bool:
        """Whether to look right after a batch.

        Args:
            window: of this run.
            before: optimizer steps until the batch.
            step: optimizer steps after it; one more, or several with several optimizers.
            looks: how many looks there have been.
        """
        n = self.every_n_steps
        if n and step // n > before // n and window.contains(step):
            return True
        return looks == 0 and step >= window.end >= 1


def _is_pair_of_numbers(value: object) -> bool:
    numbers = isinstance(value, tuple | list) and all(
        isinstance(x, int | float) and not isinstance(x, bool) for x in value
    )
    return numbers and len(value) == 2  # type: ignore[arg-type]
