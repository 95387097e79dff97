"""Cuts that a budget of loss allows: what is decided was tried before."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from lightning_compressm.reduction.analysis import Cut, Task
from lightning_compressm.surgery.plan import SurgeryPlan

__all__ = ["Trial", "affordable"]

Choice = Mapping[int, Cut]


@dataclass(frozen=True)
class Trial:
    """How reductions are tried before one of them is decided on.

    Attributes:
        loss: the loss of the model as a plan would leave it, the same number on all processes.
        budget: by how much it may rise, as a share of ``scale``, for all layers together.
        scale: the running loss of training, positive.
        floors: layer name -> states below which it is not cut now.
        task: layer name -> what the loss asks of it, by which it can be cut as well.

    Example:
        >>> Trial(lambda plan: 1.0, budget=0.02, scale=2.0).allowed
        0.04
    """

    loss: Callable[[SurgeryPlan], float]
    budget: float
    scale: float
    floors: Mapping[str, int] = field(default_factory=dict)
    task: Mapping[str, Task] = field(default_factory=dict)

    @property
    def allowed(self) -> float:
        """By how much the loss may rise, in its own unit."""
        return self.budget * self.scale


def affordable(
    options: Mapping[int, Sequence[Cut]],
    smaller: Callable[[int], Sequence[Cut]],
    loss_of: Callable[[Choice], float],
    trial: Trial,
    *,
    as_one: bool = False,
) -> dict[int, Cut]:
    """Cuts of several layers that together keep the loss within the budget.

    All layers are cut as far as wished if that is allowed. Else the budget goes to the layers whose
    cut costs least; a layer that is not cut as far is tried with a smaller cut.

    Args:
        options: number of a layer -> equally large cuts of it, of which the cheapest counts.
        smaller: gives smaller cuts of a layer, asked for only if needed.
        loss_of: the loss with some layers cut.
        trial: the budget.
        as_one: all layers are cut alike, or none.

    Returns:
        Number of a layer -> the cut that is taken, or why there is none.

    Example:
        >>> affordable({}, lambda i: [], lambda choice: 1.0, Trial(lambda plan: 1.0, 0.02, 1.0))
        {}
    """
    rises = _Rises(loss_of, trial)
    wished = {i: rises.cheapest(i, cuts) for i, cuts in options.items()}
    if rises.allow(wished):
        return rises.told(wished)
    if as_one:
        less = {i: rises.cheapest(i, cuts) for i in options if (cuts := smaller(i))}
        taken = less if len(less) == len(options) and rises.allow(less) else {}
    else:
        taken = _one_by_one(wished, smaller, rises)
    return {i: rises.refused(i, cut) for i, cut in wished.items()} | rises.told(taken)


def _one_by_one(
    wished: Choice, smaller: Callable[[int], Sequence[Cut]], rises: _Rises
) -> dict[int, Cut]:
    taken: dict[int, Cut] = {}
    for i in sorted(wished, key=lambda i: (_known(rises.of({i: wished[i]})), i)):
        if rises.allow(taken | {i: wished[i]}):
            taken[i] = wished[i]
        elif cuts := smaller(i):
            less = rises.cheapest(i, cuts)
            if rises.allow(taken | {i: less}):
                taken[i] = less
    return taken


def _known(rise: float) -> float:
    return rise if math.isfinite(rise) else math.inf


class _Rises:
    """By how much the loss rises, each choice measured once."""

    def __init__(self, loss_of: Callable[[Choice], float], trial: Trial) -> None:
        self.loss_of = loss_of
        self.trial = trial
        self.before = loss_of({})
        self._measured: dict[frozenset[Cut], float] = {}

    def of(self, choice: Choice) -> float:
        key = frozenset(choice.values())  # which keeps them: their ids could be given again
        if key not in self._measured:
            self._measured[key] = self.loss_of(choice) - self.before if choice else 0.0
        return self._measured[key]

    def allow(self, choice: Choice) -> bool:
        return self.of(choice) <= self.trial.allowed  # not if it is no number

    def cheapest(self, i: int, cuts: Sequence[Cut]) -> Cut:
        if len(cuts) == 1:
            return cuts[0]
        return min(cuts, key=lambda cut: _known(self.of({i: cut})))

    def told(self, choice: Choice) -> dict[int, Cut]:
        """The cuts that are taken, with what all of them cost."""
        change = self.of(choice) / self.trial.scale
        return {
            i: replace(cut, event=replace(cut.event, loss_change=change))
            for i, cut in choice.items()
        }

    def refused(self, i: int, cut: Cut) -> Cut:
        """What is left of a cut that costs too much."""
        change = self.of({i: cut}) / self.trial.scale
        why = (
            f"{cut.event.new_state_dim} states raise the loss by {change:.2%}, alone or with cuts "
            f"of other layers more than loss_budget = {self.trial.budget:.2%}"
        )
        return Cut(replace(cut.event.skipped(why), loss_change=change))
