"""Variants of ours, by which the package's defaults are chosen. They have a suite of their own."""

from __future__ import annotations

from typing import Any, ClassVar

from benchmarks.arms._base import InTraining
from benchmarks.compare.tasks import CompareTask


class Choice(InTraining):
    """Ours with one thing changed; linear layers."""

    choice = True
    kinds = ("linear",)
    changed: ClassVar[dict[str, Any]] = {}

    def options(self, task: CompareTask) -> dict[str, Any]:
        return self.changed


class RealInfinite(Choice):
    name = "real-infinite"
    label = "real, infinite horizon"
    about = "The same with infinite-horizon Gramians."
    place = 62
    changed: ClassVar[dict[str, Any]] = {"balance": "real", "horizon": None}


class RealLimited(Choice):
    name = "real-limited"
    label = "real"
    about = "As ours, balancing the real system, whose reduced form may have real poles."
    place = 61
    changed: ClassVar[dict[str, Any]] = {"balance": "real"}


class FoldedInfinite(Choice):
    name = "folded-infinite"
    label = "infinite horizon"
    about = "As ours, with infinite-horizon Gramians."
    place = 60
    changed: ClassVar[dict[str, Any]] = {"balance": "folded", "horizon": None}


class ComplexInfinite(Choice):
    name = "complex-infinite"
    label = "complex, infinite horizon"
    about = "The published Gramians, with the optimizer's moments carried through."
    place = 63
    changed: ClassVar[dict[str, Any]] = {"balance": "complex", "horizon": None}


class Truncate(Choice):
    name = "moments-sliced"
    label = "moments sliced"
    about = "As ours, with the optimizer's moments sliced as the published code does."
    place = 70
    changed: ClassVar[dict[str, Any]] = {"optimizer_state": "truncate"}


class Reset(Choice):
    name = "moments-reset"
    label = "moments reset"
    about = "As ours, with the optimizer's moments dropped."
    place = 71
    changed: ClassVar[dict[str, Any]] = {"optimizer_state": "reset"}
