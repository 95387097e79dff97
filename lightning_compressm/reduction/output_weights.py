"""How much the loss depends on the outputs of selective layers, step by step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compressm._precision import double
from lightning_compressm.families import SelectiveFamily
from lightning_compressm.model.layers import SSMLayer
from lightning_compressm.reduction.recorder import Attached, silent

__all__ = ["OutputWeights", "WeightRecorder"]

OTHERS = 0.1  # the part of all steps alike: the next batch may ask for what this one did not


@dataclass(frozen=True, eq=False)
class OutputWeights:
    """The inputs of a selective layer, and what the loss asks of its outputs.

    Attributes:
        inputs: of each call, (batch, L, d_model).
        sizes: norms of the loss's gradient at the outputs, (batch, L) for each call.

    Example:
        >>> weights = OutputWeights([torch.zeros(1, 2, 3)], [torch.tensor([[0.0, 2.0]])])
        >>> weights.relative(lambda total: total)[0].square()
        tensor([[0.1000, 1.9000]])
    """

    inputs: Sequence[Tensor]
    sizes: Sequence[Tensor]

    def summed(self, add_up: Callable[[Tensor], Tensor]) -> OutputWeights:
        """Each process keeps those of its own data."""
        return self

    def relative(self, add_up: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Factors of each output's error, (batch, L); the mean of their squares is one.

        Args:
            add_up: adds a tensor up over processes.
        """
        sums = [
            torch.stack([size.square().sum(), size.new_tensor(size.numel())])
            for size in map(double, self.sizes)
        ]
        total, count = add_up(torch.stack(sums).sum(0)).tolist()
        scale = (1 - OTHERS) * count / total if total > 0 else 0.0
        return [(size.square() * scale + OTHERS).sqrt() for size in self.sizes]


class WeightRecorder(Attached):
    """Records what the loss asks of selective layers in a backward pass, while it is attached.

    Calls without gradients, and those whose output is no sequence as long as the input, do not
    count; a layer with a gradient that is not finite has no weights.

    Args:
        layers: to listen to; others than selective ones are left out.

    Example:
        >>> with WeightRecorder({}) as recorder:
        ...     recorder.found
        {}
    """

    def __init__(self, layers: Mapping[str, SSMLayer]) -> None:
        super().__init__()
        self._calls: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for layer in layers.values():
            if isinstance(layer.family, SelectiveFamily):
                hook = _Listener(self, layer, layer.family)
                self.handles.append(layer.module.register_forward_hook(hook, with_kwargs=True))

    @property
    def found(self) -> dict[str, OutputWeights]:
        """Layer name -> what was recorded."""
        return {
            name: OutputWeights(*map(list, zip(*calls, strict=True)))
            for name, calls in self._calls.items()
            if all(bool(torch.isfinite(size).all()) for _, size in calls)
        }

    def watch(self, name: str, inputs: Tensor, output: Tensor) -> None:
        """Take note of the gradient when it arrives at an output."""
        self.await_gradient(output, partial(self._arrived, name, inputs.detach()))

    def _arrived(self, name: str, inputs: Tensor, gradient: Tensor) -> None:
        self._calls[name].append((inputs, gradient.detach().float().norm(dim=-1)))


@dataclass(eq=False)
class _Listener:
    """Hears the calls of one layer; in a copy or a file of the module it does nothing."""

    recorder: WeightRecorder
    layer: SSMLayer
    family: SelectiveFamily

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        inputs = self.family.inputs(args, kwargs)
        first = output[0] if isinstance(output, tuple) else output
        fits = (
            inputs is not None
            and torch.is_tensor(first)
            and first.requires_grad
            and first.shape[:2] == inputs.shape[:2]
        )
        if fits and inputs is not None:
            self.recorder.watch(self.layer.name, inputs, first)

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return silent, ()
