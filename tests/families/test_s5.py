"""The S5 family: our layer, and that of the s5-pytorch package where it is installed."""

from __future__ import annotations

import warnings
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compressm import compress, find_ssm_layers, hankel_spectra, load_compressed
from lightning_compressm.control import balanced_truncation
from lightning_compressm.errors import UnsupportedLayerError
from lightning_compressm.families import find_family
from lightning_compressm.families.s5 import S5Family
from lightning_compressm.nn import S5
from lightning_compressm.surgery.apply import apply_plan
from lightning_compressm.surgery.optimizer import carry_gradients
from tests.families.ports import PairsS5

FAMILY = S5Family()
METHODS = ["zoh", "bilinear"]


@pytest.fixture
def s5() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it uses torch.jit.script
        return pytest.importorskip("s5.s5_model")


def _trained(method: str = "zoh", states: int = 8, width: int = 3) -> S5:
    """A double precision layer whose parameters are no longer those of an initialisation."""
    torch.manual_seed(0)
    layer = S5(width, states, dt_min=0.05, dt_max=0.5, discretization=method, dtype=torch.float64)
    with torch.no_grad():
        layer.log_Lambda_re.add_(torch.randn_like(layer.log_Lambda_re))
        layer.Lambda_im.mul_(1 + 0.3 * torch.randn_like(layer.Lambda_im))
    return layer


def _reduced(layer: Any, order: int, balance: str = "real") -> tuple[Any, Any]:
    reduction = balanced_truncation(FAMILY.system(layer), order, balance=balance)
    twin = deepcopy(layer)
    apply_plan(twin, FAMILY.reduction_plan(twin, reduction))
    return twin, reduction


# -- our own layer -------------------------------------------------------------------------------


def _response(layer: nn.Module, width: int, length: int, dtype: torch.dtype) -> Tensor:
    """Impulse response without the direct term, (length - 1, outputs, inputs)."""
    impulse = torch.zeros(width, length, width, dtype=dtype)
    impulse[:, 0] = torch.eye(width, dtype=dtype)
    with torch.no_grad():
        return layer(impulse).permute(1, 2, 0)[1:].double()


@pytest.mark.parametrize("method", METHODS)
def test_the_system_is_what_the_layer_computes(method: str):
    layer = _trained(method)
    system = FAMILY.system(layer)
    expected = system.impulse_response(30)[1:]
    torch.testing.assert_close(
        _response(layer, 3, 30, torch.float64), expected, rtol=1e-10, atol=1e-12
    )
    assert system.eigenvalues.requires_grad
    assert system.C.requires_grad


@pytest.mark.parametrize("balance", ["real", "folded", "complex"])
@pytest.mark.parametrize("method", METHODS)
def test_all_states_kept_is_the_same_layer(method: str, balance: str):
    layer = _trained(method)
    assert (layer.log_step.exp() * layer.Lambda_im).max() > torch.pi
    twin, _ = _reduced(layer, 8, balance)
    x = torch.randn(2, 50, 3, dtype=torch.float64)
    torch.testing.assert_close(twin(x), layer(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("order", [1, 4, 7])
@pytest.mark.parametrize("method", METHODS)
def test_written_layers_compute_the_reduced_system(method: str, order: int):
    layer = _trained(method)
    twin, reduction = _reduced(layer, order)
    expected = reduction.system.impulse_response(30)[1:]
    actual = _response(twin, 3, 30, torch.float64)
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-10)
    mean = layer.log_step.mean().detach().expand(order)
    torch.testing.assert_close(twin.log_step.detach(), mean)


def test_spectrum():
    assert hankel_spectra(_trained())[""].shape == (8,)


@pytest.mark.parametrize("balance", ["real", "folded", "complex"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("order", "alignment"), [(16, 0.999999), (10, 0.8)])
def test_carried_gradients(order: int, alignment: float, method: str, balance: str):
    """Gradients of B and C in the new basis are those of the reduced layer."""
    layer = _trained(method, states=16)
    x = torch.randn(8, 60, 3, dtype=torch.float64).cumsum(1) / 10
    target = torch.sin(x.sum(-1, keepdim=True))
    (layer(x) - target).square().mean().backward()
    reduction = balanced_truncation(FAMILY.system(layer), order, balance=balance)
    applied = apply_plan(layer, FAMILY.reduction_plan(layer, reduction))
    carry_gradients(applied)
    carried = {name: p.grad.clone() for name, p in layer.named_parameters()}
    layer.zero_grad()
    (layer(x) - target).square().mean().backward()
    for matrix in "BC":
        names = (f"{matrix}_re", f"{matrix}_im")
        own = torch.cat([layer.get_parameter(name).grad.flatten() for name in names])
        moved = torch.cat([carried[name].flatten() for name in names])
        assert nn.functional.cosine_similarity(moved, own, dim=0) > alignment
        if order == 16:
            torch.testing.assert_close(moved, own, rtol=1e-6, atol=1e-9)
    for name in ("log_Lambda_re", "Lambda_im", "log_step"):
        assert not carried[name].any()


LOOK_ALIKES = {
    "no step": lambda layer: delattr(layer, "log_step"),
    "one step": lambda layer: setattr(layer, "log_step", nn.Parameter(torch.zeros(1))),
    "one B": lambda layer: delattr(layer, "B_im"),
    "B transposed": lambda layer: setattr(layer, "B_re", nn.Parameter(torch.zeros(3, 8))),
    "C transposed": lambda layer: setattr(layer, "C_im", nn.Parameter(torch.zeros(8, 3))),
    "other frequencies": lambda layer: setattr(layer, "Lambda_im", nn.Parameter(torch.zeros(4))),
}


@pytest.mark.parametrize("change", LOOK_ALIKES.values(), ids=LOOK_ALIKES)
def test_look_alikes_are_left_alone(change: Any):
    layer = S5(3, 8)
    change(layer)
    assert find_family(layer) is None


# -- s5-pytorch ----------------------------------------------------------------------------------


def _other(s5: Any, method: str = "zoh", **arguments: Any) -> Any:
    torch.manual_seed(0)
    layer = s5.S5(4, 8, dt_min=0.05, dt_max=0.5, **arguments)
    layer.seq.discretize = getattr(s5, f"discretize_{method}")
    return layer


def test_layers_of_the_package_are_recognised(s5: Any):
    block = s5.S5Block(4, 8, bidir=True)
    layer = find_ssm_layers(block)["s5.seq"]
    assert (layer.family.name, layer.state_dim) == ("S5", 8)


@pytest.mark.parametrize("arguments", [{}, {"block_count": 2}, {"bcInit": "complex_normal"}])
@pytest.mark.parametrize("method", METHODS)
def test_the_system_is_what_the_package_computes(s5: Any, method: str, arguments: dict[str, Any]):
    layer = _other(s5, method, **arguments)
    expected = FAMILY.system(layer.seq).impulse_response(20)[1:]
    actual = _response(layer, 4, 20, torch.float32)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("balance", ["real", "folded", "complex"])
@pytest.mark.parametrize("bidir", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_all_states_kept_is_the_same_layer_of_the_package(
    s5: Any, method: str, bidir: bool, balance: str
):
    layer = _other(s5, method, bidir=bidir)
    twin = deepcopy(layer)
    twin.seq, _ = _reduced(layer.seq, 8, balance)
    assert twin.seq.log_step.unique().numel() == 1
    x = torch.randn(2, 30, 4)
    error = (twin(x) - layer(x)).norm() / layer(x).norm()
    assert error < 1e-4
    ours, theirs = FAMILY.system(twin.seq), FAMILY.system(layer.seq)
    torch.testing.assert_close(
        ours.impulse_response(30), theirs.impulse_response(30), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("bidir", [False, True])
def test_the_written_parameters_are_exact_in_double_precision(s5: Any, bidir: bool):
    """The package itself computes in single precision, so the systems are compared."""
    layer = _other(s5, bidir=bidir).seq
    for name, old in list(layer.named_parameters()):
        wide = torch.complex128 if old.is_complex() else torch.float64
        setattr(layer, name, nn.Parameter(old.detach().to(wide)))
    system = FAMILY.system(layer)
    for order in (3, 8):
        reduction = balanced_truncation(system, order)
        apply_plan(twin := deepcopy(layer), FAMILY.reduction_plan(layer, reduction))
        written = FAMILY.system(twin).impulse_response(40)
        expected = reduction.system.impulse_response(40)
        torch.testing.assert_close(written, expected, rtol=1e-10, atol=1e-10)
        if order == 8:
            torch.testing.assert_close(written, system.impulse_response(40), rtol=0, atol=1e-10)


@pytest.mark.parametrize("bidir", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_the_bound_holds(s5: Any, method: str, bidir: bool):
    layer = _other(s5, method, bidir=bidir)
    for order in (2, 4, 6):
        twin = deepcopy(layer)
        event = compress(twin, state_dim=order, horizon=None).events[0]
        assert event.error_bound is not None
        for _ in range(4):
            x = torch.randn(1, 60, 4)
            with torch.no_grad():
                error = float((twin(x) - layer(x)).norm() / x.norm())
            assert 1e-4 * event.error_bound < error <= event.error_bound + 1e-4


def test_both_directions_add_up_under_the_bound(s5: Any):
    """One direction's bound alone is exceeded where the errors of both agree."""
    layer = _other(s5, bidir=True)
    with torch.no_grad():
        layer.seq.C[:, 8:] = layer.seq.C[:, :8]
    _, reduction = _reduced(layer.seq, 2)
    one_way = deepcopy(layer.seq)
    one_way.C = nn.Parameter(layer.seq.C[:, :8].detach().clone())
    _, alone = _reduced(one_way, 2)
    assert float(reduction.bound) >= 2 * float(alone.bound) - 1e-9


@pytest.mark.parametrize("bidir", [False, True])
def test_layers_of_the_package_are_reduced_trained_and_loaded(s5: Any, bidir: bool):
    model, x = _other(s5, bidir=bidir), torch.randn(2, 30, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(6):
        if step == 3:
            report = compress(model, state_dim=5, sample=x, optimizers=[optimizer])
            assert (report.events[0].layer, report.events[0].horizon) == ("seq", 30)
        optimizer.zero_grad()
        (model(x) - x.roll(1, 1)).square().mean().backward()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.step()
        for name, parameter in model.named_parameters():
            assert torch.isfinite(torch.view_as_real(parameter + 0j)).all()
            assert not torch.equal(parameter, before[name])
    dtypes = {name: (tuple(p.shape), p.dtype) for name, p in model.seq.named_parameters()}
    assert dtypes == {
        "Lambda": ((5,), torch.complex64),
        "log_step": ((5,), torch.float32),
        "B": ((5, 4, 2), torch.float32),
        "C": ((4, 10 if bidir else 5), torch.complex64),
        "D": ((4,), torch.float32),
    }
    fresh = _other(s5, bidir=bidir)
    load_compressed(fresh, model.state_dict())
    assert torch.equal(fresh(x), model(x))
    full = _other(s5, bidir=bidir)
    load_compressed(fresh, full.state_dict())
    assert torch.equal(fresh(x), full(x))


@pytest.mark.parametrize("bidir", [False, True])
def test_gradients_of_the_packages_read_out_are_carried(s5: Any, bidir: bool):
    model, x = _other(s5, bidir=bidir), torch.randn(8, 30, 4).cumsum(1) / 5
    (model(x) - x.sin()).square().mean().backward()
    reduction = balanced_truncation(FAMILY.system(model.seq), 8)
    carry_gradients(apply_plan(model.seq, FAMILY.reduction_plan(model.seq, reduction)))
    carried = model.seq.C.grad.clone()
    model.zero_grad()
    (model(x) - x.sin()).square().mean().backward()
    torch.testing.assert_close(carried, model.seq.C.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"liquid": True}, "liquid=False, got liquid=True"),
        ({"degree": 2}, "degree=1, got degree=2"),
    ],
)
def test_what_is_not_linear_is_refused(s5: Any, arguments: dict[str, Any], message: str):
    layer = _other(s5, **arguments)
    with pytest.raises(UnsupportedLayerError, match=message):
        compress(layer, state_dim=4)
    assert layer.seq.Lambda.shape == (8,)


def test_an_unknown_discretization_is_refused(s5: Any):
    layer = _other(s5)
    layer.seq.discretize = lambda *args: args
    with pytest.raises(UnsupportedLayerError, match="discretized by 'zoh' or 'bilinear', got"):
        compress(layer, state_dim=4)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("Lambda", torch.zeros(8)),
        ("Lambda", torch.zeros(5, dtype=torch.complex64)),
        ("B", torch.zeros(8, 4)),
        ("C", torch.zeros(4, 8)),
        ("C", torch.zeros(4, 12, dtype=torch.complex64)),
    ],
)
def test_look_alikes_of_the_package_are_left_alone(s5: Any, name: str, value: Tensor):
    layer = _other(s5).seq
    setattr(layer, name, nn.Parameter(value))
    assert find_family(layer) is None


# -- forks of it that keep pairs of real numbers -------------------------------------------------


def _pairs(method: str, bidir: bool) -> PairsS5:
    torch.manual_seed(0)
    return PairsS5(3, 8, bidir=bidir, discretization=method).double()


both_methods = pytest.mark.parametrize("method", METHODS)
both_directions = pytest.mark.parametrize("bidir", [False, True])


@both_methods
def test_the_system_is_what_a_layer_of_pairs_computes(method: str):
    layer = _pairs(method, bidir=False)
    assert find_ssm_layers(layer)[""].state_dim == 8
    wanted = FAMILY.system(layer).impulse_response(30)[1:].detach()
    torch.testing.assert_close(_response(layer, 3, 30, torch.float64), wanted)


@both_directions
@both_methods
def test_layers_of_pairs_keep_the_bound(method: str, bidir: bool):
    layer, x = _pairs(method, bidir), torch.randn(1, 80, 3, dtype=torch.float64)
    same, _ = _reduced(layer, 8)
    torch.testing.assert_close(same(x), layer(x), rtol=1e-9, atol=1e-10)
    for order in (2, 4, 6):
        twin, reduction = _reduced(layer, order)
        error = float((twin(x) - layer(x)).detach().norm() / x.norm())
        assert 1e-4 * float(reduction.bound) < error <= float(reduction.bound)


@both_directions
def test_layers_of_pairs_are_reduced_trained_and_loaded(bidir: bool):
    model, x = _pairs("bilinear", bidir).float(), torch.randn(2, 30, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(4):
        if step == 2:
            (event,) = compress(model, state_dim=5, sample=x, optimizers=[optimizer]).events
            assert (event.horizon, event.new_state_dim) == (30, 5)
        optimizer.zero_grad()
        (model(x) - x.roll(1, 1)).square().mean().backward()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.step()
        assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == {
        "Lambda": (5, 2),
        "log_step": (5,),
        "B": (5, 3, 2),
        "C": (3, 10 if bidir else 5, 2),
        "D": (3,),
    }
    fresh = PairsS5(3, 8, bidir=bidir)
    load_compressed(fresh, model.state_dict())
    assert torch.equal(fresh(x), model(x))


def test_what_is_not_linear_is_refused_in_pairs_too():
    layer = _pairs("zoh", bidir=False)
    layer.liquid = True
    with pytest.raises(UnsupportedLayerError, match="liquid=False, got liquid=True"):
        compress(layer, state_dim=4)


@pytest.mark.parametrize(
    ("name", "shape"), [("Lambda", (8, 3)), ("Lambda", (7, 2)), ("C", (3, 12, 2)), ("B", (8, 3))]
)
def test_look_alikes_of_pairs_are_left_alone(name: str, shape: tuple[int, ...]):
    layer = _pairs("zoh", bidir=False)
    setattr(layer, name, nn.Parameter(torch.zeros(shape)))
    assert find_family(layer) is None
