"""Every torch optimizer x every policy goes on training the new parameters, and only those."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.optim import Optimizer

from lightning_compressm.control import balanced_truncation
from lightning_compressm.errors import UnsupportedOptimizerError
from lightning_compressm.families.lru import LRUFamily
from lightning_compressm.surgery.apply import apply_plan
from lightning_compressm.surgery.optimizer import (
    carry_gradients,
    check_optimizer,
    rebind_optimizers,
)
from tests.families.layers import PortedLRU
from tests.features import optimizers
from tests.surgery.models import KEEP, Case, LRUCase, SelectCase

Make = Callable[[Any], Optimizer]
LR = 1e-2

OPTIMIZERS: dict[str, Make] = {
    "SGD": lambda p: optim.SGD(p, LR),
    "SGD momentum": lambda p: optim.SGD(p, LR, momentum=0.9),
    "SGD nesterov": lambda p: optim.SGD(p, LR, momentum=0.9, nesterov=True),
    "SGD fused": lambda p: optim.SGD(p, LR, momentum=0.9, fused=True),
    "Adam": lambda p: optim.Adam(p, LR),
    "Adam amsgrad": lambda p: optim.Adam(p, LR, amsgrad=True),
    "Adam fused amsgrad": lambda p: optim.Adam(p, LR, fused=True, amsgrad=True),
    "AdamW": lambda p: optim.AdamW(p, LR),
    "AdamW foreach": lambda p: optim.AdamW(p, LR, foreach=True),
    "AdamW fused": lambda p: optim.AdamW(p, LR, fused=True),
    "AdamW amsgrad": lambda p: optim.AdamW(p, LR, amsgrad=True, foreach=True),
    "NAdam": lambda p: optim.NAdam(p, LR),
    "RAdam": lambda p: optim.RAdam(p, LR),
    "Adamax": lambda p: optim.Adamax(p, LR),
    "RMSprop": lambda p: optim.RMSprop(p, LR),
    "RMSprop centred": lambda p: optim.RMSprop(p, LR, centered=True),
    "RMSprop momentum": lambda p: optim.RMSprop(p, LR, centered=True, momentum=0.9),
    "Adagrad": lambda p: optim.Adagrad(p, LR),
    "Adagrad start": lambda p: optim.Adagrad(p, LR, initial_accumulator_value=0.1),
    "Adagrad fused": lambda p: optim.Adagrad(p, LR, fused=True),
    "Adadelta": lambda p: optim.Adadelta(p, 1.0),
    "Rprop": lambda p: optim.Rprop(p, LR),
    "ASGD": lambda p: optim.ASGD(p, LR, t0=1.0),
    "Adafactor": lambda p: optim.Adafactor(p, LR),
    "Muon": lambda p: optim.Muon(p, LR),
    "LBFGS": lambda p: optim.LBFGS(p, 0.1, max_iter=3),
}
ONE_GROUP = {"LBFGS"}
CASES = {"lru": LRUCase, "select": SelectCase}
POLICIES = ["transport", "truncate", "reset"]

every_optimizer = pytest.mark.parametrize("name", optimizers(OPTIMIZERS))
every_policy = pytest.mark.parametrize("policy", POLICIES)
every_case = pytest.mark.parametrize("make_case", CASES.values(), ids=CASES)


def _optimizer(name: str, model: nn.Module) -> Optimizer:
    """Two parameter groups, the replaced tensors in the second; Muon takes matrices only."""
    params = [p for p in model.parameters() if name != "Muon" or p.ndim == 2]
    if name in ONE_GROUP:
        return OPTIMIZERS[name](params)
    return OPTIMIZERS[name]([{"params": params[-1:]}, {"params": params[:-1], "lr": LR / 2}])


def _train(case: Case, optimizer: Optimizer, steps: int = 1) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = case.loss()
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)


def _trained(name: str, make_case: Any, steps: int = 3) -> tuple[Case, Optimizer]:
    case = make_case()
    optimizer = _optimizer(name, case.model)
    _train(case, optimizer, steps)
    return case, optimizer


def _held(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _flat(state: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested optimizer state."""
    if isinstance(state, dict):
        for key, value in state.items():
            yield from _flat(value, f"{path}.{key}")
    elif isinstance(state, list | tuple):
        for i, value in enumerate(state):
            yield from _flat(value, f"{path}.{i}")
    else:
        yield path, state


def _assert_same_state(actual: Any, expected: Any) -> None:
    actual, expected = dict(_flat(actual)), dict(_flat(expected))
    assert actual.keys() == expected.keys()
    for path, value in expected.items():
        if torch.is_tensor(value):
            assert torch.equal(actual[path], value), path
        else:
            assert actual[path] == value, path


@every_optimizer
@every_policy
@every_case
def test_training_goes_on(name: str, policy: Any, make_case: Any):
    case, optimizer = _trained(name, make_case)
    scheduler = optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    groups = [(group, group["params"], dict(group)) for group in optimizer.param_groups]
    old = {id(p) for p in _held(optimizer)}
    steps = {n: optimizer.state[p].get("step") for n, p in case.model.named_parameters()}
    steps = deepcopy(steps)
    replaced = apply_plan(case.model, case.plan())
    rebind_optimizers([optimizer], replaced, policy)

    expected = {id(p) for p in case.model.parameters() if name != "Muon" or p.ndim == 2}
    assert {id(p) for p in _held(optimizer)} == expected
    gone = {id(r.old) for r in replaced.values()}
    assert gone & old
    assert not gone & {id(p) for p in optimizer.state}
    for group, (before, params, options) in zip(optimizer.param_groups, groups, strict=True):
        assert group is before
        assert group["params"] is params
        assert {k: v for k, v in group.items() if k != "params"} == {
            k: v for k, v in options.items() if k != "params"
        }
    for n, replacement in replaced.items():
        if policy != "reset" and steps[n] is not None and name != "LBFGS":
            assert optimizer.state[replacement.new]["step"] == steps[n], n

    before = {n: p.detach().clone() for n, p in case.model.named_parameters()}
    first = case.loss().item()
    _train(case, optimizer)
    for n, parameter in case.model.named_parameters():
        if id(parameter) in expected:
            assert torch.isfinite(parameter).all(), n
            assert n not in replaced or not torch.equal(parameter, before[n]), n
            _check_state(optimizer.state.get(parameter, {}), parameter)
    rate = optimizer.param_groups[-1]["lr"]
    scheduler.step()
    assert optimizer.param_groups[-1]["lr"] == rate / 2
    _train(case, optimizer, 5)
    assert case.loss().item() < first + 0.1


def _check_state(state: dict[str, Any], parameter: Tensor) -> None:
    for key, value in _flat(state):
        if not torch.is_tensor(value) or key.startswith((".old", ".d", ".prev_flat", ".al", ".ro")):
            continue  # LBFGS keeps flat vectors of all parameters
        assert torch.isfinite(value).all(), key
        fits = value.ndim == parameter.ndim and all(
            size in (1, full) for size, full in zip(value.shape, parameter.shape, strict=True)
        )
        assert value.numel() == 1 or fits, (key, value.shape, parameter.shape)


@every_optimizer
@every_policy
def test_undo_restores_objects_and_state(name: str, policy: Any):
    case, optimizer = _trained(name, LRUCase)
    held, states = _held(optimizer), deepcopy(optimizer.state_dict()["state"])
    with ExitStack() as undo:
        rebind_optimizers([optimizer], apply_plan(case.model, case.plan(), undo), policy, undo)
    assert all(a is b for a, b in zip(_held(optimizer), held, strict=True))
    _assert_same_state(optimizer.state_dict()["state"], states)
    case.inputs = torch.randn_like(case.inputs)
    _train(case, optimizer, 2)


@every_optimizer
@every_policy
def test_undo_after_further_steps_finds_the_old_state(name: str, policy: Any):
    case, optimizer = _trained(name, LRUCase)
    saved = {
        n: deepcopy(dict(optimizer.state[p]))
        for n, p in case.model.named_parameters()
        if p in optimizer.state
    }
    with ExitStack() as undo:
        replaced = apply_plan(case.model, case.plan(), undo)
        rebind_optimizers([optimizer], replaced, policy, undo)
        _train(case, optimizer, 2)
    for n in replaced:
        if n in saved:
            parameter = case.model.get_parameter(n)
            _assert_same_state(dict(optimizer.state[parameter]), saved[n])


@every_optimizer
@every_policy
def test_optimizer_checkpoints_still_work(name: str, policy: Any):
    case, optimizer = _trained(name, LRUCase)
    rebind_optimizers([optimizer], apply_plan(case.model, case.plan()), policy)
    _train(case, optimizer)
    saved = deepcopy(optimizer.state_dict())
    twin = LRUCase()
    twin.model, twin.inputs = deepcopy(case.model), case.inputs
    resumed = _optimizer(name, twin.model)
    resumed.load_state_dict(saved)
    _train(case, optimizer)
    _train(twin, resumed)
    for a, b in zip(case.model.parameters(), twin.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", optimizers(n for n in OPTIMIZERS if n != "LBFGS"))
def test_selected_moments_are_exact(name: str):
    case, optimizer = _trained(name, SelectCase)
    before = {
        n: deepcopy(dict(optimizer.state[p]))
        for n, p in case.model.named_parameters()
        if p in optimizer.state
    }
    old = {n: p.shape for n, p in case.model.named_parameters()}
    plan = case.plan()
    rebind_optimizers([optimizer], apply_plan(case.model, plan), "transport")
    for n, edit in plan.edits.items():
        if n not in before:
            continue
        state = optimizer.state[case.model.get_parameter(n)]
        assert state.keys() == before[n].keys()
        for key, value in before[n].items():
            if torch.is_tensor(value) and value.shape == old[n] and value.ndim:
                value = value.index_select(edit.moments.dim, KEEP)
            elif torch.is_tensor(value) and value.ndim == len(old[n]) == 2:
                dim = edit.moments.dim
                value = value if value.shape[dim] == 1 else value.index_select(dim, KEEP)
            equal = (
                torch.equal(state[key], value) if torch.is_tensor(value) else state[key] == value
            )
            assert equal, (n, key)


def test_transport_by_the_identity_keeps_adams_state():
    case = LRUCase()
    case.model.double()
    case.inputs = case.inputs.double()
    optimizer = optim.Adam(case.model.parameters(), lr=0.0)
    for _ in range(4):
        case.inputs = torch.randn_like(case.inputs)
        _train(case, optimizer)
    names = ["B_re", "B_im", "C_re", "C_im"]
    before = {n: deepcopy(optimizer.state[getattr(case.model[1], n)]) for n in names}
    gain = optimizer.state[case.model[1].gamma_log]["exp_avg"].clone()
    plan = case.plan(12, "complex")
    rebind_optimizers([optimizer], apply_plan(case.model, plan), "transport")
    for n in names:
        for key in ("exp_avg", "exp_avg_sq", "step"):
            torch.testing.assert_close(
                optimizer.state[getattr(case.model[1], n)][key], before[n][key]
            )
    # The chain rule gives the gain's moment exactly while B stands still.
    torch.testing.assert_close(optimizer.state[case.model[1].gamma_log]["exp_avg"], gain)


def test_truncate_takes_leading_entries():
    case, optimizer = _trained("Adam", LRUCase)
    old = optimizer.state[case.model[1].C_re]["exp_avg"].clone()
    rebind_optimizers([optimizer], apply_plan(case.model, case.plan()), "truncate")
    assert torch.equal(optimizer.state[case.model[1].C_re]["exp_avg"], old[:, :5])


def test_reset_forgets_only_replaced_parameters():
    case, optimizer = _trained("Adam", LRUCase)
    rebind_optimizers([optimizer], apply_plan(case.model, case.plan()), "reset")
    assert case.model[1].B_re not in optimizer.state
    assert optimizer.state[case.model[0].weight]["step"] == 3


def test_refilled_moments_start_at_zero_with_twice_the_mean():
    case, optimizer = _trained("Adam", LRUCase)
    mean = optimizer.state[case.model[1].nu_log]["exp_avg_sq"].double().mean()
    rebind_optimizers([optimizer], apply_plan(case.model, case.plan()), "transport")
    state = optimizer.state[case.model[1].nu_log]
    assert not state["exp_avg"].any()
    torch.testing.assert_close(state["exp_avg_sq"].double(), (2 * mean).expand(5))


def test_centred_variance_stays_positive():
    """Carried apart, a mean square can fall below the square of the mean: then the step is NaN."""
    case = LRUCase()
    optimizer = optim.RMSprop(case.model.parameters(), 1e-6, centered=True, alpha=0.5)
    _train(case, optimizer, 30)  # nearly constant gradients: hardly any variance
    rebind_optimizers([optimizer], apply_plan(case.model, case.plan()), "transport")
    for parameter in case.model[1].parameters():
        state = optimizer.state[parameter]
        assert (state["square_avg"] >= state["grad_avg"].square() * (1 - 1e-6)).all()
    _train(case, optimizer, 2)
    assert all(torch.isfinite(p).all() for p in case.model.parameters())


def test_complex_parameters_keep_complex_moments():
    family, port = LRUFamily(), PortedLRU(2, 1, 8)
    case = Case(port, torch.randn(3, 10, 2))
    for name in ("Adam", "RMSprop centred", "SGD momentum", "Adagrad", "Adadelta"):
        optimizer = OPTIMIZERS[name](port.parameters())
        _train(case, optimizer, 2)
        order = port.state_features - 1
        reduction = balanced_truncation(family.system(port), order)
        rebind_optimizers(optimizer, apply_plan(port, family.reduction_plan(port, reduction)))
        for key, value in optimizer.state[port.B].items():
            if torch.is_tensor(value) and value.ndim:
                assert value.dtype == torch.complex64, (name, key)
        _train(case, optimizer, 2)
        assert all(torch.isfinite(p).all() for p in port.parameters()), name


def test_parameters_that_never_stepped_stay_without_state():
    case = LRUCase()
    optimizer = optim.Adam(case.model.parameters())
    case.model[1].B_im.requires_grad_(False)
    _train(case, optimizer)
    rebind_optimizers([optimizer], apply_plan(case.model, case.plan()))
    assert case.model[1].B_im not in optimizer.state
    assert any(p is case.model[1].B_im for p in _held(optimizer))
    assert not case.model[1].B_im.requires_grad
    _train(case, optimizer)


class PointKeeper(optim.SGD):
    """Keeps a point of the weights' own space for each parameter, as schedule-free ones do."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for parameter in _held(self):
            self.state[parameter].setdefault("z", parameter.detach().clone())
            self.state[parameter].setdefault("y", parameter.detach().clone())
        return loss


def test_state_that_is_not_known_is_told_of_once_for_each_optimizer():
    case = LRUCase()
    optimizer = PointKeeper(case.model.parameters(), LR)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for order in (8, 5, 3):
            _train(case, optimizer)
            assert "z" in optimizer.state[case.model[1].B_re]
            rebind_optimizers([optimizer], apply_plan(case.model, case.plan(order)))
            assert not optimizer.state.get(case.model[1].B_re)
    assert [str(w.message).partition(" is not")[0] for w in caught] == [
        "the state 'y', 'z' of PointKeeper"
    ]


@pytest.mark.parametrize("fused", [False, True])
def test_adagrad_starts_again_as_its_constructor_does(fused: bool):
    case = SelectCase()
    start = {"initial_accumulator_value": 0.1, "fused": fused}
    optimizer = optim.Adagrad([{"params": case.model.parameters(), **start}], LR)
    _train(case, optimizer)
    rebind_optimizers([optimizer], apply_plan(case.model, case.plan()), "reset")
    weight = case.model[0].weight
    _assert_same_state(optimizer.state[weight], optim.Adagrad([weight], **start).state[weight])
    assert optimizer.state[weight]["sum"].eq(0.1).all()
    _train(case, optimizer)
    assert optimizer.state[weight]["step"] == 1


def test_several_optimizers_each_keep_their_parameters():
    case = LRUCase()
    lru = list(case.model[1].parameters())
    rest = [*case.model[0].parameters(), *case.model[2].parameters()]
    first, second = optim.Adam(lru[:4]), optim.SGD([*lru[4:], *rest], LR, momentum=0.9)
    for optimizer in (first, second):
        _train(case, optimizer)
    rebind_optimizers([first, second], apply_plan(case.model, case.plan()))
    lru = list(case.model[1].parameters())
    assert {id(p) for p in _held(first)} == {id(p) for p in lru[:4]}
    assert {id(p) for p in _held(second)} == {id(p) for p in [*lru[4:], *rest]}
    for optimizer in (first, second):
        _train(case, optimizer)


def test_an_optimizer_of_other_parameters_is_left_alone():
    case = LRUCase()
    other = nn.Linear(2, 2)
    optimizers = [optim.Adam(other.parameters()), optim.LBFGS(other.parameters())]
    other(torch.ones(1, 2)).sum().backward()
    optimizers[0].step()
    before = [deepcopy(o.state_dict()) for o in optimizers]
    rebind_optimizers(optimizers, apply_plan(case.model, case.plan()))
    for optimizer, expected in zip(optimizers, before, strict=True):
        _assert_same_state(optimizer.state_dict()["state"], expected["state"])


def test_one_optimizer_needs_no_list():
    case, optimizer = _trained("Adam", LRUCase)
    rebind_optimizers(optimizer, apply_plan(case.model, case.plan()))
    assert any(p is case.model[1].C_re for p in _held(optimizer))


# -- refusals ------------------------------------------------------------------------------------


class ZeroRedundancyOptimizer(optim.SGD):
    """Refused by its name: the real one needs a process group."""


class Hoarder(optim.SGD):
    """Remembers its parameters outside of `param_groups`."""

    def __init__(self, params: Any, how: Callable[[list[Tensor]], Any] = list) -> None:
        params = list(params)
        super().__init__(params, lr=LR)
        self.mine = how(params)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: ZeroRedundancyOptimizer(p, lr=LR), "ZeroRedundancyOptimizer shards"),
        (Hoarder, "Hoarder keeps its own references to parameters in .'mine'."),
        (lambda p: Hoarder(p, lambda ps: ps[0]), "mine"),
        (lambda p: Hoarder(p, lambda ps: {"a": ps[0]}), "mine"),
        (lambda p: Hoarder(p, lambda ps: {ps[0]: 1}), "mine"),
        (lambda p: Hoarder(p, lambda ps: optim.Adam(ps)), "mine"),
        (lambda p: Hoarder(p, lambda ps: {id(q): torch.zeros_like(q) for q in ps}), "mine"),
        (lambda p: Hoarder(p, lambda ps: {id(ps[0])}), "mine"),
        (lambda p: "adam", "expected torch.optim.Optimizer objects, got str"),
        (lambda p: optim.lr_scheduler.StepLR(optim.SGD(p, LR), 1), "got StepLR"),
    ],
)
def test_optimizers_that_can_not_follow_are_refused(make: Any, message: str):
    case = LRUCase()
    good = optim.Adam(case.model.parameters())
    _train(case, good)
    bad = make(case.model.parameters())
    replaced = apply_plan(case.model, case.plan())
    held, states = _held(good), deepcopy(good.state_dict()["state"])
    with pytest.raises(UnsupportedOptimizerError, match=message):
        rebind_optimizers([good, bad], replaced)
    assert all(a is b for a, b in zip(_held(good), held, strict=True))
    _assert_same_state(good.state_dict()["state"], states)


def test_the_real_sharded_optimizer_is_refused(tmp_path: Path):
    from torch import distributed as dist
    from torch.distributed.optim import ZeroRedundancyOptimizer as Real

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        optimizer = Real(nn.Linear(2, 2).parameters(), optimizer_class=optim.Adam, lr=LR)
        with pytest.raises(UnsupportedOptimizerError, match="Use a plain optimizer with DDP"):
            check_optimizer(optimizer)
    finally:
        dist.destroy_process_group()


def test_a_failure_in_the_second_optimizer_restores_the_first(monkeypatch: pytest.MonkeyPatch):
    case = LRUCase()
    first, second = (optim.Adam(case.model.parameters()) for _ in range(2))
    _train(case, first)
    held, states = _held(first), deepcopy(first.state_dict()["state"])
    replaced = apply_plan(case.model, case.plan())

    class Full(dict):  # type: ignore[type-arg]
        def pop(self, *_: Any) -> Any:
            raise MemoryError("no room")

    second.state = Full(second.state)
    with pytest.raises(MemoryError):
        rebind_optimizers([first, second], replaced)
    assert all(a is b for a, b in zip(_held(first), held, strict=True))
    _assert_same_state(first.state_dict()["state"], states)


# -- pending gradients ---------------------------------------------------------------------------


def test_selected_gradients_are_carried():
    case = SelectCase()
    case.loss().backward()
    old = case.model[2].weight.grad.clone()
    replaced = apply_plan(case.model, case.plan())
    assert case.model[2].weight.grad is None
    carry_gradients(replaced)
    assert torch.equal(case.model[2].weight.grad, old[:, KEEP])


def test_without_gradients_none_are_made():
    case = SelectCase()
    carry_gradients(apply_plan(case.model, case.plan()))
    assert all(p.grad is None for p in case.model.parameters())
