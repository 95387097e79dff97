"""The ranks of a Trainer's strategy: they decide together, whatever fails in one of them."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_compressm.callbacks import _lightning as pl
from lightning_compressm.errors import CompreSSMError, SurgeryError
from lightning_compressm.reduction.failures import Reach, TroubleError, describe, reach_of
from lightning_compressm.reduction.processes import Processes

__all__ = ["Ranks", "decide_together"]

T = TypeVar("T")


class Ranks(Processes):
    """The processes of a Trainer's strategy, kept in step whatever fails in one of them.

    Before each exchange, and at the end of each piece of work, all ranks say how they fare, so that
    none waits for one that has left. All exchanges end with the strategy's timeout at the latest.
    """

    def __init__(self, strategy: pl.Strategy) -> None:
        self.strategy = strategy
        self.size = int(getattr(strategy, "world_size", 1))
        self.rank = int(getattr(strategy, "global_rank", 0))
        self._over = False  # the others know of the end, or can't be reached

    def add_up(self, total: Tensor) -> Tensor:
        """The sum over all ranks, on the tensor's device."""
        self._tell(Reach.NONE)
        there = total.detach().clone().to(self.strategy.root_device)
        summed: Tensor = self._exchange(lambda: self.strategy.reduce(there, reduce_op="sum"))
        return summed.to(total.device)

    def agree(self, value: T) -> T:
        """What rank 0 has."""
        return self.give(value, 0)

    def give(self, value: T, owner: int) -> T:
        """What the rank ``owner`` has."""
        if self.size > 1 and self.rank == owner:
            pickle.dumps(value)  # what can't be sent must not fail while the others wait for it
        self._tell(Reach.NONE)
        given: T = self._exchange(lambda: self.strategy.broadcast(value, src=owner))
        return given

    def together(self, work: Callable[[], T]) -> T:
        """Do something on all ranks: it succeeds on all of them, or on none.

        Raises:
            TroubleError: on all ranks, if one met trouble that concerns one layer only.
            OtherRankError: if another rank failed altogether.
            Exception: whatever else ``work`` raised here; the other ranks raise as well.
        """
        try:
            result = work()
        except TroubleError:
            raise  # met in an exchange, so all ranks know of it
        except Exception as error:
            if self._over:
                raise
            reach, reason = reach_of(error), describe(error)
            self._tell(reach, f"rank {self.rank}: {reason}" if self.size > 1 else reason)
            raise
        self._tell(Reach.NONE)
        return result

    def _tell(self, reach: Reach, reason: str = "") -> None:
        """Say how this rank fares, and hear how the worst one does.

        Returns only if all are well, or if this rank is the one whose exception ends the work.
        """
        mine = reach * self.size + (self.rank if reach else 0)
        code = torch.tensor(mine, device=self.strategy.root_device)
        worst, rank = divmod(
            int(self._exchange(lambda: self.strategy.reduce(code, reduce_op="max"))), self.size
        )
        if worst == Reach.NONE:
            return
        self._over = worst == Reach.RUN
        reason = self._exchange(lambda: self.strategy.broadcast(reason, src=rank))
        if worst < Reach.RUN:
            raise TroubleError(Reach(worst), reason)
        if reach < Reach.RUN:
            raise OtherRankError(f"another process failed; nothing was changed here ({reason}).")

    def _exchange(self, exchange: Callable[[], Any]) -> Any:
        try:
            return exchange()
        except Exception as error:
            self._over = True
            raise ExchangeError(
                "the processes could not exchange what a reduction needs; nothing was changed "
                f"here. Another one has ended or hangs ({describe(error)})."
            ) from error


class OtherRankError(SurgeryError):
    """A step that all ranks take together failed elsewhere."""


class ExchangeError(SurgeryError):
    """The ranks can't reach each other any more."""


def decide_together(strategy: pl.Strategy, decide: Callable[[Processes], T]) -> T:
    """Run ``decide`` on every rank; all get the result of rank 0, or all raise.

    Raises:
        CompreSSMError: or whatever else ``decide`` raised here; :class:`OtherRankError` where
            another rank failed; :class:`ExchangeError` where one can't be reached.
    """
    ranks = Ranks(strategy)
    try:
        return ranks.together(lambda: ranks.agree(decide(ranks)))
    except (CompreSSMError, ValueError):
        raise
    except Exception as error:
        raise CompreSSMError(f"the analysis failed: {describe(error)}") from error
