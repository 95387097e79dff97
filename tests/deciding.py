"""A decision on all SSM layers of a model, as `compress()` comes to it."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_compressm.model.layers import select_layers
from lightning_compressm.reduction.decide import decide
from lightning_compressm.reduction.decision import Decision
from lightning_compressm.reduction.policy import ReductionPolicy


def decided(model: nn.Module, *args: Any, **choices: Any) -> Decision:
    """What is decided under a policy of these choices; `args` are further ones of `decide`."""
    policy = ReductionPolicy(**choices)
    layers = select_layers(model, policy.layers, policy.ignore, to_reduce=True)
    return decide(model, layers, policy, *args)
