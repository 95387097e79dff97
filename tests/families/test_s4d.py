"""The S4D family: banks of channels, kernels that take a length, continuous-time parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compressm import compress, find_ssm_layers, hankel_spectra, load_compressed
from lightning_compressm.control import balanced_truncation
from lightning_compressm.errors import UnsupportedLayerError
from lightning_compressm.families import find_family
from lightning_compressm.families.s4d import S4DFamily
from lightning_compressm.nn import S4D
from lightning_compressm.surgery.apply import apply_plan
from tests.families.ports import PortedS4D, S4DKernel

FAMILY = S4DFamily()
METHODS = ["zoh", "bilinear"]


def _trained(method: str = "zoh", width: int = 3, states: int = 8, seed: int = 0) -> S4D:
    """A double precision layer whose parameters are no longer those of an initialisation."""
    torch.manual_seed(seed)
    layer = S4D(width, states, dt_min=0.05, dt_max=0.5, discretization=method, dtype=torch.float64)
    with torch.no_grad():
        layer.log_A_real.add_(torch.randn_like(layer.log_A_real))
        layer.A_imag.mul_(1 + 0.3 * torch.randn_like(layer.A_imag))
    return layer


def test_a_ported_kernel_is_recognised():
    layer = find_ssm_layers(PortedS4D(3, 8))["kernel"]
    assert (layer.family.name, layer.state_dim) == ("S4D", 8)


@pytest.mark.parametrize("method", METHODS)
def test_the_system_is_what_the_layer_computes(method: str):
    layer = _trained(method)
    system = FAMILY.system(layer)
    assert system.batch_shape == (3,)
    assert (system.n_inputs, system.n_outputs, system.real_output) == (1, 1, True)
    response = system.impulse_response(40)[..., 0, 0]
    torch.testing.assert_close(response, layer.kernel(40).detach(), rtol=1e-10, atol=1e-12)
    assert system.eigenvalues.requires_grad
    assert system.C.requires_grad


def test_the_system_of_a_port_is_its_kernel():
    kernel = S4DKernel(3, 8).double()
    response = FAMILY.system(kernel).impulse_response(40)[..., 0, 0]
    torch.testing.assert_close(response, kernel(40).detach(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("balance", ["real", "folded", "complex"])
@pytest.mark.parametrize("method", METHODS)
def test_all_states_kept_is_the_same_layer(method: str, balance: str):
    """Also for phases beyond pi a step: they come back within."""
    layer = _trained(method)
    assert (layer.log_dt.exp().unsqueeze(-1) * layer.A_imag.abs()).max() > torch.pi
    before = layer.kernel(60).detach()
    reduction = balanced_truncation(FAMILY.system(layer), 8, balance=balance)
    apply_plan(layer, FAMILY.reduction_plan(layer, reduction))
    torch.testing.assert_close(layer.kernel(60).detach(), before, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("order", [1, 3, 7])
@pytest.mark.parametrize("method", METHODS)
def test_written_layers_compute_the_reduced_system(method: str, order: int):
    layer = _trained(method)
    steps = layer.log_dt.detach().clone()
    reduction = balanced_truncation(FAMILY.system(layer), order)
    apply_plan(layer, FAMILY.reduction_plan(layer, reduction))
    expected = reduction.system.impulse_response(60)[..., 0, 0]
    torch.testing.assert_close(layer.kernel(60).detach(), expected, rtol=1e-8, atol=1e-10)
    assert torch.equal(layer.log_dt, steps)
    assert layer.d_state == order


@pytest.mark.parametrize("method", METHODS)
def test_each_channel_keeps_its_own_bound(method: str):
    """The error in L2 of channel h is below 2 sum(discarded sigma of h) times its input."""
    original = _trained(method)
    for order in (2, 4, 6):
        reduction = balanced_truncation(FAMILY.system(original), order)
        layer = _trained(method)
        apply_plan(layer, FAMILY.reduction_plan(layer, reduction))
        inputs = torch.randn(4, 200, 3, dtype=torch.float64)
        error = (layer(inputs) - original(inputs)).detach().norm(dim=1) / inputs.norm(dim=1)
        assert reduction.bound.shape == (3,)
        assert (error <= reduction.bound * (1 + 1e-9) + 1e-12).all()
        assert (error.amax(0) > 1e-4 * reduction.bound).all(), "the bound says something"


def test_spectra_of_a_bank():
    layer = _trained()
    (spectrum,) = hankel_spectra(layer).values()
    assert spectrum.shape == (3, 8)
    assert (spectrum.diff(dim=-1) <= 0).all()
    alone = S4D(1, 8, dt_min=0.05, dt_max=0.5, dtype=torch.float64)
    alone.load_state_dict({name: tensor[1:2] for name, tensor in layer.state_dict().items()})
    torch.testing.assert_close(hankel_spectra(alone)[""][0], spectrum[1])


def test_one_dimension_is_chosen_on_the_pooled_energy():
    """A channel with next to no energy does not decide how many states the others need."""
    layer = _trained(width=4)
    with torch.no_grad():
        layer.C[3] *= 1e-9
    spectrum = hankel_spectra(layer)[""]
    event = compress(layer, tolerance=0.1, horizon=None).events[0]
    assert event.action == "reduce"
    assert layer.A_imag.shape == (4, event.new_state_dim)
    assert event.energy_kept >= 0.9 - 1e-9
    pooled = spectrum.sum(0)
    kept = float(pooled[: event.new_state_dim].sum() / pooled.sum())
    assert event.energy_kept == pytest.approx(kept, abs=0.05)
    assert float(pooled[: event.new_state_dim - 1].sum() / pooled.sum()) < 0.9


def test_a_silent_channel_stays_silent():
    layer = _trained()
    with torch.no_grad():
        layer.C[1].zero_()
    compress(layer, state_dim=3)
    assert not layer.C[1].any()
    assert all(torch.isfinite(p).all() for p in layer.parameters())
    layer(torch.randn(1, 9, 3, dtype=torch.float64)).square().sum().backward()
    assert layer.C.grad[1].any(), "it can learn"


def test_ported_layers_are_reduced_on_their_own_length():
    model, inputs = PortedS4D(3, 8), torch.randn(2, 3, 50)
    before = model(inputs)
    report = compress(model, state_dim=7, sample=inputs)
    assert (report.events[0].layer, report.events[0].horizon) == ("kernel", 50)
    assert model.kernel.n == 7
    assert (model(inputs) - before).norm() < 0.2 * before.norm()
    for name in ("log_dt", "log_A_real", "A_imag"):
        assert model.kernel.get_parameter(name)._optim == {"weight_decay": 0.0, "lr": 1e-3}


def test_kernels_with_fixed_poles():
    model, inputs = PortedS4D(3, 8, learned=False), torch.randn(2, 3, 50)
    compress(model, state_dim=4)
    assert {name: b.shape for name, b in model.kernel.named_buffers()} == {
        "log_dt": (3,),
        "log_A_real": (3, 4),
        "A_imag": (3, 4),
    }
    fresh = PortedS4D(3, 8, learned=False)
    load_compressed(fresh, model.state_dict())
    assert torch.equal(fresh(inputs), model(inputs))


@pytest.mark.parametrize(
    ("args", "kwargs", "length"),
    [
        ((12,), {}, 12),
        ((), {"L": 12}, 12),
        ((torch.zeros(2, 12, 3),), {}, 12),
        ((True,), {}, None),
        ((), {}, None),
    ],
)
def test_sequence_length(args: tuple[Any, ...], kwargs: dict[str, Any], length: int | None):
    assert FAMILY.sequence_length(args, kwargs) == length


@pytest.mark.parametrize(("name", "old", "new"), [("N", 8, 3), ("n", 16, 6), ("d_state", 5, 5)])
def test_sizes_follow(name: str, old: int, new: int):
    kernel = S4DKernel(3, 8)
    setattr(kernel, name, old)
    compress(kernel, state_dim=3)
    assert getattr(kernel, name) == new


def test_training_goes_on_with_the_optimizer():
    model = PortedS4D(3, 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    inputs = torch.randn(4, 3, 30)
    losses = []
    for step in range(30):
        if step == 5:
            compress(model, state_dim=4, sample=inputs, optimizers=[optimizer])
        optimizer.zero_grad()
        loss = (model(inputs) - inputs.roll(1, -1)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[5]


def test_an_unknown_discretization_is_refused():
    layer = S4D(3, 8)
    layer.discretization = "euler"
    with pytest.raises(UnsupportedLayerError, match="expected a `discretization` of 'zoh' or"):
        compress(layer, state_dim=4)
    assert layer.A_imag.shape == (3, 8)


def _put(name: str, value: Tensor) -> Any:
    return lambda kernel: setattr(kernel, name, nn.Parameter(value))


LOOK_ALIKES = {
    "no step": lambda kernel: delattr(kernel, "log_dt"),
    "a step for each state": _put("log_dt", torch.zeros(3, 8)),
    "complex C": _put("C", torch.zeros(3, 8, dtype=torch.complex64)),
    "C of several heads": _put("C", torch.zeros(2, 3, 8, 2)),
    "shared A": _put("log_A_real", torch.zeros(8)),
    "other frequencies": _put("A_imag", torch.zeros(3, 4)),
}


@pytest.mark.parametrize("change", LOOK_ALIKES.values(), ids=LOOK_ALIKES)
def test_look_alikes_are_left_alone(change: Any):
    kernel = S4DKernel(3, 8)
    change(kernel)
    assert find_family(kernel) is None
