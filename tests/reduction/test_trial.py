"""Which cuts a budget of loss allows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pytest

from lightning_compressm.reduction.analysis import Cut
from lightning_compressm.reduction.events import LayerEvent
from lightning_compressm.reduction.trial import Trial, affordable

TRIAL = Trial(lambda plan: 0.0, budget=0.02, scale=5.0)  # the loss may rise by 0.1


def cut(i: int, states: int) -> Cut:
    return Cut(
        LayerEvent(layer=str(i), family="LRU", old_state_dim=64, new_state_dim=states, balance="x")
    )


class Losses:
    """A loss of 3, and what each cut adds to it by its layer and states."""

    def __init__(self, rises: Mapping[tuple[int, int], float]) -> None:
        self.rises = rises
        self.asked: list[Mapping[int, Cut]] = []

    def __call__(self, choice: Mapping[int, Cut]) -> float:
        self.asked.append(choice)
        return 3 + sum(self.rises[i, one.event.new_state_dim] for i, one in choice.items())


def none(i: int) -> Sequence[Cut]:
    return []


def test_all_are_cut_by_one_measurement_where_the_sum_is_allowed() -> None:
    losses = Losses({(0, 32): 0.04, (1, 32): 0.05})
    found = affordable({i: [cut(i, 32)] for i in (0, 1)}, none, losses, TRIAL)
    assert [found[i].event.new_state_dim for i in (0, 1)] == [32, 32]
    assert found[0].event.loss_change == pytest.approx(0.09 / 5)
    assert len(losses.asked) == 2


def test_the_budget_goes_to_the_cheapest_and_the_rest_is_cut_less_or_not() -> None:
    losses = Losses({(0, 32): 0.09, (0, 48): 0.06, (1, 32): 0.03, (2, 32): 0.5, (2, 48): 0.2})
    options = {i: [cut(i, 32)] for i in (0, 1, 2)}
    found = affordable(options, lambda i: [cut(i, 48)], losses, TRIAL)
    assert [found[i].event.new_state_dim for i in (0, 1, 2)] == [48, 32, 64]
    assert found[2].event.action == "skip"
    assert "32 states raise the loss by 10.00%" in found[2].event.reason
    assert "loss_budget = 2.00%" in found[2].event.reason


def test_of_equally_large_cuts_the_cheapest_counts() -> None:
    dear, cheap = cut(0, 32), cut(0, 32)
    rises = {id(dear): 0.09, id(cheap): 0.01}
    found = affordable(
        {0: [dear, cheap]}, none, lambda c: 3 + sum(rises[id(x)] for x in c.values()), TRIAL
    )
    assert found[0].event.loss_change == pytest.approx(0.01 / 5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_no_number_allows_nothing(bad: float) -> None:
    losses = Losses({(0, 32): bad, (1, 32): 0.01})
    found = affordable({i: [cut(i, 32)] for i in (0, 1)}, none, losses, TRIAL)
    assert [found[i].event.new_state_dim for i in (0, 1)] == [64, 32]


def test_layers_that_share_a_dimension_are_cut_alike_or_not_at_all() -> None:
    losses = Losses({(0, 32): 0.01, (0, 48): 0.01, (1, 32): 0.2, (1, 48): 0.05})
    options = {i: [cut(i, 32)] for i in (0, 1)}
    found = affordable(options, lambda i: [cut(i, 48)], losses, TRIAL, as_one=True)
    assert [found[i].event.new_state_dim for i in (0, 1)] == [48, 48]
    found = affordable(options, none, losses, TRIAL, as_one=True)
    assert [found[i].event.new_state_dim for i in (0, 1)] == [64, 64]


def test_what_one_cut_costs_is_not_remembered_of_another() -> None:
    """Smaller cuts are made when they are asked for, and dropped where they are refused."""
    layers = range(20)
    rises = {(i, 32): 0.5 + i for i in layers} | {
        (i, 48): 0.005 if i % 3 == 2 else 0.3 for i in layers
    }

    def loss_of(choice: Mapping[int, Cut]) -> float:
        return 3 + sum(rises[i, one.event.new_state_dim] for i, one in choice.items())

    options = {i: [cut(i, 32)] for i in layers}
    found = affordable(options, lambda i: [cut(i, 48)], loss_of, TRIAL)
    assert [found[i].event.new_state_dim for i in layers] == [
        48 if i % 3 == 2 else 64 for i in layers
    ]
