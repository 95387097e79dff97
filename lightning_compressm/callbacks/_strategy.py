"""What a Trainer's strategy has to do with a change of shape: all ranks or none, DDP re-wrap.

A strategy is supported if something is registered here by :func:`refreshes`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, TypeVar, get_args

from lightning_compressm.callbacks import _lightning as pl
from lightning_compressm.callbacks._averages import averages_of
from lightning_compressm.callbacks._ranks import Ranks
from lightning_compressm.model.change import change
from lightning_compressm.surgery.optimizer import OptimizerStatePolicy
from lightning_compressm.surgery.plan import SurgeryPlan

__all__ = ["carry_out", "delays_static_graph", "is_supported", "refreshes", "swap"]

Refresh = Callable[[Any, ExitStack], Callable[[], None]]
"""Lets a strategy take up new parameters, and puts what takes that back on the stack first; gives
what lets go of the old ones, to be called when nothing can fail any more."""

RefreshT = TypeVar("RefreshT", bound=Refresh)

_REFRESH: dict[type[pl.Strategy], Refresh] = {}
_DELAY = "_pl_static_graph_delay_done"  # whether the wrapper has seen its first backward pass
_POWER_SGD = ("error_dict", "p_memory_dict", "q_memory_dict", "iter")


def refreshes(strategy: type[pl.Strategy]) -> Callable[[RefreshT], RefreshT]:
    """Decorator: a function that lets this very class of strategies take up new parameters.

    Of a union each one, since Lightning's two packages have classes of their own.
    """

    def register(refresh: RefreshT) -> RefreshT:
        _REFRESH.update(dict.fromkeys(get_args(strategy) or (strategy,), refresh))
        return refresh

    return register


def is_supported(strategy: pl.Strategy) -> bool:
    """Whether models under this strategy can be reduced."""
    return type(strategy) in _REFRESH


def delays_static_graph(strategy: pl.Strategy) -> bool:
    """Whether DDP waits for the first backward pass by hand, as it does from Lightning 2.6 on."""
    return hasattr(strategy, _DELAY)


def swap(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    plan: SurgeryPlan,
    optimizer_state: OptimizerStatePolicy,
    before: Callable[[pl.Trainer, pl.LightningModule], Callable[[], None]],
    twins: Mapping[str, str] | None = None,
) -> None:
    """Carry out ``plan`` on every rank, or on none, after calling ``before`` on each.

    ``before`` returns what takes its own work back where nothing is carried out. ``twins`` are
    averages that the module holds itself, and what they average.

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
            twins=twins,
            undo=undo,
        )

    carry_out(trainer.strategy, work)


def carry_out(strategy: pl.Strategy, work: Callable[[ExitStack], None]) -> None:
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
        # A rank that fails here tells nobody: the others may be in an exchange of the strategy's
        # own, which ends when this rank does, or with the strategy's timeout.
        let_go = _REFRESH[type(strategy)](strategy, undo)
        ranks.together(lambda: None)
        undo.pop_all()  # from here on nothing is taken back
    let_go()


@refreshes(pl.SingleDeviceStrategy)
def _nothing(strategy: pl.SingleDeviceStrategy, undo: ExitStack) -> Callable[[], None]:
    """The model itself is all that there is."""
    return lambda: None


@refreshes(pl.DDPStrategy)
def _rewrap(strategy: pl.DDPStrategy, undo: ExitStack) -> Callable[[], None]:
    """DDP buckets the parameters it saw at construction; give it the new ones."""
    old = strategy.model
    undo.callback(_wrapper_restorer(strategy))
    strategy.model = strategy.lightning_module
    if delays_static_graph(strategy):
        setattr(strategy, _DELAY, False)
    _forget_compression(strategy._ddp_comm_state)
    strategy.configure_ddp()
    return lambda: _drop_reducer(old)


def _drop_reducer(wrapper: Any) -> None:
    """Its hooks on parameters that stayed would fire in every backward pass.

    The wrapper is part of a circle, so it lives on for a while; the reducer goes with the last of
    the two attributes that hold it.
    """
    for name in ("logger", "reducer"):
        if hasattr(wrapper, name):
            delattr(wrapper, name)


def _forget_compression(state: Any) -> None:
    """PowerSGD's factors and remainders have the shapes of buckets that no longer exist."""
    if not hasattr(state, "error_dict"):
        return
    for memory in (state.error_dict, state.p_memory_dict, state.q_memory_dict):
        memory.clear()
    # DDP builds its buckets twice, so the first exchanges must not be compressed yet.
    state.iter = min(state.iter, max(0, state.start_powerSGD_iter - 2))


def _wrapper_restorer(strategy: pl.DDPStrategy) -> Callable[[], None]:
    wrapped, delay = strategy.model, {k: v for k, v in vars(strategy).items() if k == _DELAY}
    compression: Any = strategy._ddp_comm_state
    kept = {n: getattr(compression, n) for n in _POWER_SGD if hasattr(compression, n)}
    contents = {n: dict(memory) for n, memory in kept.items() if isinstance(memory, dict)}

    def restore() -> None:
        strategy.model = wrapped
        vars(strategy).update(delay)
        for name, value in kept.items():
            if name in contents:
                value.update(contents[name])
            else:
                setattr(compression, name, value)

    return restore
