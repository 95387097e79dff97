"""What a Trainer's strategy has to do with a reduction: refusals, broadcast, DDP re-wrap."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import lightning.pytorch as pl
from lightning.pytorch.callbacks import (
    Callback,
    GradientAccumulationScheduler,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from torch import Tensor

from lightning_compressm.compressor import apply_proposal
from lightning_compressm.discovery import SSMLayer
from lightning_compressm.errors import CompreSSMError, SurgeryError, UnsupportedStrategyError
from lightning_compressm.recording import Processes
from lightning_compressm.surgery.loading import lacks_resize_hooks
from lightning_compressm.surgery.optimizer import OptimizerStatePolicy, check_optimizer
from lightning_compressm.surgery.plan import SurgeryPlan

__all__ = [
    "Ranks",
    "check_optimizers",
    "check_precision",
    "check_pruning",
    "check_returned_weights",
    "check_trainer",
    "decide_together",
    "swap",
]

T = TypeVar("T")

_PRECISIONS = ("32-true", "64-true", "bf16-mixed", "16-mixed", "bf16-true")


def check_trainer(trainer: pl.Trainer) -> None:
    """Refuse strategies, precisions and callbacks under which a reduction would go wrong.

    Raises:
        UnsupportedStrategyError: naming what was found and what works.
    """
    strategy = trainer.strategy
    if type(strategy) not in (SingleDeviceStrategy, DDPStrategy):
        raise UnsupportedStrategyError(
            f"{type(strategy).__name__} is not supported; expected a single device or DDP. It "
            "shards or moves parameters in ways that a change of shape breaks."
        )
    if getattr(strategy, "_model_averaging_period", None) is not None:
        raise UnsupportedStrategyError(
            "DDPStrategy(model_averaging_period=...) is not supported: post-local SGD rebuilds "
            "the optimizers around the old parameters. Leave it out."
        )
    _check_static_graph(trainer)
    if trainer.precision not in _PRECISIONS:
        raise UnsupportedStrategyError(
            f"precision '{trainer.precision}' is not supported; expected one of "
            f"{', '.join(_PRECISIONS)}."
        )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightAveraging | StochasticWeightAveraging):
            raise UnsupportedStrategyError(
                f"the callback {_name(callback)} is not supported together with a reduction yet: "
                "it keeps copies of the weights in their old shape. Leave it out."
            )


def _check_static_graph(trainer: pl.Trainer) -> None:
    """DDP learns a static graph from its first batch, which has to exchange gradients."""
    accumulates = trainer.accumulate_grad_batches > 1 or any(
        isinstance(c, GradientAccumulationScheduler) and c.going_to_accumulate_grad_batches()
        for c in trainer.callbacks  # type: ignore[attr-defined]
    )
    options = getattr(trainer.strategy, "_ddp_kwargs", {})
    if accumulates and options.get("static_graph"):
        raise UnsupportedStrategyError(
            "DDPStrategy(static_graph=True) is not supported with accumulated gradients: torch "
            "fails if the first batch after a reduction exchanges none. Leave static_graph out."
        )


def check_returned_weights(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Refuse spawned and forked processes whose weights the main process could not take back.

    To be called before this process installs hooks of its own.

    Raises:
        UnsupportedStrategyError: naming the layers.
    """
    if not isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        return
    if lacking := lacks_resize_hooks(pl_module):
        raise UnsupportedStrategyError(
            "spawned and forked processes send their weights back to the model in the main "
            f"process, where {', '.join(map(repr, lacking))} can't load a smaller state dimension. "
            "Call lightning_compressm.surgery.loading.install_resize_hooks(model) before fit, or "
            "use strategy='ddp'."
        )


def check_precision(trainer: pl.Trainer, layers: Iterable[SSMLayer]) -> None:
    """Refuse complex parameters where the precision would drop their imaginary part.

    To be called in ``setup``: when training starts, the precision plugin has cast them already.

    Raises:
        UnsupportedStrategyError: naming the layer.
    """
    if trainer.precision != "bf16-true":
        return
    for layer in layers:
        if any(p.is_complex() for p in layer.module.parameters()):
            raise UnsupportedStrategyError(
                f"layer '{layer.name}' has complex parameters, and precision 'bf16-true' turns "
                "them into real ones. Use 'bf16-mixed', or a layer with real parameters."
            )


def check_pruning(trainer: pl.Trainer, layers: Iterable[SSMLayer]) -> None:
    """Refuse ``ModelPruning`` of the layers that may be reduced; of others it is no trouble.

    To be called after ``setup``, in which that callback settles on what it prunes.

    Raises:
        UnsupportedStrategyError: naming the layer and what would be pruned in it.
    """
    owners = {id(module): layer for layer in layers for module in layer.module.modules()}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if not isinstance(callback, ModelPruning):
            continue
        for module, name in callback._parameters_to_prune:
            if id(module) in owners:
                raise UnsupportedStrategyError(
                    f"{_name(callback)} prunes '{name}' of {type(module).__name__} in the SSM "
                    f"layer '{owners[id(module)].name}', and its mask keeps the old shape. Give it "
                    "`parameters_to_prune` without these layers, or put them into `ignore`."
                )


def check_optimizers(trainer: pl.Trainer) -> None:
    """Refuse optimizers whose state can't follow.

    Raises:
        UnsupportedOptimizerError: naming the optimizer.
    """
    for optimizer in trainer.optimizers:
        check_optimizer(optimizer)


class Ranks(Processes):
    """The processes of a Trainer's strategy; a failure in one of them ends the work in all.

    Before each exchange all ranks say whether they are well, so that none waits for one that is
    gone.
    """

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy

    def add_up(self, total: Tensor) -> Tensor:
        """The sum over all ranks, on the tensor's device."""
        self.confirm(True)
        there = total.detach().clone().to(self.strategy.root_device)
        summed: Tensor = self.strategy.reduce(there, reduce_op="sum")
        return summed.to(total.device)

    def agree(self, value: T) -> T:
        """What rank 0 has."""
        self.confirm(True)
        agreed: T = self.strategy.broadcast(value)
        return agreed

    def confirm(self, well: bool) -> None:
        """Raise :class:`OtherRankError` if another rank is not well."""
        if not self.strategy.reduce_boolean_decision(well, all=True) and well:
            raise OtherRankError("the analysis failed on another rank; nothing was changed here.")


class OtherRankError(SurgeryError):
    """A step that all ranks take together failed elsewhere."""


def decide_together(strategy: Strategy, decide: Callable[[Processes], T]) -> T:
    """Run ``decide`` on every rank; all get the result of rank 0, or all raise.

    Raises:
        CompreSSMError: or whatever else ``decide`` raised here; :class:`OtherRankError` where
            another rank failed.
    """
    ranks = Ranks(strategy)
    try:
        result = decide(ranks)
    except OtherRankError:
        raise
    except Exception as error:
        ranks.confirm(False)
        if isinstance(error, CompreSSMError | ValueError):
            raise
        raise CompreSSMError(f"the analysis failed: {type(error).__name__}: {error}") from error
    return ranks.agree(result)


def swap(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    plan: SurgeryPlan,
    optimizer_state: OptimizerStatePolicy,
) -> None:
    """Carry out ``plan`` on every rank, or on none.

    Raises:
        SurgeryError: on every rank if any rank failed; model and optimizers are untouched.
    """
    undo, error = None, None
    try:
        undo = apply_proposal(
            pl_module,
            plan,
            trainer.optimizers,
            optimizer_state,
            pending_gradients=not pl_module.automatic_optimization,
        )
    except Exception as raised:
        error = raised
    if not trainer.strategy.reduce_boolean_decision(error is None, all=True):
        if undo is not None:
            undo()
        raise error or SurgeryError("another rank could not carry out the reduction; undone here.")
    assert undo is not None
    try:
        _rewrap(trainer.strategy)
    except BaseException:
        undo()
        raise


def _rewrap(strategy: Strategy) -> None:
    """DDP buckets the parameters it saw at construction; give it the new ones."""
    if not isinstance(strategy, DDPStrategy):
        return
    wrapped = strategy.model
    try:
        strategy.model = strategy.lightning_module
        strategy._pl_static_graph_delay_done = False
        _forget_compression(strategy._ddp_comm_state)
        strategy.configure_ddp()
    except BaseException:
        strategy.model = wrapped
        raise
    del wrapped
    gc.collect()  # the old reducer's hooks on parameters that stayed must go now


def _forget_compression(state: Any) -> None:
    """PowerSGD's factors and remainders have the shapes of buckets that no longer exist."""
    if not hasattr(state, "error_dict"):
        return
    for memory in (state.error_dict, state.p_memory_dict, state.q_memory_dict):
        memory.clear()
    # DDP builds its buckets twice, so the first exchanges must not be compressed yet.
    state.iter = min(state.iter, max(0, state.start_powerSGD_iter - 2))


def _name(callback: Callback) -> str:
    return type(callback).__name__
