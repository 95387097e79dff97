"""The processes that decide together: they share the work on layers, and fail or succeed alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Generic, TypeVar

from torch import Tensor

from lightning_compressm.errors import CompreSSMError
from lightning_compressm.reduction.failures import (
    LinAlgError,
    Reach,
    TroubleError,
    describe,
    reach_of,
)

__all__ = ["Outcome", "Processes", "Work", "owner_of"]

T = TypeVar("T")

Work = Callable[[int, "Processes", bool], T]
"""Work on the layer of a number, with the processes that do it; on copies on the CPU if told so."""


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """What came of the work on one layer.

    Attributes:
        value: the result; ``None`` if there is none, or if another process keeps it.
        note: what is special about it.
        failure: why there is no result.
    """

    value: T | None = None
    note: str = ""
    failure: str = ""

    def told(self, tell: Callable[[T], T]) -> Outcome[T]:
        """What other processes get to know."""
        return self if self.value is None else replace(self, value=tell(self.value))


def _same(value: T) -> T:
    return value


class Processes:
    """The processes that decide together; this one stands for a process on its own.

    Attributes:
        rank: number of this process.
        size: how many there are.

    Example:
        >>> Processes().agree(3)
        3
    """

    rank: int = 0
    size: int = 1

    def add_up(self, total: Tensor) -> Tensor:
        """The sum of a tensor over all processes."""
        return total

    def agree(self, value: T) -> T:
        """The value that the first process has."""
        return value

    def give(self, value: T, owner: int) -> T:
        """The value that the process number ``owner`` has."""
        return value

    def together(self, work: Callable[[], T]) -> T:
        """Do something on all processes: it succeeds on all of them, or on none.

        Args:
            work: may exchange, and may contain further work of this kind.

        Raises:
            TroubleError: on all processes, if one met trouble that concerns one layer only.
            Exception: whatever else ``work`` raised; other processes raise as well.
        """
        try:
            return work()
        except Exception as error:
            reach = reach_of(error)
            if reach is Reach.RUN:
                raise
            raise TroubleError(reach, describe(error)) from error

    def map(
        self, work: Work[T], alike: Mapping[int, bool], tell: Callable[[T], T] = _same
    ) -> dict[int, Outcome[T]]:
        """Do the work on every layer; all processes end with all outcomes.

        Out of memory, work is done again on the CPU. A failure that concerns one layer is its
        outcome; any other ends the work on all processes.

        Args:
            work: on the layer of a number.
            alike: number of each layer -> whether all processes hold the same of it, so that one
                of them works for all; else all work together.
            tell: what the other processes get to know of a result.

        Raises:
            Exception: whatever stopped the work; other processes raise as well.
        """
        owners = {i: owner_of(i, self.size) for i in alike if alike[i]} if self.size > 1 else {}
        outcomes = self._share_out(work, owners, tell) if owners else {}
        return {i: outcomes[i] if i in owners else _outcome(partial(work, i), self) for i in alike}

    def _share_out(
        self, work: Work[T], owners: Mapping[int, int], tell: Callable[[T], T]
    ) -> dict[int, Outcome[T]]:
        alone, told = Processes(), dict[int, Outcome[T]]()

        def own_part() -> dict[int, Outcome[T]]:
            done = {i: _outcome(partial(work, i), alone) for i in owners if owners[i] == self.rank}
            told.update({i: outcome.told(tell) for i, outcome in done.items()})
            return done

        outcomes = self.together(own_part)
        for owner in sorted(set(owners.values())):
            outcomes = self.give(told, owner) | outcomes
        return outcomes


def owner_of(index: int, size: int) -> int:
    """The process out of ``size`` that works for all on the layer number ``index``.

    Example:
        >>> [owner_of(index, 2) for index in range(3)]
        [0, 1, 0]
    """
    return index % size


def _outcome(work: Callable[[Processes, bool], T], processes: Processes) -> Outcome[T]:
    try:
        return Outcome(processes.together(lambda: work(processes, False)))
    except TroubleError as trouble:
        reason, reach = trouble.reason, trouble.reach
    if reach is not Reach.DEVICE:
        return Outcome(failure=reason)
    # Outside of the handler, so that the exception lets go of what it holds in memory.
    try:
        value = processes.together(lambda: _on_cpu(work, processes))
    except TroubleError as trouble:
        return Outcome(failure=f"{trouble.reason} (on the CPU as well)")
    return Outcome(value, note=f"analysed on the CPU ({reason})")


def _on_cpu(work: Callable[[Processes, bool], T], processes: Processes) -> T:
    try:
        return work(processes, True)
    except (CompreSSMError, TroubleError):
        raise
    except Exception as error:
        if reach_of(error) is not Reach.RUN:
            raise
        # Kernels that need another device are no reason to stop.
        raise LinAlgError(describe(error)) from error
