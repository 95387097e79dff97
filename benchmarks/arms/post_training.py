"""Balanced truncation of the finished model."""

from __future__ import annotations

import lightning as L

from benchmarks.arms._base import AfterTraining, cut_by_compress
from benchmarks.compare.bench import Bench


class PostTraining(AfterTraining):
    name = "post-training"
    label = "post-training truncation"
    about = "`compress()` of the trained full model; no training after it (cf. arXiv 2402.15993)."
    place = 10

    def cut(self, bench: Bench, module: L.LightningModule, size: int) -> None:
        cut_by_compress(bench, module, size)


class PublishedAfterTraining(PostTraining):
    name = "post-training-published"
    label = "post-training, as published"
    about = (
        "The trained full model cut by complex balancing with infinite horizon; no training after "
        "it. Linear layers only."
    )
    place = 11
    kinds = ("linear",)

    def cut(self, bench: Bench, module: L.LightningModule, size: int) -> None:
        cut_by_compress(bench, module, size, balance="complex", horizon=None)


class InfiniteAfterTraining(PublishedAfterTraining):
    name = "post-training-infinite"
    label = "post-training, infinite horizon"
    about = "The trained full model cut by `compress()` with infinite horizon. Linear layers only."
    place = 88
    choice = True

    def cut(self, bench: Bench, module: L.LightningModule, size: int) -> None:
        cut_by_compress(bench, module, size, horizon=None)
