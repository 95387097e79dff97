"""What a run is refused for, how that is provoked in a real Trainer, and what is said."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import strategies
from lightning.pytorch.callbacks import (
    Callback,
    GradientAccumulationScheduler,
    ModelPruning,
)
from lightning.pytorch.strategies import (
    DDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState
from torch.distributed.optim import ZeroRedundancyOptimizer

from lightning_compressm import CompreSSMCallback
from lightning_compressm.families import registered_families
from lightning_compressm.nn import LRU
from lightning_compressm.nn._mamba import MambaBlock

from ..families.layers import PortedLRU
from .helpers import Classifier, loader, trainer

Settings = dict[str, Any]


class Model(Classifier):
    """In float32; refusals come before its first step."""

    def __init__(self) -> None:
        super().__init__(dtype="float32")


class DeepSpeedStrategy(SingleDeviceStrategy):
    """By this name it is refused; the real one needs its package to be constructed."""


class FSDPStrategy(strategies.FSDPStrategy):
    """Lightning itself refuses to construct a Trainer with the plain one on a CPU."""


class Wrapped(torch.optim.SGD):
    """Keeps references of its own, as Lookahead and the like do."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)
        self.slow = [p for group in self.param_groups for p in group["params"]]


class With(Model):
    """Another optimizer."""

    def __init__(self, make: Callable[[Any], torch.optim.Optimizer]) -> None:
        super().__init__()
        self.make = make

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make(self.parameters())


def _zero(parameters: Any) -> torch.optim.Optimizer:
    return ZeroRedundancyOptimizer(parameters, torch.optim.SGD, lr=0.1)


def changed(change: Callable[[Any], None]) -> Model:
    """A model of which something was changed."""
    model = Model()
    change(model.net)
    return model


def _put(name: str, layer: nn.Module) -> Callable[[Any], None]:
    return lambda net: setattr(net, name, layer)


def _share_one(net: Any) -> None:
    net.second = LRU(4, 24)
    net.second.B_re = net.first.B_re


def _hook(net: Any) -> None:
    net.first.B_re.register_post_accumulate_grad_hook(lambda parameter: None)


def _hook_node(net: Any) -> None:
    function: Any = net.first.B_re.expand_as(net.first.B_re).grad_fn
    net.node = function.next_functions[0][0]
    net.node.register_hook(lambda *gradients: None)


class Adapter(nn.Module):
    """Wraps a linear map, as libraries for low-rank adaptation do."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base

    @property
    def weight(self) -> nn.Parameter:
        """As the package peft has it."""
        return self.base_layer.weight

    def forward(self, x: Any) -> Any:
        return self.base_layer(x)


def _adapt(net: Any) -> None:
    net.first, _ = registered_families()["Mamba"].example(d_state=16)
    net.first.x_proj = Adapter(net.first.x_proj)


def ddp(**options: Any) -> DDPStrategy:
    """DDP of one process: refusals are the same as for many."""
    return DDPStrategy(process_group_backend="gloo", **options)


def _local_sgd() -> DDPStrategy:
    from torch.distributed.algorithms.ddp_comm_hooks import post_localSGD_hook

    state = PostLocalSGDState(process_group=None, subgroup=None, start_localSGD_iter=8)
    hook = post_localSGD_hook.post_localSGD_hook
    return ddp(ddp_comm_state=state, ddp_comm_hook=hook, model_averaging_period=4)


@dataclass(frozen=True)
class Refused:
    """One thing that can't work.

    Attributes:
        what: as the documentation names it.
        message: a part of the error, as a regular expression.
        error: name of the error's class.
        settings: makes the Trainer's arguments.
        model: makes the module.
        callbacks: makes the callbacks besides, of the module.
        arguments: makes those of :class:`CompreSSMCallback`.
    """

    what: str
    message: str
    error: str = "UnsupportedStrategyError"
    settings: Callable[[], Settings] = dict
    model: Callable[[], pl.LightningModule] = Model
    callbacks: Callable[[Any], list[Callback]] = lambda model: []
    arguments: Callable[[], Settings] = dict

    def provoke(self, tmp: Path) -> tuple[Exception | None, pl.LightningModule]:
        """Try to train; the error, and the model as it is afterwards."""
        model = self.model()
        callback = CompreSSMCallback(verbose=False, **self.arguments())
        try:
            fit = trainer(tmp, callback, *self.callbacks(model), **self.settings())
            fit.fit(model, loader())
        except Exception as error:
            return error, model
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
        return None, model


def _strategy(make: Callable[[], Any]) -> Callable[[], Settings]:
    return lambda: {"strategy": make()}


def _with_average() -> Model:
    model = Model()
    model.ema = deepcopy(model.net).requires_grad_(False)
    return model


REFUSED = [
    Refused(
        "`FSDPStrategy`",
        "FSDPStrategy is not supported; expected a single",
        settings=_strategy(FSDPStrategy),
    ),
    Refused(
        "`ModelParallelStrategy`",
        "ModelParallelStrategy is not supported",
        settings=_strategy(ModelParallelStrategy),
    ),
    Refused(
        "`DeepSpeedStrategy`",
        "DeepSpeedStrategy is not supported",
        settings=_strategy(lambda: DeepSpeedStrategy(device=torch.device("cpu"))),
    ),
    Refused(
        "DDP with post-local SGD",
        r"model_averaging_period=\.\.\.\) is not supported",
        settings=_strategy(_local_sgd),
    ),
    Refused(
        "DDP with `static_graph=True` and accumulation",
        "static_graph=True.*accumulated gradients",
        settings=lambda: {"strategy": ddp(static_graph=True), "accumulate_grad_batches": 2},
    ),
    Refused(
        "the same with `GradientAccumulationScheduler`",
        "static_graph=True.*accumulated gradients",
        settings=_strategy(lambda: ddp(static_graph=True)),
        callbacks=lambda model: [GradientAccumulationScheduler({0: 1, 2: 2})],
    ),
    Refused(
        "precision `16-true`",
        "precision '16-true' is not supported",
        settings=lambda: {"precision": "16-true"},
    ),
    Refused(
        "precision `bf16-true` with complex parameters",
        "'net.first' has complex parameters.*turns them into real ones",
        settings=lambda: {"precision": "bf16-true"},
        model=lambda: changed(_put("first", PortedLRU(4, 4, 8))),
    ),
    Refused(
        "`ZeroRedundancyOptimizer`",
        "ZeroRedundancyOptimizer shards its state",
        "UnsupportedOptimizerError",
        settings=_strategy(ddp),
        model=lambda: With(_zero),
    ),
    Refused(
        "optimizers with references of their own to parameters",
        r"Wrapped keeps its own references to parameters in \['slow'\]",
        "UnsupportedOptimizerError",
        model=lambda: With(Wrapped),
    ),
    Refused(
        "`ModelPruning` of everything in a model whose SSM layers have a `weight` or `bias`",
        r"prunes 'weight' of \w+ in the SSM layer 'net.first'.*without these layers",
        model=lambda: changed(_put("first", MambaBlock(4, 8))),
        callbacks=lambda model: [ModelPruning("l1_unstructured", amount=0.2)],
    ),
    Refused(
        "`ModelPruning` of an SSM layer",
        r"prunes 'B_re' of LRU in the SSM layer 'net.first'.*without these layers",
        callbacks=lambda model: [
            ModelPruning("l1_unstructured", [(model.net.first, "B_re")], amount=0.2)
        ],
    ),
    Refused(
        "a run of unknown length, if the window is a share of it",
        "share of a run whose number of steps is unknown",
        "ValueError",
        arguments=lambda: {"tolerance": 0.05},
        settings=lambda: {"max_epochs": -1},
    ),
    Refused(
        "a window after the run's end",
        "starts after the run's last step but one",
        "ValueError",
        arguments=lambda: {"window": (5000, 6000)},
    ),
    Refused(
        "`monitor` beside another `CompreSSMCallback`",
        "monitor='val_loss': expected one CompreSSMCallback in the Trainer, got 2",
        "ValueError",
        arguments=lambda: {"monitor": "val_loss", "layers": ["net.first"]},
        callbacks=lambda model: [CompreSSMCallback(layers=["net.second"], verbose=False)],
    ),
    Refused(
        "a model without SSM layers",
        "no SSM layer found in Model",
        "UnsupportedLayerError",
        model=lambda: changed(
            lambda net: (_put("first", nn.Identity())(net), _put("second", nn.Identity())(net))
        ),
    ),
    Refused(
        "layer patterns that match nothing",
        r"'encoder\.\*' matches no SSM layer",
        "ValueError",
        arguments=lambda: {"layers": ["encoder.*"]},
    ),
    Refused(
        "SSM layers that share some of their tensors but not all",
        "share some of their state tensors but not all",
        "UnsupportedLayerError",
        model=lambda: changed(_share_one),
    ),
    Refused(
        "hooks on state parameters after accumulation of gradients",
        "'net.first' can't be reduced: 'B_re' has hooks after accumulation",
        "UnsupportedLayerError",
        model=lambda: changed(_hook),
    ),
    Refused(
        "hooks on the node that accumulates a state parameter's gradient",
        r"'net.first' can't be reduced: 'B_re' has hooks on the node .* \(AccumulateGrad\)",
        "UnsupportedLayerError",
        model=lambda: changed(_hook_node),
    ),
    Refused(
        "a copy of trained layers that is not trained, such as an average by hand",
        r"'ema' is not trained and is built like 'net'.*averages=\['ema\.\*'\]",
        "UnsupportedLayerError",
        model=_with_average,
    ),
    Refused(
        "adapters around a layer's projections",
        "'net.first' can't be reduced: 'x_proj.weight' is neither .* adapter",
        "UnsupportedLayerError",
        model=lambda: changed(_adapt),
    ),
]
