"""What a Trainer's strategy has to do with a reduction: refusals, broadcast, DDP re-wrap."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import (
    Callback,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy

from lightning_compressm.compressor import apply_proposal
from lightning_compressm.discovery import SSMLayer
from lightning_compressm.errors import CompreSSMError, SurgeryError, UnsupportedStrategyError
from lightning_compressm.surgery.optimizer import OptimizerStatePolicy, check_optimizer
from lightning_compressm.surgery.plan import SurgeryPlan

__all__ = [
    "check_optimizers",
    "check_precision",
    "check_trainer",
    "decide_on_rank_zero",
    "swap",
]

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
    if trainer.precision not in _PRECISIONS:
        raise UnsupportedStrategyError(
            f"precision '{trainer.precision}' is not supported; expected one of "
            f"{', '.join(_PRECISIONS)}."
        )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightAveraging | StochasticWeightAveraging | ModelPruning):
            raise UnsupportedStrategyError(
                f"the callback {_name(callback)} is not supported together with a reduction yet: "
                "it keeps copies or masks of the weights in their old shape. Leave it out."
            )


def check_precision(trainer: pl.Trainer, layers: Iterable[SSMLayer]) -> None:
    """Refuse complex parameters where the precision would drop their imaginary part.

    Raises:
        UnsupportedStrategyError: naming the layer.
    """
    if trainer.precision != "bf16-true":
        return
    for layer in layers:
        # The precision plugin has cast them already when training starts, so ask the buffers too.
        if any(p.is_complex() for p in layer.module.parameters()):
            raise UnsupportedStrategyError(
                f"layer '{layer.name}' has complex parameters, and precision 'bf16-true' turns "
                "them into real ones. Use 'bf16-mixed', or a layer with real parameters."
            )


def check_optimizers(trainer: pl.Trainer) -> None:
    """Refuse optimizers whose state can't follow.

    Raises:
        UnsupportedOptimizerError: naming the optimizer.
    """
    for optimizer in trainer.optimizers:
        check_optimizer(optimizer)


def decide_on_rank_zero(strategy: Strategy, decide: Callable[[], Any]) -> Any:
    """Run ``decide`` on rank 0 only; every rank gets its result, or raises its error.

    Raises:
        CompreSSMError: or whatever else ``decide`` raised, on every rank.
    """
    result, error = None, None
    if strategy.is_global_zero:
        try:
            result = decide()
        except (CompreSSMError, ValueError) as raised:
            error = raised
        except Exception as raised:
            error = CompreSSMError(f"the analysis failed: {type(raised).__name__}: {raised}")
            error.__cause__ = raised
    result, error = strategy.broadcast((result, error))
    if error is not None:
        raise error
    return result


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
        for name in ("error_dict", "p_memory_dict", "q_memory_dict"):  # PowerSGD
            if hasattr(strategy._ddp_comm_state, name):
                getattr(strategy._ddp_comm_state, name).clear()
        strategy.configure_ddp()
    except BaseException:
        strategy.model = wrapped
        raise
    del wrapped
    gc.collect()  # the old reducer's hooks on parameters that stayed must go now


def _name(callback: Callback) -> str:
    return type(callback).__name__
