"""Kernels of the state-spaces/s4 code: diagonal ones with a B, and diagonal plus low rank."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lightning_compressm import (
    CompreSSMCallback,
    HankelRegularizer,
    compress,
    find_ssm_layers,
    hankel_spectra,
    load_compressed,
)
from lightning_compressm.control import balanced_truncation, hankel_singular_values
from lightning_compressm.errors import (
    IllConditionedError,
    NonFiniteError,
    UnstableSystemError,
    UnsupportedLayerError,
)
from lightning_compressm.families import find_family
from lightning_compressm.families._dense import diagonal_form
from lightning_compressm.families._low_rank import low_rank_form
from lightning_compressm.families.s4 import S4Family
from lightning_compressm.families.s4_diagonal import S4DiagonalFamily
from lightning_compressm.surgery.apply import apply_plan
from tests.callbacks.helpers import BATCHES, StatefulLoader, loader, same, trainer
from tests.families.s4_ports import S4Kernel, S4Layer

KERNELS: dict[str, dict[str, Any]] = {
    "diagonal": {},
    "diagonal, bilinear": {"disc": "bilinear"},
    "diagonal, three channels": {"channels": 3},
    "diagonal, softplus": {"real_transform": "softplus", "dt_transform": "softplus"},
    "diagonal, plain and sinh": {"real_transform": "none", "dt_fast": True, "dt_transform": "none"},
    "diagonal, a step for each state": {"dt_tie": False},
    "diagonal, older": {"release": 3},
    "diagonal, older, with P's names": {"release": 2},
    "low rank": {"rank": 1},
    "low rank of two": {"rank": 2, "channels": 3},
    "low rank, softplus": {"rank": 1, "real_transform": "softplus", "dt_transform": "softplus"},
    "low rank, older": {"rank": 1, "release": 2},
}
TWO = {"diagonal": {}, "low rank": {"rank": 1}}
kernels = pytest.mark.parametrize("arguments", KERNELS.values(), ids=KERNELS)
both = pytest.mark.parametrize("arguments", TWO.values(), ids=TWO)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _kernel(arguments: dict[str, Any], states: int = 6) -> S4Kernel:
    return S4Kernel(4, states, **arguments).double()


def _family(module: nn.Module) -> S4Family | S4DiagonalFamily:
    family = find_family(module)
    assert isinstance(family, S4Family | S4DiagonalFamily)
    return family


def _reduced(kernel: S4Kernel, order: int, **how: Any) -> tuple[S4Kernel, Any]:
    family, twin = _family(kernel), deepcopy(kernel)
    reduction = balanced_truncation(family.system(kernel), order, **how)
    apply_plan(twin, family.reduction_plan(twin, reduction))
    return twin, reduction


def _response(kernel: S4Kernel, length: int) -> Tensor:
    return kernel(L=length)[0].detach()


def _wanted(system: Any, kernel: S4Kernel, length: int) -> Tensor:
    scale = 2**0.5 if kernel.channels % 2 == 0 else 1
    return system.impulse_response(length)[..., 0].permute(2, 0, 1).detach() / scale


# -- the ports themselves ------------------------------------------------------------------------


@kernels
def test_the_kernels_here_are_what_their_recurrence_gives(arguments: dict[str, Any]):
    kernel, inputs = _kernel(arguments), torch.zeros(1, 4, 20, dtype=torch.float64)
    inputs[..., 0] = 1
    before = kernel.recurrence(inputs)[0]
    for length in (5, 20):  # prepared, and then doubled
        torch.testing.assert_close(_response(kernel, length), before[..., :length])
    torch.testing.assert_close(kernel.recurrence(inputs)[0], before)


# -- reading and writing -------------------------------------------------------------------------


@kernels
def test_kernels_are_found(arguments: dict[str, Any]):
    model = S4Layer(4, 6, **arguments)
    (layer,) = find_ssm_layers(model).values()
    name = "S4" if "rank" in arguments else "S4D kernel"
    assert (layer.name, layer.family.name, layer.state_dim) == ("kernel", name, 6)


@kernels
@pytest.mark.parametrize("prepared", [False, True])
def test_the_system_is_what_the_kernel_computes(arguments: dict[str, Any], prepared: bool):
    kernel = _kernel(arguments)
    wanted = _response(deepcopy(kernel), 40)
    if prepared:
        kernel(L=16)
    system = _family(kernel).system(kernel)
    assert (system.n_inputs, system.n_outputs, system.real_output) == (1, kernel.channels, True)
    torch.testing.assert_close(_wanted(system, kernel, 40), wanted, rtol=1e-9, atol=1e-10)


@kernels
def test_all_states_kept_is_the_same_kernel(arguments: dict[str, Any]):
    kernel = _kernel(arguments)
    before = _response(kernel, 40)
    twin, _ = _reduced(kernel, 6)
    torch.testing.assert_close(_response(twin, 40), before, rtol=1e-9, atol=1e-10)


@kernels
@pytest.mark.parametrize("order", [1, 3, 5])
def test_written_kernels_compute_the_reduced_system(arguments: dict[str, Any], order: int):
    kernel = _kernel(arguments)
    kernel(L=32)
    twin, reduction = _reduced(kernel, order)
    wanted = _wanted(reduction.system, twin, 80)
    torch.testing.assert_close(_response(twin, 30), wanted[..., :30], rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(_response(twin, 80), wanted, rtol=1e-8, atol=1e-10)
    assert (twin.N, _family(twin).state_dim(twin)) == (order, order)
    impulse = torch.zeros(1, 4, 30, dtype=torch.float64)
    impulse[..., 0] = 1
    torch.testing.assert_close(twin.recurrence(impulse)[0], wanted[..., :30])


@both
@pytest.mark.parametrize("bidirectional", [False, True])
def test_the_bound_covers_the_layer(arguments: dict[str, Any], bidirectional: bool):
    """Also where one half of the channels runs backwards and is added."""
    original = S4Layer(4, 6, bidirectional=bidirectional, **arguments).double()
    if bidirectional:
        with torch.no_grad():
            original.kernel.C[1] = original.kernel.C[0]
    for order in (1, 3, 5):
        layer = deepcopy(original)
        (event,) = compress(layer, state_dim=order, horizon=None).events
        inputs = torch.randn(4, 4, 200, dtype=torch.float64)
        change = (layer.convolved(inputs) - original.convolved(inputs)).detach()
        error = float(change.norm() / inputs.norm())
        assert event.error_bound is not None
        assert 1e-4 * event.error_bound < error <= event.error_bound


def test_a_kernel_of_several_outputs_may_have_them_added():
    """Two that agree make twice the error of one."""
    one = _kernel({})
    two = S4Kernel(4, 6, channels=2).double()
    two.load_state_dict(one.state_dict() | {"C": torch.cat((one.C, one.C)).detach()})
    bounds = [_reduced(kernel, 2)[1].bound for kernel in (one, two)]
    torch.testing.assert_close(bounds[1], 2 * bounds[0])


# -- systems that are no sum of a few pairs -----------------------------------------------------


@pytest.mark.parametrize("states", [4, 8, 32])
def test_hippo_is_reduced_although_it_can_not_be_diagonalised(states: int):
    """Its poles are real, -1 to -2N, and their eigenvectors as good as dependent."""
    kernel = S4Kernel(2, states, rank=1).start_as_legs()
    before = _response(deepcopy(kernel).double(), 200)
    system = _family(kernel).system(kernel)
    assert system.order > states
    error = (_wanted(system, kernel, 200) - before).norm() / before.norm()
    assert error < 1e-7
    small = deepcopy(kernel)
    (event,) = compress(small, state_dim=states // 2, horizon=None).events
    assert event.action == "reduce"
    impulse = (_response(small, 200) - before).norm(dim=-1)
    assert event.error_bound is not None
    assert (impulse <= event.error_bound * (1 + 1e-3)).all()
    assert all(p.isfinite().all() for p in small.parameters())


def test_hippo_is_balanced_in_the_real_form_while_it_trains(tmp_path: Path):
    """One half of each pair would be cut to next to nothing: the halves cancel."""
    layer = S4Layer(1, 8, rank=1)
    layer.kernel.start_as_legs()
    before = _response(layer.kernel, 50)
    model, callback = _Module(layer, lr=0.0), CompreSSMCallback(tolerance=0.02, verbose=False)
    trainer(tmp_path, callback, max_epochs=10).fit(model, loader())
    event = next(e for e in callback.history if e["action"] == "reduce")
    assert event["balance"] == "real"
    assert model.net.kernel.N < 8
    after = _response(model.net.kernel, 50)
    assert (after - before).norm() < 0.2 * before.norm()


@pytest.mark.parametrize(
    "poles",
    [
        [-1.0, -2.0, -3.0],
        [-0.5 + 2j, -0.1 + 5j, -3.0 + 0.1j],
        [-1.0 + 1j, -1.0 + 1j, -1.0],
        [-1e-4, -1e4, -1.0 + 1e3j],
    ],
    ids=["real", "pairs", "repeated", "far apart"],
)
def test_diagonal_plus_low_rank_takes_any_poles(poles: list[complex]):
    mu = torch.tensor([poles], dtype=torch.complex128)
    weights = torch.randn(1, 2, 3, dtype=torch.complex128)
    D, P, C = low_rank_form(mu, weights)
    assert (D.real < 0).all()
    assert (D.imag < 0).all()
    assert (P.real > 0).all()
    full = torch.cat((P, P.conj()), -1).mT
    A = torch.diag_embed(torch.cat((D, D.conj()), -1)) - full @ full.mH
    both_c = torch.cat((C, C.conj()), -1)
    for omega in (0.0, 0.3, 2.0, 50.0):
        s = 1j * omega
        resolvent = torch.linalg.solve(s * torch.eye(6, dtype=A.dtype) - A, 2**0.5 * full)
        got = (both_c @ resolvent)[0, :, 0]
        pair = weights / (s - mu.unsqueeze(-2)) + weights.conj() / (s - mu.conj().unsqueeze(-2))
        torch.testing.assert_close(got, pair.sum(-1)[0] / 2, rtol=1e-8, atol=1e-10)


def test_real_poles_take_a_state_each():
    A = torch.diag_embed(torch.tensor([[0.9, 0.5, -0.3, 0.1]], dtype=torch.float64))
    B, C = torch.ones(1, 4, 1, dtype=torch.float64), torch.randn(1, 1, 4, dtype=torch.float64)
    eigenvalues, weights = diagonal_form(A, B, C, 2)
    assert eigenvalues.shape == (1, 4)
    assert sorted(eigenvalues.real[0].tolist()) == pytest.approx([-0.3, 0.1, 0.5, 0.9])
    wanted = (C * A.diagonal(dim1=-2, dim2=-1).unsqueeze(1) ** 3).sum()
    torch.testing.assert_close((weights * eigenvalues.unsqueeze(1) ** 3).sum().real, wanted)


def test_systems_without_a_diagonal_form_are_refused():
    """A delay: all its states matter, and it has one eigenvector."""
    A = torch.ones(23, dtype=torch.float64).diag(-1)[None]
    B, C = torch.eye(24, dtype=torch.float64)[None, :, :1], torch.eye(24).double()[None, -1:]
    with pytest.raises(IllConditionedError, match=r"expected a state matrix of 24 .* `ignore`"):
        diagonal_form(A, B, C, 12)


@both
def test_a_silent_channel_stays_silent(arguments: dict[str, Any]):
    kernel = _kernel(arguments)
    with torch.no_grad():
        kernel.C[:, 1].zero_()
    compress(kernel, state_dim=3)
    assert not kernel.C[:, 1].any()
    assert all(torch.isfinite(p).all() for p in kernel.parameters())
    kernel(L=9)[0].square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in kernel.parameters())


@both
def test_states_outside_the_circle_and_nan_are_named(arguments: dict[str, Any]):
    kernel = _kernel({**arguments, "real_transform": "none"})
    with torch.no_grad():
        kernel.A_real[0, 0] = -3.0
    with pytest.raises(UnstableSystemError):
        compress(kernel, state_dim=3)
    with torch.no_grad():
        kernel.A_real[0, 0] = torch.nan
    with pytest.raises(NonFiniteError):
        compress(kernel, state_dim=3)


# -- around a layer ------------------------------------------------------------------------------


@kernels
def test_layers_are_reduced_trained_and_loaded(arguments: dict[str, Any]):
    model, inputs = S4Layer(4, 6, **arguments), torch.randn(2, 4, 30)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    marks = {n: p._optim for n, p in model.named_parameters() if hasattr(p, "_optim")}
    for step in range(6):
        if step == 3:
            (event,) = compress(model, state_dim=4, sample=inputs, optimizers=[optimizer]).events
            assert (event.layer, event.horizon, event.new_state_dim) == ("kernel", 30, 4)
        optimizer.zero_grad()
        (model(inputs) - inputs.roll(1, -1)).square().mean().backward()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.step()
        for name, parameter in model.named_parameters():
            assert torch.isfinite(parameter).all()
            assert not torch.equal(parameter, before[name]), name
    assert {n: p._optim for n, p in model.named_parameters() if hasattr(p, "_optim")} == marks
    fresh = S4Layer(4, 6, **arguments)
    load_compressed(fresh, model.state_dict())
    assert fresh.kernel.N == 4
    assert torch.equal(fresh(inputs), model(inputs))
    load_compressed(model, S4Layer(4, 6, **arguments).state_dict())
    assert model.kernel.N == 6


@both
def test_kernels_whose_poles_are_not_learned(arguments: dict[str, Any]):
    model, inputs = S4Layer(4, 6, learned=False, **arguments), torch.randn(2, 4, 30)
    compress(model, state_dim=4)
    assert model.kernel.get_buffer("A_imag").shape == (4, 4)
    fresh = S4Layer(4, 6, learned=False, **arguments)
    load_compressed(fresh, model.state_dict())
    assert torch.equal(fresh(inputs), model(inputs))


@both
def test_matrices_for_stepping_have_to_be_set_up_again(arguments: dict[str, Any]):
    kernel = _kernel(arguments)
    kernel.setup_step()
    compress(kernel, state_dim=4)
    assert kernel.dA is kernel.dB is kernel.dC is None


def test_the_cut_off_of_a_kernel_is_its_horizon():
    model = S4Layer(4, 6, rank=1, l_max=20)
    (event,) = compress(model, state_dim=4, sample=torch.randn(2, 4, 30)).events
    assert event.horizon == 20


@pytest.mark.parametrize(
    ("args", "kwargs", "length"),
    [
        ((12,), {}, 12),
        ((None, 1.0), {"L": 12}, 12),
        ((), {"L": 12, "state": None}, 12),
        ((), {"L": None}, None),
        ((True,), {}, None),
        ((torch.zeros(2, 12, 3),), {}, 12),
    ],
)
def test_sequence_length(args: tuple[Any, ...], kwargs: dict[str, Any], length: int | None):
    assert S4Family().sequence_length(args, kwargs) == length


def test_a_layer_that_lends_its_tensors_to_a_kernel_is_not_found_twice():
    kernel = S4Kernel(4, 6)
    outer = nn.Module()
    for name, parameter in kernel.named_parameters():
        outer.register_parameter(name, parameter)
    assert find_family(outer) is not None
    outer.kernel = kernel
    assert list(find_ssm_layers(outer)) == ["kernel"]
    compress(outer, state_dim=3)
    assert outer.C is kernel.C
    assert kernel.C.shape[2] == 3


@pytest.mark.parametrize("noise", [0.0, 1e-3])
@both
def test_averages_follow(arguments: dict[str, Any], noise: float):
    layer = _kernel(arguments)
    average = AveragedModel(layer)
    with torch.no_grad():
        for parameter in average.module.parameters():
            parameter.mul_(1 + noise * torch.randn_like(parameter))
    model = nn.ModuleDict({"layer": layer, "average": average})
    compress(model, state_dim=4)
    for name, parameter in average.module.named_parameters():
        own = layer.get_parameter(name)
        assert parameter.shape == own.shape
        assert (parameter - own).norm() <= (100 * noise + 1e-9) * own.norm(), name


def test_averages_of_low_rank_kernels_follow_the_largest_states_only():
    layer = _kernel({"rank": 1})
    model = nn.ModuleDict({"layer": layer, "average": AveragedModel(layer)})
    with pytest.raises(UnsupportedLayerError, match="expected an S4 kernel with selection='larg"):
        compress(model, state_dim=4, selection="random")
    assert layer.N == 6


@both
def test_the_regularizer_has_gradients(arguments: dict[str, Any]):
    kernel = _kernel(arguments, states=3)
    penalty = HankelRegularizer(1.0)
    penalty(kernel).backward()
    for name, parameter in kernel.named_parameters():
        if name == "inv_dt":
            continue  # H numbers; the rest is enough
        direction = torch.randn_like(parameter)
        values = []
        for sign in (1, -1):
            moved = deepcopy(kernel)
            with torch.no_grad():
                moved.get_parameter(name).add_(sign * 1e-5 * direction)
                values.append(float(penalty(moved)))
        slope = (values[0] - values[1]) / 2e-5
        assert float((parameter.grad * direction).sum()) == pytest.approx(slope, rel=1e-4)


def test_spectra_do_not_depend_on_the_form():
    """Low rank of nothing is the diagonal kernel."""
    low, plain = _kernel({"rank": 1}), _kernel({"disc": "bilinear"})
    with torch.no_grad():
        low.P.zero_()
    own = {n: t for n, t in low.state_dict().items() if n not in ("P", "l_kernel")}
    plain.load_state_dict(own)
    torch.testing.assert_close(hankel_spectra(low)[""], hankel_spectra(plain)[""])
    sigma = hankel_singular_values(S4Family().system(low))
    assert sigma.shape == (4, 12)


class _Module(pl.LightningModule):
    """A classifier of short sequences, with one layer."""

    def __init__(self, net: nn.Module, lr: float = 1e-2) -> None:
        super().__init__()
        self.net, self.lr, self.losses = net, lr, []

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        x, y = batch
        out = self.net(x.float().mT).mean(-1)[:, 0]
        loss = (out - y).square().mean()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


@both
def test_a_run_is_reduced_and_resumed_to_the_bit(arguments: dict[str, Any], tmp_path: Path):
    def run(path: str | None) -> tuple[_Module, Any]:
        torch.manual_seed(1)
        model = _Module(S4Layer(1, 8, **arguments))
        callback = CompreSSMCallback(tolerance=0.2, window=(0.0, 0.5), verbose=False)
        saver = ModelCheckpoint(tmp_path / str(path is None), "{step}", save_top_k=-1)
        fit = trainer(tmp_path, callback, saver, max_epochs=4, enable_checkpointing=True)
        fit.fit(model, StatefulLoader(), ckpt_path=path)
        return model, fit.optimizers[0].state_dict()

    whole, optimizer = run(None)
    assert whole.net.kernel.N < 8
    for step in (BATCHES, 3 * BATCHES):
        model, moments = run(str(tmp_path / "True" / f"step={step}.ckpt"))
        assert model.losses == whole.losses[step:]
        assert same(model.state_dict(), whole.state_dict())
        assert same(moments, optimizer)


# -- what is refused -----------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "shared A": ({"copies": 2}, r"an A for each of 4 channels \(n_ssm=None\), got 2 that"),
    "shared A, low rank": ({"copies": 1, "rank": 1}, "an A for each of 4 channels"),
    "band limit": ({"bandlimit": 0.5}, "bandlimit=None, got bandlimit=0.5"),
    "imaginary transform": ({"imag_transform": "exp"}, "imag_transform='none', got imag_tr"),
    "unknown transform": ({"real_transform": "relu"}, "by 'exp' or 'softplus' or 'none', got 're"),
    "dss": ({"disc": "dss"}, "disc='zoh' or 'bilinear', got 'dss'"),
    "a step for each state": ({"rank": 1, "dt_tie": False}, "one step for each channel"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_other_kernels_are_refused_by_name(arguments: dict[str, Any], message: str):
    known = {n: v for n, v in arguments.items() if v not in ("relu", "dss")}
    kernel = S4Kernel(4, 6, **known)
    for name, value in arguments.items():
        if name not in known:
            setattr(kernel, name, value)
    for act in (hankel_spectra, lambda module: compress(module, state_dim=2)):
        with pytest.raises(UnsupportedLayerError, match=message):
            act(kernel)
    assert kernel.C.shape == (1, 4, 6, 2)


def test_real_kernels_are_refused_by_name():
    kernel = S4Kernel(4, 6, is_real=True)
    del kernel.A_imag
    for name in "BC":
        setattr(kernel, name, nn.Parameter(getattr(kernel, name)[..., 0].detach()))
    with pytest.raises(UnsupportedLayerError, match="is_real=False, got is_real=True"):
        compress(kernel, state_dim=2)


@pytest.mark.parametrize("balance", ["folded", "complex"])
def test_low_rank_kernels_are_balanced_in_the_real_form_only(balance: str):
    kernel = _kernel({"rank": 1})
    with pytest.raises(UnsupportedLayerError, match=r"S4: expected balance=.real. or .auto."):
        compress(kernel, state_dim=2, balance=balance)
    assert kernel.N == 6


def _put(name: str, value: Tensor) -> Any:
    return lambda kernel: setattr(kernel, name, nn.Parameter(value))


LOOK_ALIKES = {
    "no B": lambda kernel: delattr(kernel, "B"),
    "no step": lambda kernel: delattr(kernel, "inv_dt"),
    "other steps": _put("inv_dt", torch.zeros(4, 3)),
    "C of one output": _put("C", torch.zeros(4, 6, 2)),
    "C without pairs": _put("C", torch.zeros(1, 4, 6)),
    "other frequencies": _put("A_imag", torch.zeros(4, 3)),
    "B of other copies": _put("B", torch.zeros(1, 3, 6, 2)),
    "P without its length": _put("P", torch.zeros(1, 4, 6, 2)),
}


@pytest.mark.parametrize("change", LOOK_ALIKES.values(), ids=LOOK_ALIKES)
def test_look_alikes_are_left_alone(change: Any):
    kernel = S4Kernel(4, 6)
    change(kernel)
    assert find_family(kernel) is None
