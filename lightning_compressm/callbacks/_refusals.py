"""What can't work together with a reduction is refused before the first step."""

from __future__ import annotations

from collections.abc import Iterable

from lightning_compressm.callbacks import _lightning as pl
from lightning_compressm.callbacks._limits import accumulation_changes
from lightning_compressm.callbacks._strategy import delays_static_graph, is_supported
from lightning_compressm.errors import UnsupportedStrategyError
from lightning_compressm.model.layers import SSMLayer, find_ssm_layers
from lightning_compressm.model.resizing import lacks_resize_hooks
from lightning_compressm.surgery.optimizer import check_optimizer

__all__ = ["check_fit", "check_setup"]

_PRECISIONS = ("32-true", "64-true", "bf16-mixed", "16-mixed", "bf16-true")


def check_setup(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """All that can be seen before the model is moved, cast or wrapped.

    To be called before this package's hooks are installed.

    Raises:
        UnsupportedStrategyError: naming what was found and what works.
    """
    _check_trainer(trainer, pl_module)
    _check_precision(trainer, find_ssm_layers(pl_module).values())
    _check_returned_weights(trainer, pl_module)


def check_fit(trainer: pl.Trainer, layers: Iterable[SSMLayer]) -> None:
    """What is known only when optimizers are there and other callbacks are set up.

    Raises:
        UnsupportedStrategyError: naming a callback.
        UnsupportedOptimizerError: naming an optimizer whose state can't follow.
    """
    _check_pruning(trainer, layers)
    for optimizer in trainer.optimizers:
        check_optimizer(optimizer)


def _check_trainer(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Refuse strategies, precisions and callbacks under which a reduction would go wrong.

    Raises:
        UnsupportedStrategyError: naming what was found and what works.
    """
    strategy = trainer.strategy
    if not is_supported(strategy):
        raise UnsupportedStrategyError(
            f"{type(strategy).__name__} is not supported; expected a single device or DDP. It "
            "shards or moves parameters in ways that a change of shape breaks."
        )
    if getattr(strategy, "_model_averaging_period", None) is not None:
        raise UnsupportedStrategyError(
            "DDPStrategy(model_averaging_period=...) is not supported: post-local SGD rebuilds "
            "the optimizers around the old parameters. Leave it out."
        )
    _check_static_graph(trainer, pl_module)
    if trainer.precision not in _PRECISIONS:
        raise UnsupportedStrategyError(
            f"precision '{trainer.precision}' is not supported; expected one of "
            f"{', '.join(_PRECISIONS)}."
        )


def _check_static_graph(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """DDP learns a static graph from its first batch, which has to exchange gradients."""
    if not getattr(trainer.strategy, "_ddp_kwargs", {}).get("static_graph"):
        return
    if not pl_module.automatic_optimization and not delays_static_graph(trainer.strategy):
        raise UnsupportedStrategyError(
            "DDPStrategy(static_graph=True) is not supported with manual optimization by this "
            "version of Lightning: its ranks end with different weights, with or without "
            "CompreSSMCallback. Install Lightning 2.6 or later, or leave static_graph out."
        )
    if trainer.accumulate_grad_batches > 1 or accumulation_changes(trainer):
        raise UnsupportedStrategyError(
            "DDPStrategy(static_graph=True) is not supported with accumulated gradients: torch "
            "fails if the first batch after a reduction exchanges none. Leave static_graph out."
        )


def _check_returned_weights(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Refuse spawned and forked processes whose weights the main process could not take back.

    To be called before this process installs hooks of its own.

    Raises:
        UnsupportedStrategyError: naming the layers.
    """
    if not isinstance(trainer.strategy.launcher, pl.MultiProcessingLauncher):
        return
    if lacking := lacks_resize_hooks(pl_module):
        raise UnsupportedStrategyError(
            "spawned and forked processes send their weights back to the model in the main "
            f"process, where {', '.join(map(repr, lacking))} can't load a smaller state dimension. "
            "Call lightning_compressm.install_resize_hooks(model) before fit, or "
            "use strategy='ddp'."
        )


def _check_precision(trainer: pl.Trainer, layers: Iterable[SSMLayer]) -> None:
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


def _check_pruning(trainer: pl.Trainer, layers: Iterable[SSMLayer]) -> None:
    """Refuse ``ModelPruning`` of the layers that may be reduced; of others it is no trouble.

    To be called after ``setup``, in which that callback settles on what it prunes.

    Raises:
        UnsupportedStrategyError: naming the layer and what would be pruned in it.
    """
    owners = {id(module): layer for layer in layers for module in layer.module.modules()}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if not isinstance(callback, pl.ModelPruning):
            continue
        for module, name in callback._parameters_to_prune:
            if id(module) in owners:
                raise UnsupportedStrategyError(
                    f"{type(callback).__name__} prunes '{name}' of {type(module).__name__} in the "
                    f"SSM layer '{owners[id(module)].name}', and its mask keeps the old shape. "
                    "Give it `parameters_to_prune` without these layers, or put them into `ignore`."
                )
