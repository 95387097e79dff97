"""What a Trainer's strategy has to do with a reduction: exchanges, all or nothing, DDP re-wrap."""

from __future__ import annotations

import gc
import pickle
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch import Tensor

from lightning_compressm.callbacks._averages import averages_of
from lightning_compressm.errors import CompreSSMError, SurgeryError
from lightning_compressm.model.change import change
from lightning_compressm.reduction.failures import Reach, TroubleError, describe, reach_of
from lightning_compressm.reduction.processes import Processes
from lightning_compressm.surgery.optimizer import OptimizerStatePolicy
from lightning_compressm.surgery.plan import SurgeryPlan

__all__ = [
    "Ranks",
    "carry_out",
    "decide_together",
    "swap",
]

T = TypeVar("T")

_POWER_SGD = ("error_dict", "p_memory_dict", "q_memory_dict", "iter")


class Ranks(Processes):
    """The processes of a Trainer's strategy, kept in step whatever fails in one of them.

    Before each exchange, and at the end of each piece of work, all ranks say how they fare, so that
    none waits for one that has left. All exchanges end with the strategy's timeout at the latest.
    """

    def __init__(self, strategy: Strategy) -> None:
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


def decide_together(strategy: Strategy, decide: Callable[[Processes], T]) -> T:
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


def swap(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    plan: SurgeryPlan,
    optimizer_state: OptimizerStatePolicy,
    before: Callable[[pl.Trainer, pl.LightningModule], Callable[[], None]],
) -> None:
    """Carry out ``plan`` on every rank, or on none, after calling ``before`` on each.

    ``before`` returns what takes its own work back where nothing is carried out.

    Raises:
        TroubleError: on every rank if one has no room for the new tensors.
        SurgeryError: or what was raised here, on every rank if any rank failed.
            Model, optimizers and strategy are untouched in both cases.
    """

    def work(undo: ExitStack) -> None:
        undo.callback(before(trainer, pl_module))
        change(
            pl_module,
            plan,
            trainer.optimizers,
            optimizer_state,
            pending_gradients=not pl_module.automatic_optimization,
            averages=averages_of(trainer, pl_module),
            undo=undo,
        )

    carry_out(trainer.strategy, work)


def carry_out(strategy: Strategy, work: Callable[[ExitStack], None]) -> None:
    """Change the model's shape on every rank, or on none.

    Args:
        strategy: of the Trainer.
        work: changes everything; puts what takes it back on the stack that it is given.

    Raises:
        TroubleError: on every rank if one has no room for the new tensors.
        SurgeryError: or what was raised here, on every rank if any rank failed.
            Model, optimizers and strategy are untouched in both cases.
    """
    ranks = Ranks(strategy)
    with ExitStack() as undo:
        ranks.together(lambda: work(undo))
        if isinstance(strategy, DDPStrategy):
            undo.callback(_wrapper_restorer(strategy))
            # A rank that fails here tells nobody: the others may be in an exchange of DDP's own,
            # which ends when this rank does, or with the strategy's timeout.
            _rewrap(strategy)
            ranks.together(lambda: None)
        undo.pop_all()  # from here on nothing is taken back
    gc.collect()  # the old reducer's hooks on parameters that stayed must go now


def _rewrap(strategy: DDPStrategy) -> None:
    """DDP buckets the parameters it saw at construction; give it the new ones."""
    strategy.model = strategy.lightning_module
    strategy._pl_static_graph_delay_done = False
    _forget_compression(strategy._ddp_comm_state)
    strategy.configure_ddp()


def _forget_compression(state: Any) -> None:
    """PowerSGD's factors and remainders have the shapes of buckets that no longer exist."""
    if not hasattr(state, "error_dict"):
        return
    for memory in (state.error_dict, state.p_memory_dict, state.q_memory_dict):
        memory.clear()
    # DDP builds its buckets twice, so the first exchanges must not be compressed yet.
    state.iter = min(state.iter, max(0, state.start_powerSGD_iter - 2))


def _wrapper_restorer(strategy: DDPStrategy) -> Callable[[], None]:
    wrapped, delayed = strategy.model, strategy._pl_static_graph_delay_done
    compression: Any = strategy._ddp_comm_state
    kept = {n: getattr(compression, n) for n in _POWER_SGD if hasattr(compression, n)}
    contents = {n: dict(memory) for n, memory in kept.items() if isinstance(memory, dict)}

    def restore() -> None:
        strategy.model = wrapped
        strategy._pl_static_graph_delay_done = delayed
        for name, value in kept.items():
            if name in contents:
                value.update(contents[name])
            else:
                setattr(compression, name, value)

    return restore
