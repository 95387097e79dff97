"""Layers inside a compiled training step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_compressm.nn import LRU, S4D, S5
from lightning_compressm.nn._mamba import MambaBlock


@pytest.mark.parametrize("make", [LRU, S4D, S5, MambaBlock])
def test_backward_that_runs_in_a_compiled_step(make: type[nn.Module]) -> None:
    """torch.compile then looks at the layer's own backward pass too, which is not for it."""
    torch._dynamo.reset()
    layer = make(4, 8)

    def step(x: torch.Tensor) -> None:
        loss = layer(x).square().mean()
        torch._dynamo.graph_break()
        loss.backward()

    gradients = []
    for run in (step, torch.compile(step, backend="eager", dynamic=True)):
        layer.zero_grad()
        for batch in (2, 3):
            run(torch.linspace(-1, 1, batch * 12 * 4).view(batch, 12, 4))
        gradients.append([p.grad for p in layer.parameters()])
    for eager, compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(compiled, eager)
