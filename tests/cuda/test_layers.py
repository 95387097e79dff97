"""Layers on CUDA against the same layers on the CPU: outputs, gradients, spectra and cuts."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_compressm import compress, find_ssm_layers, hankel_spectra
from lightning_compressm.nn import LRU, S4D, S5
from lightning_compressm.nn._mamba import Mamba2Block, MambaBlock
from tests.nn._reference import relative_error

pytestmark = pytest.mark.cuda

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "LRU, in chunks": lambda: LRU(8, 256),
    "LRU, as a scan": lambda: LRU(64, 32),
    "S4D": lambda: S4D(16, 32),
    "S5, in chunks": lambda: S5(8, 256),
    "S5, as a scan": lambda: S5(64, 32),
    "Mamba": lambda: MambaBlock(8, 24),
    "Mamba-2": lambda: Mamba2Block(16, 24),
}
# In float32 an exponential more or less is a unit in the last place, over hundreds of steps.
PRECISIONS = {torch.float32: 5e-4, torch.float64: 1e-8}
layers = pytest.mark.parametrize("name", LAYERS)


def step(layer: nn.Module, inputs: Tensor) -> list[Tensor]:
    """Outputs, and gradients of inputs and all parameters."""
    inputs = inputs.detach().requires_grad_()
    outputs = layer(inputs)
    weight = torch.linspace(-1, 1, outputs.numel(), dtype=torch.float64).view(outputs.shape)
    wanted = [inputs, *layer.parameters()]
    return [outputs, *torch.autograd.grad(outputs, wanted, weight.to(outputs))]


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("length", [1, 37, 787])
@layers
def test_outputs_and_gradients(
    device: torch.device, name: str, length: int, dtype: torch.dtype
) -> None:
    layer = LAYERS[name]().to(dtype)
    inputs = torch.randn(3, length, width_of(layer), dtype=dtype)
    expected = step(copy.deepcopy(layer).double(), inputs.double())
    for actual, reference in zip(step(layer.to(device), inputs.to(device)), expected, strict=True):
        assert actual.dtype == dtype
        assert relative_error(actual.cpu(), reference) < PRECISIONS[dtype]


def width_of(layer: nn.Module) -> int:
    """Channels outside."""
    projection = getattr(layer, "out_proj", None)
    return projection.out_features if projection is not None else layer.d_model


@layers
def test_autocast_leaves_the_recurrence_alone(device: torch.device, name: str) -> None:
    layer = LAYERS[name]().to(device)
    inputs = torch.randn(3, 200, width_of(layer), device=device)
    exact = step(layer, inputs)
    with torch.autocast(device.type, torch.bfloat16):
        rounded = step(layer, inputs)
    for actual, expected in zip(rounded, exact, strict=True):
        assert relative_error(actual.float(), expected) < 0.1
        assert actual.isfinite().all()


@layers
def test_spectra_and_cuts(device: torch.device, name: str) -> None:
    """The same states go, and training goes on where the model is."""
    layer = LAYERS[name]().double()
    inputs = torch.randn(3, 100, width_of(layer), dtype=torch.float64)
    there, sample = copy.deepcopy(layer).to(device), inputs.to(device)
    for one, other in zip(
        hankel_spectra(layer, sample=inputs).values(),
        hankel_spectra(there, sample=sample).values(),
        strict=True,
    ):
        assert relative_error(other.cpu(), one) < 1e-6

    kept = next(iter(find_ssm_layers(layer).values())).state_dim // 4
    outputs = []
    for model, batch in ((layer, inputs), (there, sample)):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9, fused=True)
        model(batch).square().mean().backward()
        optimizer.step()
        compress(model, state_dim=kept, sample=batch, max_output_error=None, optimizers=[optimizer])
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
        outputs.append(model(batch).detach().cpu())
        moments = [v for state in optimizer.state.values() for v in state.values() if v.ndim]
        held = [*model.parameters(), *moments]
        assert {t.device.type for t in held} == {batch.device.type}
        assert {id(p) for p in model.parameters()} == {
            id(p) for group in optimizer.param_groups for p in group["params"]
        }
    assert next(iter(find_ssm_layers(there).values())).state_dim == kept
    assert relative_error(outputs[1], outputs[0]) < 1e-3


def test_out_of_memory_the_analysis_goes_on_on_the_cpu(cuda: torch.device) -> None:
    """With no room for Gramians of 1024 states, 32 MB each, on the device."""
    layer = LRU(16, 1024).to(cuda)
    layer(torch.randn(2, 50, 16, device=cuda))  # libraries take their workspaces
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info()
    room = torch.cuda.memory_reserved() + (24 << 20)
    try:
        torch.cuda.set_per_process_memory_fraction(room / total)
        report = compress(layer, state_dim=64)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    (event,) = report.events
    assert "analysed on the CPU (OutOfMemoryError" in event.reason
    assert layer.d_state == event.new_state_dim == 64
    assert layer.B_re.device.type == "cuda"
    assert layer(torch.randn(2, 50, 16, device=cuda)).isfinite().all()
