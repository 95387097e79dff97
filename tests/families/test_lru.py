"""The LRU family: which layers it takes for LRUs, what it reads, and what it writes."""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compressm import compress, find_ssm_layers
from lightning_compressm.control import balanced_truncation
from lightning_compressm.families import find_family
from lightning_compressm.families.lru import LRUFamily
from lightning_compressm.nn import LRU
from lightning_compressm.surgery.apply import apply_plan
from lightning_compressm.surgery.optimizer import carry_gradients
from tests.families.layers import PortedLRU

FAMILY = LRUFamily()


def test_a_port_with_complex_matrices_is_recognised():
    port = PortedLRU(3, 5, 16)
    layer = find_ssm_layers(port)[""]
    assert (layer.family.name, layer.state_dim) == ("LRU", 16)


def test_a_port_is_reduced_with_its_attributes_and_state():
    port = PortedLRU(3, 5, 16)
    x = torch.randn(2, 20, 3)
    before = port(x)
    compress(port, state_dim=15, sample=x)
    assert (port.in_features, port.out_features, port.state_features) == (3, 5, 15)
    assert port.state.shape == (15,)
    assert port.state.dtype == torch.complex64
    assert port.B.dtype == torch.complex64
    assert (port(x) - before).norm() < 0.1 * before.norm()


def test_a_batched_recurrent_state_keeps_its_batch():
    port = PortedLRU(3, 5, 16)
    port.state = torch.ones(7, 16, dtype=torch.complex64)
    compress(port, state_dim=4)
    assert torch.equal(port.state, torch.zeros(7, 4, dtype=torch.complex64))


def _drop(name: str) -> Any:
    return lambda layer: delattr(layer, name)


def _put(name: str, *shape: int) -> Any:
    return lambda layer: setattr(layer, name, nn.Parameter(torch.randn(shape)))


LOOK_ALIKES = {
    "no gamma": _drop("gamma_log"),
    "no C": _drop("C"),
    "C for other states": _put("C", 5, 12),
    "B transposed": _put("B", 3, 16),
    "B without inputs": _put("B", 16),
    "heads": _put("nu_log", 4, 4),
    "gamma of its own size": _put("gamma_log", 1),
    "theta is None": lambda layer: layer.register_parameter("theta_log", None),
}


@pytest.mark.parametrize("change", LOOK_ALIKES.values(), ids=LOOK_ALIKES)
def test_look_alikes_are_left_alone(change: Any):
    port = PortedLRU(3, 5, 16)
    change(port)
    assert find_family(port) is None


def test_names_that_are_no_parameters_do_not_match():
    layer = nn.Module()
    for name, value in PortedLRU(3, 5, 16).named_parameters():
        layer.register_buffer(name, value.detach())
    assert find_family(layer) is None


@pytest.mark.parametrize("layer", [LRU(3, 8), PortedLRU(3, 5, 8)], ids=["split", "complex"])
def test_the_system_is_what_the_layer_computes(layer: nn.Module):
    system = FAMILY.system(layer)
    assert system.real_output
    assert system.eigenvalues.dtype == torch.complex128
    impulse = torch.eye(3).unsqueeze(1).repeat(1, 10, 1)
    impulse[:, 1:] = 0
    with torch.no_grad():
        response = layer(impulse).permute(1, 2, 0)
    # The direct term D is no part of the system; it acts at the first step alone.
    torch.testing.assert_close(
        response[1:].double(), system.impulse_response(10)[1:], rtol=1e-4, atol=1e-5
    )


def test_reading_a_system_follows_the_mode_of_gradients():
    system = FAMILY.system(LRU(3, 8))
    assert all(t.requires_grad for t in (system.eigenvalues, system.B, system.C))
    with torch.no_grad():
        system = FAMILY.system(LRU(3, 8))
    assert not any(t.requires_grad for t in (system.eigenvalues, system.B, system.C))


@pytest.mark.parametrize("order", [1, 4, 8])
def test_written_parameters_are_finite_and_normalised(order: int):
    layer = LRU(3, 8)
    compress(layer, state_dim=order)
    for name, parameter in layer.named_parameters():
        assert torch.isfinite(parameter).all(), name
    radius = layer.eigenvalues.abs()
    torch.testing.assert_close(
        layer.gamma_log.double().exp(), (1 - radius.square()).sqrt(), rtol=1e-3, atol=1e-6
    )


def test_positive_real_poles_keep_a_finite_phase():
    """log(0) = -inf would freeze the phase, and make NaN with weight decay."""
    layer = LRU(2, 6).double()
    with torch.no_grad():
        layer.theta_log.fill_(math.log(1e-12))
        layer.B_im.zero_()
        layer.C_im.zero_()
    x = torch.randn(2, 30, 2, dtype=torch.float64)
    before = layer(x)
    compress(layer, state_dim=5, horizon=None)
    assert torch.isfinite(layer.theta_log).all()
    assert (layer(x) - before).norm() < 0.2 * before.norm()
    optimizer = torch.optim.AdamW(layer.parameters(), weight_decay=0.1)
    layer(x).square().mean().backward()
    optimizer.step()
    assert all(torch.isfinite(p).all() for p in layer.parameters())


def test_phases_beyond_two_pi_are_the_same_layer():
    layer = LRU(2, 6).double()
    twin = deepcopy(layer)
    with torch.no_grad():
        twin.theta_log.copy_((twin.theta_log.exp() + 2 * math.pi).log())
    x = torch.randn(1, 40, 2, dtype=torch.float64)
    for one in (layer, twin):
        compress(one, state_dim=3, sample=x)
    torch.testing.assert_close(twin(x), layer(x), rtol=1e-8, atol=1e-8)


# -- gradients in the new basis ------------------------------------------------------------------


def _smooth_example(make: Any, order: int, balance: str) -> tuple[dict[str, Tensor], ...]:
    """Gradients of a layer carried to its reduced form, and the reduced form's own."""
    layer = make()
    layer._apply(lambda t: t.to(torch.complex128 if t.is_complex() else torch.float64))
    with torch.no_grad():  # as after some training: gamma is no longer sqrt(1 - |lambda|^2)
        layer.gamma_log.add_(0.5 * torch.randn_like(layer.gamma_log))
    x = torch.randn(8, 60, 3, dtype=torch.float64).cumsum(1) / 10
    target = torch.sin(x.sum(-1, keepdim=True))
    (layer(x) - target).square().mean().backward()
    reduction = balanced_truncation(FAMILY.system(layer), order, balance=balance)
    applied = apply_plan(layer, FAMILY.reduction_plan(layer, reduction))
    carry_gradients(applied)
    carried = {name: p.grad.clone() for name, p in layer.named_parameters()}
    layer.zero_grad()
    (layer(x) - target).square().mean().backward()
    return carried, {name: p.grad for name, p in layer.named_parameters()}


def _angle(carried: dict[str, Tensor], own: dict[str, Tensor], names: list[str]) -> Tensor:
    a, b = (
        torch.cat([torch.view_as_real(g[n] + 0j).flatten() for n in names]) for g in (carried, own)
    )
    return nn.functional.cosine_similarity(a, b, dim=0)


KINDS = {
    "split": (lambda: LRU(3, 16), [["B_re", "B_im"], ["C_re", "C_im"]]),
    "complex": (lambda: PortedLRU(3, 1, 16), [["B"], ["C"]]),
}


@pytest.mark.parametrize("balance", ["real", "folded", "complex"])
@pytest.mark.parametrize(("make", "pairs"), KINDS.values(), ids=KINDS)
def test_at_full_order_carried_gradients_are_the_layers_own(
    make: Any, pairs: list[list[str]], balance: str
):
    carried, own = _smooth_example(make, 16, balance)
    for names in [*pairs, ["gamma_log"]]:
        assert _angle(carried, own, names) > 0.999999, names
        for name in names:
            torch.testing.assert_close(carried[name], own[name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("balance", ["real", "folded", "complex"])
@pytest.mark.parametrize(("make", "pairs"), KINDS.values(), ids=KINDS)
def test_at_a_quarter_carried_gradients_point_the_same_way(
    make: Any, pairs: list[list[str]], balance: str
):
    carried, own = _smooth_example(make, 4, balance)
    for names in pairs:
        assert _angle(carried, own, names) > 0.8, names


@pytest.mark.parametrize("balance", ["real", "folded"])
def test_gradients_follow_conjugated_states(balance: str):
    """Poles in the lower half-plane change sides: the conjugate part of the maps is at work."""

    def make() -> LRU:
        layer = LRU(3, 16)
        with torch.no_grad():
            layer.theta_log.copy_(torch.linspace(0.1, 6.2, 16).log())
        return layer

    carried, own = _smooth_example(make, 12, balance)
    for names in (["B_re", "B_im"], ["C_re", "C_im"], ["gamma_log"]):
        assert _angle(carried, own, names) > 0.8, names


def test_gradients_of_eigenvalues_start_at_zero():
    carried, _ = _smooth_example(lambda: LRU(3, 16), 4, "real")
    assert not carried["nu_log"].any()
    assert not carried["theta_log"].any()
    assert not carried["D"].isnan().any()
