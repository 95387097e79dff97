"""compress() and hankel_spectra() on whole models, without a Trainer."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

from lightning_compressm import compress, hankel_spectra, load_compressed, register_family
from lightning_compressm.control import hankel_singular_values, per_state_energy
from lightning_compressm.errors import (
    CompreSSMError,
    IllConditionedError,
    NonFiniteError,
    UnstableSystemError,
    UnsupportedLayerError,
    UnsupportedOptimizerError,
)
from lightning_compressm.families import _registry, registered_families
from lightning_compressm.families.lru import LRUFamily
from lightning_compressm.nn import LRU
from lightning_compressm.reduction import linear
from tests.families.layers import Decay, DecayFamily, PortedLRU


class Net(nn.Module):
    """Two LRU layers with unlike spectra, and things that must not change."""

    def __init__(self, first: int = 16, second: int = 12) -> None:
        super().__init__()
        self.encoder = nn.Linear(2, 3)
        self.first = LRU(3, first, r_min=0.1, r_max=0.6)
        self.norm = nn.BatchNorm1d(3)
        self.second = LRU(3, second, max_phase=0.3)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        x = self.norm(self.first(self.encoder(x)).mT).mT
        return scale * self.second(x)


@pytest.fixture
def _own_families() -> Iterator[None]:
    registered_families()
    before = dict(_registry._families)
    register_family(DecayFamily)
    yield
    _registry._families.clear()
    _registry._families.update(before)


def _x(length: int = 30, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(4, length, 2, dtype=dtype)


def _picture(model: nn.Module) -> dict[str, Any]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "ids": {name: id(t) for name, t in tensors.items()},
        "values": {name: t.detach().clone() for name, t in tensors.items()},
        "modes": [m.training for m in model.modules()],
        "hooks": [len(m._forward_pre_hooks) for m in model.modules()],
    }


def _assert_untouched(model: nn.Module, before: dict[str, Any]) -> None:
    now = _picture(model)
    for key in ("ids", "modes", "hooks"):
        assert now[key] == before[key], key
    for name, value in before["values"].items():
        torch.testing.assert_close(now["values"][name], value, rtol=0, atol=0, equal_nan=True)


# -- how many states -----------------------------------------------------------------------------


def test_the_default_keeps_95_percent_of_the_energy():
    model = Net()
    report = compress(model)
    assert [event.layer for event in report.events] == ["first", "second"]
    for event in report.events:
        assert event.action == "reduce"
        assert event.old_state_dim > event.new_state_dim
        assert 0.95 <= event.energy_kept <= 1
        assert getattr(model, event.layer).d_state == event.new_state_dim
        sigma = report.spectra[event.layer]
        assert sigma.shape == (event.old_state_dim,)
        assert sigma[: event.new_state_dim - 1].sum() < 0.95 * sigma.sum() + 1e-12


@pytest.mark.parametrize("tolerance", [0.01, 0.1, 0.3])
def test_tolerance(tolerance: float):
    report = compress(Net(), tolerance)
    assert all(event.energy_kept >= 1 - tolerance - 1e-9 for event in report.events)


def test_a_larger_tolerance_keeps_fewer_states():
    model = Net()
    dims = []
    for tolerance in (0.5, 0.1, 0.01):
        report = compress(deepcopy(model), tolerance)
        dims.append(sum(event.new_state_dim for event in report.events))
    assert dims == sorted(set(dims))


def test_fraction_drops_a_share_of_the_present_states():
    model = Net(16, 12)
    for expected in ((12, 9), (9, 7), (7, 6)):
        compress(model, fraction=0.25)
        assert (model.first.d_state, model.second.d_state) == expected


def test_state_dim_is_a_ceiling():
    model = Net(16, 12)
    report = compress(model, state_dim=14)
    assert [e.new_state_dim for e in report.events] == [14, 12]
    assert [e.action for e in report.events] == ["reduce", "skip"]
    assert report.events[1].reason


def test_round_to_and_min_state_dim():
    model = Net()
    compress(model, 0.5, round_to=4, min_state_dim=5)
    assert {model.first.d_state, model.second.d_state} == {8}


def test_share_state_dim_takes_the_largest_need():
    model = Net()
    needs = [e.new_state_dim for e in compress(deepcopy(model), 0.1).events]
    assert needs[0] != needs[1]
    compress(model, 0.1, share_state_dim=True)
    assert model.first.d_state == model.second.d_state == max(needs)


@pytest.mark.parametrize("target", [{"fraction": 0.1}, {"tolerance": 0.0}, {"tolerance": 0.1}])
def test_share_state_dim_leaves_a_layer_that_has_fewer_as_it_is(target: dict[str, float]):
    model = nn.Sequential(LRU(2, 20, r_min=0.9), LRU(2, 6, r_max=0.91), LRU(2, 9, r_min=0.9))
    alone = [e.new_state_dim for e in compress(deepcopy(model), **target).events]
    most = max(alone)
    events = compress(model, **target, share_state_dim=True).events
    assert [e.new_state_dim for e in events] == [min(most, n) for n in (20, 6, 9)]
    assert [layer.d_state for layer in model] == [e.new_state_dim for e in events]


@pytest.mark.usefixtures("_own_families")
def test_share_state_dim_is_for_each_family():
    model = nn.Sequential(LRU(2, 12), Decay(2, 12), LRU(2, 12, r_min=0.0, r_max=0.2))
    needs = [e.new_state_dim for e in compress(deepcopy(model), 0.2).events]
    assert len(set(needs)) == 3
    shared = [e.new_state_dim for e in compress(model, 0.2, share_state_dim=True).events]
    lru = max(needs[0], needs[2])
    assert shared == [lru, needs[1], lru]


def test_layers_and_ignore_choose_by_glob():
    for kwargs in ({"layers": ["f*"]}, {"ignore": ["second"]}, {"layers": ["*"], "ignore": ["s*"]}):
        model = Net()
        compress(model, state_dim=2, **kwargs)
        assert (model.first.d_state, model.second.d_state) == (2, 12)


def test_compressing_again_goes_on_from_there():
    model, x = Net(), _x()
    compress(model, state_dim=8)
    again = compress(model, state_dim=3)
    assert [(e.old_state_dim, e.new_state_dim) for e in again.events] == [(8, 3), (8, 3)]
    assert all(e.action == "skip" for e in compress(model, state_dim=3).events)
    model(x).sum().backward()


# -- what the result computes --------------------------------------------------------------------


def test_the_error_stays_below_the_reported_bound():
    layer = LRU(2, 24).double()
    x = _x(60, torch.float64)
    before = layer(x)
    (event,) = compress(layer, state_dim=6).events
    assert event.layer == ""
    assert event.error_bound is not None
    assert 0 < (layer(x) - before).norm() <= event.error_bound * x.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_states_without_output_go_for_nothing(dtype: torch.dtype):
    model, x = Net().to(dtype).eval(), _x(dtype=dtype)
    with torch.no_grad():
        for layer in (model.first, model.second):
            layer.C_re[:, ::2] = 0
            layer.C_im[:, ::2] = 0
    before = model(x)
    report = compress(model, 1e-6)
    assert [e.new_state_dim for e in report.events] <= [8, 6]
    torch.testing.assert_close(model(x), before, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("balance", ["auto", "real", "folded", "complex"])
@pytest.mark.parametrize("horizon", ["auto", None, 12])
def test_every_balance_and_horizon(balance: Any, horizon: Any):
    model = Net()
    report = compress(model, state_dim=4, balance=balance, horizon=horizon, sample=_x(30))
    event = report.events[0]
    assert event.balance == ("real" if balance == "auto" else balance)
    assert event.horizon in ({"auto": 30}.get(horizon, horizon), None)
    assert (event.error_bound is None) == (event.horizon is not None)
    assert torch.isfinite(model(_x())).all()


@torch.no_grad()
def test_selections_are_ordered_and_reproducible():
    source, x = LRU(2, 24), _x()
    errors = {}
    for selection in ("largest", "random", "smallest"):
        twins = [deepcopy(source) for _ in range(2)]
        for twin in twins:
            (event,) = compress(twin, state_dim=8, selection=selection).events
            assert (event.error_bound is None) == (selection != "largest")
        errors[selection] = float((twins[0](x) - source(x)).norm())
        assert torch.equal(twins[0](x), twins[1](x))
    assert errors["largest"] < min(errors["random"], errors["smallest"])


def test_the_rest_of_the_model_is_left_alone():
    model = Net().train()
    model.norm.eval()
    others = {n: p for n, p in model.named_parameters() if "encoder" in n or "norm" in n}
    values = {n: p.detach().clone() for n, p in others.items()}
    compress(model, state_dim=3, sample=_x())
    for name, parameter in others.items():
        assert model.get_parameter(name) is parameter
        assert torch.equal(parameter, values[name])
    assert all(p.grad is None for p in model.parameters())


def test_a_compressed_model_loads_into_a_full_one():
    model = Net().eval()
    compress(model, state_dim=3)
    fresh = load_compressed(Net().eval(), model.state_dict())
    x = _x()
    assert torch.equal(fresh(x), model(x))
    model.load_state_dict(Net().state_dict())
    assert model.first.d_state == 16


def test_compress_makes_ports_loadable():
    """After compress() a model takes checkpoints of any size, whoever wrote its layers."""
    model = nn.Sequential(PortedLRU(2, 2, 9))
    full = deepcopy(model.state_dict())
    compress(model, state_dim=3)
    model.load_state_dict(full)
    assert model[0].state_features == 9


# -- the sample ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sample",
    [_x(25), (_x(25),), {"x": _x(25)}, {"x": _x(25), "scale": 2.0}],
    ids=["tensor", "tuple", "dict", "dict with options"],
)
def test_the_sample_gives_the_horizon(sample: Any):
    report = compress(Net(), state_dim=4, sample=sample)
    assert {e.horizon for e in report.events} <= {25, None}
    expected = hankel_spectra(Net(), sample=sample, horizon="auto")
    assert expected["first"].shape == (16,)


def test_the_spectra_follow_the_samples_length():
    model = Net()
    short, long = (hankel_spectra(model, sample=_x(n), horizon="auto") for n in (3, 300))
    infinite = hankel_spectra(model)
    assert (short["second"] < long["second"]).all()
    torch.testing.assert_close(long["first"], infinite["first"], rtol=1e-6, atol=1e-9)


def test_without_a_sample_the_horizon_is_infinite():
    assert {e.horizon for e in compress(Net(), state_dim=4).events} == {None}


def test_a_sample_of_one_step_says_nothing_about_the_length():
    assert {e.horizon for e in compress(Net(), state_dim=4, sample=_x(1)).events} == {None}


def test_running_the_sample_leaves_modes_buffers_and_hooks():
    model = Net().train()
    model.first.eval()
    before = _picture(model)
    hankel_spectra(model, sample=_x(), horizon="auto")
    _assert_untouched(model, before)
    assert model.norm.num_batches_tracked == 0


@pytest.mark.parametrize("sample", [torch.randn(3, 3, 9), {"y": _x()}, (_x(), 1, 2), 7])
def test_a_sample_that_does_not_fit_changes_nothing(sample: Any):
    model = Net().train()
    before = _picture(model)
    with pytest.raises((TypeError, RuntimeError, ValueError, AttributeError)):
        compress(model, state_dim=3, sample=sample)
    _assert_untouched(model, before)


# -- refusals, before anything is changed --------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"tolerance": 0.1, "fraction": 0.5}, "at most one of tolerance, fraction and state_dim"),
        ({"tolerance": 0.1, "state_dim": 4}, "tolerance=0.1 and state_dim=4"),
        ({"tolerance": 1.0}, "tolerance"),
        ({"tolerance": -0.1}, "tolerance"),
        ({"tolerance": float("nan")}, "tolerance"),
        ({"tolerance": "0.1"}, "tolerance"),
        ({"fraction": 0.0}, "fraction"),
        ({"fraction": 1.0}, "fraction"),
        ({"state_dim": 0}, "state_dim"),
        ({"state_dim": 2.0}, "state_dim"),
        ({"round_to": 0}, "round_to"),
        ({"min_state_dim": 0}, "min_state_dim"),
        ({"horizon": 0}, "horizon"),
        ({"horizon": "long"}, "horizon"),
        ({"balance": "imaginary"}, "balance: expected one of auto, real, folded, complex"),
        ({"criterion": "norm"}, "criterion"),
        ({"selection": "best"}, "selection"),
        ({"layers": "first"}, "layers: expected a list"),
        ({"ignore": [1]}, "ignore: expected a list of glob patterns .strings."),
        ({"layers": ["third"]}, "'third' matches no SSM layer; expected one of: 'first', 'second'"),
        ({"ignore": ["encoder"]}, "'encoder' matches no SSM layer"),
    ],
)
def test_arguments_that_can_not_be_meant(kwargs: dict[str, Any], message: str):
    model = Net()
    before = _picture(model)
    with pytest.raises(ValueError, match=message):
        compress(model, **kwargs)
    _assert_untouched(model, before)


def test_a_model_without_ssm_layers_says_what_was_looked_at():
    model = nn.Sequential(nn.Linear(2, 2), nn.LSTM(2, 2), nn.Linear(2, 2))
    for call in (compress, hankel_spectra):
        with pytest.raises(UnsupportedLayerError) as caught:
            call(model)
        for part in ("Linear x2", "LSTM x1", "Known families: ", "LRU", "register_family"):
            assert part in str(caught.value)


def test_ignoring_everything_is_refused():
    with pytest.raises(UnsupportedLayerError, match="leave none of the SSM layers"):
        compress(Net(), ignore=["*"])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("nu_log", torch.nan),
        ("theta_log", torch.inf),
        ("gamma_log", torch.nan),
        ("B_re", torch.inf),
        ("C_im", torch.nan),
    ],
)
def test_parameters_that_are_not_finite(name: str, value: float):
    model = Net()
    with torch.no_grad():
        getattr(model.second, name).view(-1)[3] = value
    before = _picture(model)
    with pytest.raises(NonFiniteError, match=r"layer 'second' \(LRU\)"):
        compress(model, state_dim=3)
    with pytest.raises(NonFiniteError, match="second"):
        hankel_spectra(model)
    _assert_untouched(model, before)


def test_eigenvalues_on_the_unit_circle():
    model = Net()
    with torch.no_grad():
        model.second.nu_log[0] = -80.0
    before = _picture(model)
    with pytest.raises(UnstableSystemError, match=r"layer 'second' \(LRU\)"):
        compress(model, state_dim=3)
    _assert_untouched(model, before)


def test_a_layer_that_does_nothing_is_left_as_it_is():
    model = Net()
    with torch.no_grad():
        model.second.B_re.zero_()
        model.second.B_im.zero_()
    before = deepcopy(model.second.state_dict())
    with pytest.warns(UserWarning, match=r"layer 'second' \(LRU\) is left as it is: it has zero"):
        report = compress(model, tolerance=0.5)
    assert model.first.d_state < before["nu_log"].shape[0] == model.second.d_state
    assert all(torch.equal(v, before[k]) for k, v in model.second.state_dict().items())
    assert "never reach its outputs" in {e.layer: e.reason for e in report.events}["second"]
    assert not hankel_spectra(model)["second"].any()
    compress(model, state_dim=2)
    assert model.second.d_state == 2


def test_an_optimizer_that_can_not_follow_leaves_the_model_alone():
    class Hoarder(optim.SGD):
        def __init__(self, params: Any) -> None:
            self.mine = list(params)
            super().__init__(self.mine, lr=0.1)

    model = Net()
    before = _picture(model)
    for bad in (Hoarder(model.parameters()), "adam"):
        with pytest.raises(UnsupportedOptimizerError):
            compress(model, state_dim=3, optimizers=[optim.Adam(model.parameters()), bad])
        _assert_untouched(model, before)


def test_a_family_that_fails_late_leaves_every_layer_alone(monkeypatch: pytest.MonkeyPatch):
    model = Net()
    before = _picture(model)
    real = LRUFamily.write

    def write(self: LRUFamily, module: nn.Module, system: Any) -> dict[str, Tensor]:
        values = real(self, module, system)
        return values if module is model.first else values | {"C_im": values["C_im"] * torch.nan}

    monkeypatch.setattr(LRUFamily, "write", write)
    with pytest.raises(NonFiniteError, match=r"second\.C_im"):
        compress(model, state_dim=3)
    _assert_untouched(model, before)


def test_an_ill_conditioned_layer_is_skipped_with_a_reason(monkeypatch: pytest.MonkeyPatch):
    real = linear.truncate

    def truncate(factors: Any, order: int, **kwargs: Any) -> Any:
        if factors.system.order == 12:
            raise IllConditionedError("too close to defective")
        return real(factors, order, **kwargs)

    monkeypatch.setattr(linear, "truncate", truncate)
    model = Net()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = compress(model, state_dim=3)
    assert [e.action for e in report.events] == ["reduce", "skip"]
    assert "too close to defective" in report.events[1].reason
    assert any("second" in str(w.message) for w in caught)
    assert model.second.d_state == 12


# -- shared layers -------------------------------------------------------------------------------


def _tie(a: nn.Module, b: nn.Module, names: Any = None) -> None:
    for name in names or list(a._parameters):
        setattr(b, name, getattr(a, name))


def test_one_module_used_twice_is_reduced_once():
    layer = LRU(2, 12)
    model = nn.ModuleDict({"a": layer, "b": layer})
    report = compress(model, state_dim=4)
    assert len(report.events) == 1
    assert model["a"] is model["b"]
    assert layer.d_state == 4


def test_layers_that_share_all_tensors_are_reduced_together():
    model = nn.Sequential(LRU(2, 12), nn.Tanh(), LRU(2, 12))
    _tie(model[0], model[2])
    optimizer = optim.Adam(model.parameters())
    model(_x()).square().mean().backward()
    optimizer.step()
    report = compress(model, state_dim=4, optimizers=[optimizer])
    assert [e.layer for e in report.events] == ["0"]
    assert model[0].d_state == model[2].d_state == 4
    for name in model[0]._parameters:
        assert getattr(model[0], name) is getattr(model[2], name), name
    optimizer.zero_grad()
    model(_x()).square().mean().backward()
    optimizer.step()
    assert len(optimizer.param_groups[0]["params"]) == 8


def test_layers_that_share_only_some_tensors_are_refused():
    model = nn.Sequential(LRU(2, 12), LRU(2, 12))
    _tie(model[0], model[1], ["nu_log", "theta_log"])
    before = _picture(model)
    with pytest.raises(
        UnsupportedLayerError, match="'1' and '0' share some of their state tensors"
    ):
        compress(model, state_dim=4)
    _assert_untouched(model, before)


def test_sharing_a_tensor_without_states_is_no_obstacle():
    model = nn.Sequential(LRU(2, 12), LRU(2, 12))
    _tie(model[0], model[1], ["D"])
    compress(model, state_dim=4)
    assert model[0].D is model[1].D


# -- optimizers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [optim.AdamW, optim.SGD, optim.LBFGS])
def test_optimizers_are_carried_along(make: Any):
    model, x = Net(), _x()
    optimizer = make(model.parameters(), lr=1e-3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    compress(model, state_dim=4, optimizers=(o for o in [optimizer]))
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    before = model.first.B_re.detach().clone()
    optimizer.step(closure)
    assert not torch.equal(model.first.B_re, before)


def test_errors_of_the_package_have_one_base():
    for error in (NonFiniteError, UnstableSystemError, UnsupportedLayerError):
        assert issubclass(error, CompreSSMError)


# -- spectra -------------------------------------------------------------------------------------


@pytest.mark.parametrize("balance", ["auto", "real", "folded", "complex"])
def test_spectra_are_those_of_the_layers(balance: Any):
    model = Net()
    spectra = hankel_spectra(model, balance=balance)
    assert {n: tuple(s.shape) for n, s in spectra.items()} == {"first": (16,), "second": (12,)}
    form = "real" if balance == "auto" else balance
    for name, sigma in spectra.items():
        assert sigma.dtype == torch.float64
        assert not sigma.requires_grad
        assert (sigma.diff() <= 0).all()
        system = LRUFamily().system(getattr(model, name))
        expected = per_state_energy(hankel_singular_values(system, balance=form), form)
        torch.testing.assert_close(sigma, expected)


@pytest.mark.usefixtures("_own_families")
def test_a_bank_of_systems_has_a_row_for_each(monkeypatch: pytest.MonkeyPatch):
    single = DecayFamily.system

    def bank(self: DecayFamily, module: nn.Module) -> Any:
        system = single(self, module)
        stacked = (t.expand(5, *t.shape) for t in (system.eigenvalues, system.B, system.C))
        return type(system)(*stacked)

    monkeypatch.setattr(DecayFamily, "system", bank)
    assert hankel_spectra(Decay(3, 8))[""].shape == (5, 8)


def test_spectra_change_nothing():
    model = Net()
    before = _picture(model)
    hankel_spectra(model)
    _assert_untouched(model, before)


# -- compiled and wrapped models -----------------------------------------------------------------


def test_compiled_children_are_reduced_under_their_plain_names():
    model = Net()
    model.second = torch.compile(model.second)
    report = compress(model, state_dim=4, layers=["second"])
    assert report.events[0].layer == "second"
    assert model.second._orig_mod.d_state == 4
    assert model.second._orig_mod.B_re.shape == (4, 3)


def test_a_compiled_root():
    model = torch.compile(Net())
    report = compress(model, state_dim=4)
    assert [e.layer for e in report.events] == ["first", "second"]
    assert model.first.d_state == 4


def test_data_parallel_style_wrappers():
    model = nn.DataParallel(Net())
    compress(model, state_dim=4)
    assert model.module.first.d_state == 4
