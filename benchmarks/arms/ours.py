"""This package, at the size that all arms end with."""

from __future__ import annotations

from benchmarks.arms._base import InTraining


class Ours(InTraining):
    name = "ours"
    label = "ours"
    about = (
        "One reduction after a tenth of the training to the given size (selective layers: "
        "calibrated on 8 batches, whatever the cut does to their output); else all defaults."
    )
    place = 3


class OursLate(Ours):
    name = "ours-late"
    label = "ours, after 40%"
    about = "As ours, but after two fifths of the training."
    place = 5
    share = 0.4
