"""This package as it comes: the size follows from the spectrum."""

from __future__ import annotations

from typing import Any, ClassVar

import lightning as L

from benchmarks.arms._base import Arm
from benchmarks.compare.bench import Bench, TimedCompreSSM


class Defaults(Arm):
    name = "defaults"
    label = "CompreSSMCallback(0.05)"
    about = "Energy rule: each look in the first tenth may discard 5% of a layer's Hankel energy."
    place = 4
    own_size = True
    options: ClassVar[dict[str, Any]] = {"tolerance": 0.05}

    def train(self, bench: Bench, size: int | None) -> L.LightningModule:
        module = bench.fresh()
        # An epoch can be longer than the window: then there is one look, at its end.
        bench.fit(module, [TimedCompreSSM(verbose=False, **self.options)])
        return module


class DefaultsLate(Defaults):
    name = "defaults-late"
    label = "the same, 30% to 40%"
    about = "The same, but `window=(0.3, 0.4)`."
    options: ClassVar[dict[str, Any]] = {"tolerance": 0.05, "window": (0.3, 0.4)}
