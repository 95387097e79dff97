"""Layers and scans that are exported, traced, or transformed by torch.func."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export
from torch.func import functional_call

from lightning_compressm import compress
from lightning_compressm.nn import LRU, S4D, S5, linear_recurrence, selective_scan
from lightning_compressm.nn._plain import plain_linear_recurrence, plain_scan
from tests.features import from_torch, needs
from tests.nn._reference import relative_error

from_torch_2_7 = needs(torch.compiler, "is_exporting")
LAYERS = [LRU, S4D, S5]
BATCH, LENGTH = Dim("batch"), Dim("length")
# Shorter than a chunk, one, one and a step, and many.
SHAPES = [(2, 50), (1, 1), (3, 31), (2, 32), (5, 33), (1, 700)]


class Recurrence(nn.Module):
    def forward(self, eigenvalues: Tensor, inputs: Tensor, state: Tensor | None) -> Tensor:
        return linear_recurrence(eigenvalues, inputs, state)


class Selective(nn.Module):
    def forward(self, *tensors: Tensor) -> Any:
        u, delta, A, B, C, D, z, start = tensors
        options = {"delta_softplus": True, "initial_state": start, "return_last_state": True}
        return selective_scan(u, delta, A, B, C, D, z, **options)


def recurrence_inputs(batch: int, length: int) -> tuple[Tensor, ...]:
    eigenvalues = torch.polar(torch.rand(4).sqrt(), 6 * torch.rand(4))
    inputs = torch.randn(batch, length, 4, dtype=torch.complex64)
    return eigenvalues, inputs, torch.randn(batch, 4, dtype=torch.complex64)


def selective_inputs(batch: int, length: int, kind: str = "in time") -> tuple[Tensor, ...]:
    dim, states = 6, 5
    of_states = {"in time": (batch, states, length), "grouped": (batch, 2, states, length)}
    B, C = torch.randn(2, *of_states.get(kind, (dim, states)))
    u, delta, z = torch.randn(3, batch, dim, length)
    return u, delta, -torch.rand(dim, states), B, C, torch.randn(dim), z, _start(batch)


def _start(batch: int) -> Tensor:
    return torch.randn(batch, 6, 5)


def assert_equal(found: Any, expected: Any) -> None:
    if isinstance(expected, tuple):
        for one, other in zip(found, expected, strict=True):
            assert_equal(one, other)
        return
    assert found.dtype == expected.dtype
    assert relative_error(found, expected) < 1e-5


@from_torch_2_7
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_layers_with_parameters_that_train_are_exported(kind: type[nn.Module], mode: Any):
    layer = kind(4, 8)
    with mode():
        exported = export(layer, (torch.randn(2, 50, 4),)).module()
        x = torch.randn(2, 50, 4)
        assert_equal(exported(x), layer(x))


@from_torch("2.13", "an open batch is not taken for one")
@pytest.mark.slow
@pytest.mark.parametrize("kind", LAYERS)
def test_strict_export(kind: type[nn.Module]):
    layer, dynamic = kind(4, 8), ({0: BATCH, 1: LENGTH},)
    exported = export(layer, (torch.randn(2, 50, 4),), dynamic_shapes=dynamic, strict=True).module()
    for shape in SHAPES:
        x = torch.randn(*shape, 4)
        assert_equal(exported(x), layer(x))


@from_torch("2.13", "an open batch is not taken for one")
@pytest.mark.slow
@pytest.mark.parametrize("kind", LAYERS)
def test_batch_and_length_stay_open_also_after_a_reduction(kind: type[nn.Module]):
    model = nn.Sequential(nn.Linear(3, 4), kind(4, 12), nn.Linear(4, 2))
    compress(model, state_dim=5)
    dynamic = ({0: BATCH, 1: LENGTH},)
    exported = export(model, (torch.randn(2, 50, 3),), dynamic_shapes=dynamic).module()
    for shape in SHAPES:
        x = torch.randn(*shape, 3)
        assert_equal(exported(x), model(x))


@from_torch_2_7
@pytest.mark.parametrize("layer", [LRU(4, 8, r_min=0.999, r_max=0.9999), S5(4, 8, dt_max=0.001)])
def test_slow_eigenvalues_keep_their_digits(layer: nn.Module):
    x = torch.randn(1, 4096, 4)
    exact = layer.double()(x.double())
    layer.float()
    exported = export(layer, (x,)).module()
    assert relative_error(exported(x).double(), exact) < 1e-5


@from_torch_2_7
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", LAYERS)
def test_other_dtypes(kind: type[nn.Module], dtype: torch.dtype):
    layer, x = kind(4, 8).to(dtype), torch.randn(2, 40, 4).to(dtype)
    exported = export(layer, (x,)).module()
    assert exported(x).dtype == dtype
    bound = 1e-12 if dtype == torch.float64 else 1e-2
    assert relative_error(exported(x).double(), layer(x).double()) < bound


@from_torch_2_7
@pytest.mark.parametrize("kind", LAYERS)
def test_under_autocast(kind: type[nn.Module]):
    layer, x = kind(4, 8), torch.randn(2, 40, 4)
    with torch.autocast("cpu", torch.bfloat16):
        exported = export(layer, (x,)).module()
    assert_equal(exported(x), layer(x))


@from_torch("2.13", "an open batch is not taken for one")
@pytest.mark.slow
def test_the_recurrence_is_exported():
    dynamic = (None, {0: BATCH, 1: LENGTH}, {0: BATCH})
    exported = export(Recurrence(), recurrence_inputs(2, 40), dynamic_shapes=dynamic).module()
    for shape in SHAPES:
        arguments = recurrence_inputs(*shape)
        assert_equal(exported(*arguments), Recurrence()(*arguments))


@from_torch("2.13", "an open batch is not taken for one")
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["in time", "grouped", "constant"])
def test_the_selective_scan_is_exported(kind: str):
    sequence: dict[int, Any] = {0: BATCH, 2: LENGTH}
    of_states = {"in time": sequence, "grouped": {0: BATCH, 3: LENGTH}}.get(kind)
    dynamic = (sequence, sequence, None, of_states, of_states, None, sequence, {0: BATCH})
    arguments = selective_inputs(3, 50, kind)
    exported = export(Selective(), (*arguments,), dynamic_shapes=(dynamic,)).module()
    for shape in [*SHAPES, (6, 40)]:
        arguments = selective_inputs(*shape, kind)
        assert_equal(exported(*arguments), Selective()(*arguments))


@from_torch_2_7
@pytest.mark.slow
@pytest.mark.parametrize("kind", LAYERS)
def test_onnx(kind: type[nn.Module], tmp_path: Path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    layer, dynamic = kind(4, 8), ({0: BATCH, 1: LENGTH},)
    x = torch.randn(2, 50, 4)
    program = torch.onnx.export(layer, (x,), dynamo=True, dynamic_shapes=dynamic, verbose=False)
    assert program is not None
    program.save(str(tmp_path / "layer.onnx"))
    session = runtime.InferenceSession(str(tmp_path / "layer.onnx"))
    for shape in SHAPES:
        x = torch.randn(*shape, 4)
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        assert_equal(torch.from_numpy(found), layer(x))


# -- tracing ---------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # the checks of shapes are not kept
@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated")
@pytest.mark.parametrize(
    ("module", "inputs"),
    [
        *((kind(4, 8), lambda *shape: (torch.randn(*shape, 4),)) for kind in LAYERS),
        (Recurrence(), recurrence_inputs),
        (Selective(), selective_inputs),
    ],
    ids=lambda thing: type(thing).__name__,
)
def test_traces_hold_for_other_shapes(module: nn.Module, inputs: Callable[..., Any]):
    traced = torch.jit.trace(module, inputs(2, 50))
    for shape in SHAPES:
        arguments = inputs(*shape)
        assert_equal(traced(*arguments), module(*arguments))


# -- torch.func ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LAYERS)
def test_function_transforms(kind: type[nn.Module]):
    layer = kind(3, 5).double()
    x = torch.randn(4, 2, 40, 3, dtype=torch.float64)
    torch.testing.assert_close(torch.func.vmap(layer)(x), layer(x.flatten(0, 1)).view_as(x))
    parameters = dict(layer.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(layer, parameters, (x,)).square().mean()

    found = torch.func.grad(loss)(parameters, x[0])
    expected = torch.autograd.grad(loss(parameters, x[0]), list(parameters.values()))
    torch.testing.assert_close(list(found.values()), list(expected))
    for each in torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x).values():
        assert len(each) == 4
    outputs, tangent = torch.func.jvp(layer, (x[0],), (x[1],))
    torch.testing.assert_close(outputs, layer(x[0]))
    torch.testing.assert_close(tangent, layer(x[1]))  # it is linear


def test_function_transforms_of_the_scans():
    eigenvalues, inputs, start = (t.to(torch.complex128) for t in recurrence_inputs(3, 40))
    mapped = torch.func.vmap(linear_recurrence, (None, 0, 0))(eigenvalues, inputs, start)
    torch.testing.assert_close(mapped, linear_recurrence(eigenvalues, inputs, start))
    arguments = selective_inputs(2, 40)
    found = torch.func.grad(lambda u: Selective()(u, *arguments[1:])[0].square().sum())(
        arguments[0]
    )
    u = arguments[0].requires_grad_()
    (expected,) = torch.autograd.grad(Selective()(*arguments)[0].square().sum(), u)
    assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("kind", LAYERS)
def test_an_empty_batch(kind: type[nn.Module]):
    layer = kind(4, 8)
    try:
        nn.functional.pad(torch.zeros(1, 0), (0, 0, 0, 1))
    except RuntimeError:
        pytest.skip("this version of torch can't pad what is empty")
    _, pull = torch.func.vjp(layer, torch.randn(0, 40, 4))
    assert pull(torch.randn(0, 40, 4))[0].shape == (0, 40, 4)


def test_second_derivatives_by_transforms():
    layer = LRU(2, 3, dtype=torch.float64)

    def first(x: Tensor) -> Tensor:
        gradient: Tensor = torch.func.grad(lambda x: layer(x).pow(3).sum())(x)
        return gradient

    x = torch.randn(1, 35, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(first, (x,))
    first(x).square().sum().backward()
    assert all(bool(p.grad.any()) for p in layer.parameters() if p.grad is not None)
    assert layer.nu_log.grad is not None


# -- numbers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("radius", [0.0, 1.0, 1.5])
def test_eigenvalues_at_zero_and_outside_the_circle(radius: float):
    """Powers that overflow where there are no states yet leave no NaN."""
    eigenvalues = torch.full((2,), radius, dtype=torch.complex64)
    inputs = torch.randn(2, 120, 2, dtype=torch.complex64)
    found = plain_linear_recurrence(eigenvalues, inputs, None)
    assert relative_error(found, linear_recurrence(eigenvalues, inputs, None)) < 1e-5
    power = (eigenvalues.real.double(), eigenvalues.imag.double())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_compressm.nn._plain.doublings", lambda count: 26)
        open_ended = plain_scan(power, (inputs.real.movedim(1, 0), inputs.imag.movedim(1, 0)))
    assert relative_error(torch.complex(*open_ended).movedim(0, 1), found) < 1e-5


@from_torch("2.13", "Dynamo takes every compiler for an export")
@pytest.mark.parametrize("kind", [LRU, S5])
def test_what_is_just_computed_takes_the_fast_form(
    kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch
):
    def never(*_: object) -> None:
        raise AssertionError("plain operations outside of an export")

    monkeypatch.setattr("lightning_compressm.nn._fused.plain_diagonal", never)
    layer, x = kind(4, 8), torch.randn(2, 40, 4)
    layer(x).sum().backward()
    torch.compile(layer, backend="eager")(x)
    with pytest.raises(AssertionError, match="outside of an export"):
        torch.func.vmap(layer)(x.unsqueeze(0))
