"""Selective layers from the analysis to the changed model, on the families' example blocks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compressm import compress, hankel_spectra
from lightning_compressm.errors import CalibrationError, NonFiniteError
from lightning_compressm.families import SelectiveFamily, registered_families
from lightning_compressm.model.layers import find_ssm_layers
from lightning_compressm.reduction.decision import Decision
from lightning_compressm.reduction.order import Order
from lightning_compressm.reduction.processes import Processes
from lightning_compressm.reduction.recorder import CallRecorder, Seen
from lightning_compressm.reduction.selective import _tries
from tests.deciding import decided

FAMILIES = {n: f for n, f in registered_families().items() if isinstance(f, SelectiveFamily)}


@pytest.fixture(params=FAMILIES.values(), ids=FAMILIES)
def family(request: pytest.FixtureRequest) -> SelectiveFamily:
    found: SelectiveFamily = request.param
    return found


def _run(layer: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        output: Tensor = layer(inputs)
    return output


def _relative(output: Tensor, wanted: Tensor) -> float:
    return float((output - wanted).norm() / wanted.norm())


def _seen(layer: nn.Module, inputs: Tensor) -> Seen:
    with torch.no_grad(), CallRecorder(find_ssm_layers(layer)) as recorder:
        layer(inputs)
    return recorder.seen


def _state(layer: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in layer.state_dict().items()}


def _same(a: Decision, b: Decision, **tolerance: float) -> None:
    assert a.plan.edits.keys() == b.plan.edits.keys()
    assert dict(a.plan.attributes) == dict(b.plan.attributes)
    for name, edit in a.plan.edits.items():
        torch.testing.assert_close(edit.value, b.plan.edits[name].value, **tolerance)


# -- what a cut does ----------------------------------------------------------------------------


def test_the_event_tells_the_output_error_as_it_is_afterwards(family: SelectiveFamily):
    layer, inputs = family.example()
    before = _run(layer, inputs)
    event = compress(layer, state_dim=4, sample=inputs, max_output_error=None).events[0]
    assert (event.action, event.old_state_dim, event.new_state_dim) == ("reduce", 8, 4)
    assert event.error_bound is None
    assert event.output_error == pytest.approx(_relative(_run(layer, inputs), before), rel=1e-3)


def test_the_refit_helps_on_other_data_of_the_same_kind(family: SelectiveFamily):
    original, _ = family.example()
    calibration, fresh = torch.randn(16, 64, 8), torch.randn(16, 64, 8)
    wanted, errors = _run(original, fresh), {}
    for refit in (True, False):
        layer = deepcopy(original)
        options: dict[str, Any] = {"refit": refit, "max_output_error": None}
        compress(layer, state_dim=3, sample=calibration, **options)
        errors[refit] = _relative(_run(layer, fresh), wanted)
    assert errors[True] < errors[False]


def test_greedy_is_the_automatic_criterion(family: SelectiveFamily):
    original, inputs = family.example()
    tables = []
    for criterion in ("auto", "greedy"):
        layer = deepcopy(original)
        report = compress(
            layer, state_dim=4, sample=inputs, criterion=criterion, max_output_error=None
        )
        assert report.events[0].balance == "greedy"
        tables.append(_state(layer))
    assert all(torch.equal(value, tables[1][name]) for name, value in tables[0].items())


@pytest.mark.parametrize("criterion", ["averaged_lti", "empirical", "greedy", "smallest", "random"])
def test_each_criterion_is_named_in_the_event(criterion: str):
    layer, inputs = FAMILIES["Mamba"].example()
    report = compress(layer, state_dim=4, sample=inputs, criterion=criterion, max_output_error=None)
    assert report.events[0].balance == criterion


@pytest.mark.parametrize("selection", ["smallest", "random"])
def test_the_ablations_are_worse(selection: Any):
    original, inputs = FAMILIES["Mamba"].example()
    with torch.no_grad():
        original.x_proj.weight[-8:] *= torch.tensor([1, 0.01] * 4).unsqueeze(1)
    errors = {}
    for chosen in ("largest", selection):
        report = compress(
            deepcopy(original),
            state_dim=4,
            sample=inputs,
            selection=chosen,
            refit=False,
            max_output_error=None,
        )
        errors[chosen] = report.events[0].output_error or 0.0
    assert errors["largest"] < 0.1 * errors[selection]


def test_tolerance_keeps_the_promised_energy(family: SelectiveFamily):
    layer, inputs = family.example()
    sigma = hankel_spectra(layer, sample=inputs)[""]
    assert sigma.shape == (8,)
    assert bool((sigma.diff() <= 0).all())
    event = compress(layer, 0.1, sample=inputs, max_output_error=None).events[0]
    kept = sigma.cumsum(0) / sigma.sum()
    assert event.new_state_dim == int((kept < 0.9).sum()) + 1
    assert event.energy_kept == pytest.approx(float(kept[event.new_state_dim - 1]))


def test_step_counts_and_moments_follow_exactly(family: SelectiveFamily):
    layer, inputs = family.example()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        layer(inputs).square().mean().backward()
        optimizer.step()
    old = {n: optimizer.state[p]["exp_avg"].clone() for n, p in layer.named_parameters()}
    twin = deepcopy(layer)
    decision = decided(twin, _seen(twin, inputs), state_dim=4, max_output_error=None)
    compress(layer, state_dim=4, sample=inputs, max_output_error=None, optimizers=[optimizer])
    for name, parameter in layer.named_parameters():
        state = optimizer.state[parameter]
        assert float(state["step"]) == 3
        wanted = old[name]
        if name in decision.plan.edits:
            rule: Any = decision.plan.edits[name].moments
            if rule.index.ndim == 1:
                wanted = wanted.index_select(rule.dim, rule.index)
            else:
                rows = zip(wanted, rule.index, strict=True)
                wanted = torch.stack([w.index_select(rule.dim - 1, i) for w, i in rows])
        assert torch.equal(state["exp_avg"], wanted), name


# -- how far a cut may go -----------------------------------------------------------------------


def test_a_cut_that_changes_too_much_takes_more_states_and_says_so(family: SelectiveFamily):
    original, inputs = family.example()
    options: dict[str, Any] = {"sample": inputs, "refit": False}
    far, near = (
        compress(deepcopy(original), state_dim=n, max_output_error=None, **options).events[0]
        for n in (1, 7)
    )
    assert far.output_error
    assert near.output_error
    assert near.output_error < far.output_error
    limit = (near.output_error + far.output_error) / 2
    event = compress(original, state_dim=1, max_output_error=limit, **options).events[0]
    assert event.action == "reduce"
    assert 1 < event.new_state_dim < 8
    assert event.output_error
    assert event.output_error <= limit
    assert event.reason == f"1 states change the output by more than {limit:.0%}"


def test_a_cut_that_always_changes_too_much_is_refused(family: SelectiveFamily):
    layer, inputs = family.example()
    before = _state(layer)
    report = compress(layer, state_dim=1, sample=inputs, refit=False, max_output_error=1e-9)
    event = report.events[0]
    assert (event.action, event.new_state_dim) == ("skip", 8)
    assert "max_output_error" in event.reason
    assert all(torch.equal(value, before[name]) for name, value in _state(layer).items())


def test_a_layer_that_is_not_heard_yet_loses_no_energy(family: SelectiveFamily):
    layer, inputs = family.example()
    nn.init.zeros_(layer.out_proj.weight)
    event = compress(layer, state_dim=4, sample=inputs).events[0]
    assert (event.action, event.new_state_dim) == ("reduce", 4)
    assert (event.energy_kept, event.output_error) == (1.0, 0.0)


def test_states_that_are_all_needed_stay(family: SelectiveFamily):
    layer, inputs = family.example()
    event = compress(layer, state_dim=8, sample=inputs).events[0]
    assert (event.action, event.reason) == ("skip", "8 or more of 8 states are needed")


@pytest.mark.parametrize("round_to", [2, 4])
def test_more_states_are_a_multiple_too(round_to: int):
    layer, inputs = FAMILIES["Mamba"].example(16)
    options: dict[str, Any] = {"sample": inputs, "refit": False, "round_to": round_to}
    near = compress(deepcopy(layer), state_dim=12, max_output_error=None, **options).events[0]
    event = compress(layer, state_dim=1, max_output_error=near.output_error, **options).events[0]
    assert event.action == "reduce"
    assert event.new_state_dim % round_to == 0
    assert round_to < event.new_state_dim < 16


def test_one_dimension_for_all_layers_of_a_family():
    example = FAMILIES["Mamba"].example
    model = nn.Sequential(example(8)[0], example(16)[0])
    inputs = torch.randn(4, 20, 8)
    with torch.no_grad():
        model[1].x_proj.weight[-14:] *= 1e-4
    own = compress(deepcopy(model), 0.1, sample=inputs, max_output_error=None).events
    assert own[0].new_state_dim > own[1].new_state_dim
    shared = compress(model, 0.1, sample=inputs, max_output_error=None, share_state_dim=True).events
    assert {event.new_state_dim for event in shared} == {own[0].new_state_dim}


# -- calibration data ---------------------------------------------------------------------------


def test_without_data_the_layer_is_named(family: SelectiveFamily):
    model = nn.Sequential(nn.Identity(), family.example()[0])
    for ask in (compress, hankel_spectra):
        with pytest.raises(
            CalibrationError, match=r"expected calibration data[^\0]*\nlayer '1' \("
        ):
            ask(model)


@pytest.mark.parametrize("where", ["parameter", "data"])
def test_nan_is_refused_and_the_layer_named(family: SelectiveFamily, where: str):
    layer, inputs = family.example()
    model = nn.Sequential(layer)
    if where == "data":
        inputs[0, 3, 0] = torch.nan
    else:
        with torch.no_grad():
            rates = layer.A_log if hasattr(layer, "A_log") else layer.slope_rate
            rates.view(-1)[0] = torch.nan
    if where == "parameter" and "A_log" not in family.state_axes(layer):
        where = "data"  # found in the statistics
    before = _state(model)
    message = "calibration statistics" if where == "data" else "finite 'A_log'"
    with pytest.raises(NonFiniteError, match=rf"{message}[^\0]*\nlayer '0' "):
        compress(model, state_dim=4, sample=inputs)
    for name, value in _state(model).items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)


def test_several_batches_count_like_one(family: SelectiveFamily):
    original, _ = family.example()
    inputs = torch.randn(6, 20, 8)
    layers, samples = [deepcopy(original) for _ in range(2)], (inputs, [inputs[:2], inputs[2:]])
    for layer, sample in zip(layers, samples, strict=True):
        compress(layer, state_dim=4, sample=sample, max_output_error=None, refit=False)
    whole, parts = (_state(layer) for layer in layers)
    spectra = [hankel_spectra(original, sample=s)[""] for s in (inputs, [inputs[:2], inputs[2:]])]
    torch.testing.assert_close(*spectra, rtol=1e-6, atol=1e-9)
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    # All batches count, not only one of them.
    short = hankel_spectra(original, sample=inputs[:2])[""]
    assert not torch.allclose(short, spectra[0], rtol=1e-4)


def test_a_layer_in_half_precision_stays_so(family: SelectiveFamily):
    layer, inputs = family.example()
    layer = layer.bfloat16()
    event = compress(layer, state_dim=4, sample=inputs.bfloat16(), max_output_error=None).events[0]
    assert event.action == "reduce"
    assert {value.dtype for value in layer.state_dict().values()} == {torch.bfloat16}
    output = _run(layer, inputs.bfloat16())
    assert output.dtype == torch.bfloat16
    assert bool(torch.isfinite(output).all())


def test_a_layer_in_double_precision_stays_so(family: SelectiveFamily):
    layer, inputs = family.example()
    layer = layer.double()
    compress(layer, state_dim=4, sample=inputs.double(), max_output_error=None)
    assert {value.dtype for value in layer.state_dict().values()} == {torch.float64}


def test_the_same_call_gives_the_same_model(family: SelectiveFamily):
    original, inputs = family.example()
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        layer = deepcopy(original)
        compress(layer, state_dim=4, sample=inputs, max_output_error=None)
        results.append(_state(layer))
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


def test_a_decision_changes_nothing(family: SelectiveFamily):
    layer, inputs = family.example()
    layer.train()
    before, flags = _state(layer), [p.requires_grad for p in layer.parameters()]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    decided(layer, _seen(layer, inputs), state_dim=4, max_output_error=None)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(value, before[name]) for name, value in _state(layer).items())
    assert [p.requires_grad for p in layer.parameters()] == flags
    assert all(p.grad is None for p in layer.parameters())
    assert layer.training


# -- several processes --------------------------------------------------------------------------


class Meeting:
    """What two threads hand to each other, as two processes would."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(2, timeout=60)
        self.slots: list[Any] = [None, None]

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self.slots[rank] = value
        self.barrier.wait()
        values = list(self.slots)
        self.barrier.wait()
        return values


class Rank(Processes):
    """One of two processes that decide together."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self.meeting, self.rank = meeting, rank

    def add_up(self, total: Tensor) -> Tensor:
        first, second = self.meeting.exchange(self.rank, total)
        result: Tensor = first + second
        return result

    def agree(self, value: Any) -> Any:
        return self.meeting.exchange(self.rank, value)[0]


def _together(work: Callable[[Rank], Decision]) -> list[Decision]:
    meeting, results = Meeting(), {}
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = work(Rank(meeting, rank))
        except BaseException as error:
            errors.append(error)
            meeting.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [results[0], results[1]]


@pytest.mark.parametrize("refit", [True, False])
def test_two_halves_give_the_plan_of_the_whole_batch(family: SelectiveFamily, refit: bool):
    layer, _ = family.example()
    layer = layer.double()
    inputs = torch.randn(4, 20, 8, dtype=torch.float64)
    choices: dict[str, Any] = {"state_dim": 4, "max_output_error": None, "refit": refit}

    def work(rank: Rank) -> Decision:
        own = deepcopy(layer)
        return decided(own, _seen(own, inputs.chunk(2)[rank.rank]), rank, **choices)

    first, second = _together(work)
    _same(first, second, rtol=0, atol=0)
    whole = decided(layer, _seen(layer, inputs), **choices)
    # Adam divides by gradients' sizes, which enlarges differences in the last digit.
    _same(first, whole, rtol=1e-5, atol=1e-6)
    assert first.events[0].output_error == pytest.approx(whole.events[0].output_error, rel=1e-5)


@pytest.mark.parametrize(
    ("wanted", "most", "tried"),
    [(48, 60, [48, 56]), (8, 40, [8, 24, 32, 40]), (5, 5, [5]), (6, 5, [])],
)
def test_retries_keep_to_multiples(wanted: int, most: int, tried: list[int]) -> None:
    assert list(_tries(Order(present=64, wanted=wanted, most=most, step=8))) == tried
