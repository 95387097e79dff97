"""What loggers are shown of reductions and of measured spectra."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_compressm.callbacks import _lightning as pl
from lightning_compressm.callbacks._loggers import Figures, Gallery
from lightning_compressm.plot import (
    plot_before_after,
    plot_spectra,
    plot_spectra_over_training,
    plot_state_dims,
)
from lightning_compressm.reduction.decision import Decision

__all__ = ["ReductionPictures", "SpectrumPictures"]

MOST_LAYERS = 12  # with a figure of their own; each takes about a tenth of a second


class ReductionPictures:
    """What looks have found and changed.

    Args:
        gallery: where figures go.
        prefix: of their tags.
    """

    def __init__(self, gallery: Gallery, prefix: str) -> None:
        self.gallery, self.prefix = gallery, prefix
        self._looks: list[dict[str, Any]] = []

    def show(
        self, trainer: pl.Trainer, decision: Decision, history: Sequence[Mapping[str, Any]]
    ) -> None:
        """Show a decision that has changed something, after it was carried out."""
        if all(event.action == "skip" for event in decision.events):
            return
        step = decision.events[0].step
        kept = {event.layer: event.new_state_dim for event in decision.events}
        if decision.spectra:  # a rollback has none
            self._looks.append({"step": step, "spectra": decision.spectra, "kept": kept})

        def draw() -> dict[str, Any]:
            figures = dict(_spectra(self.prefix, decision.spectra, kept))
            if len(self._looks) > 1:
                over = plot_spectra_over_training(self._looks)
                figures[f"{self.prefix}/spectra_over_training"] = over
            figures[f"{self.prefix}/state_dims"] = plot_state_dims(history, trainer.global_step)
            figures[f"{self.prefix}/before_after"] = plot_before_after(history)
            return figures

        values = _log_values(self.prefix, decision.spectra)
        self.gallery.show(trainer, step, draw, values)


class SpectrumPictures:
    """Measured spectra.

    Args:
        gallery: where figures go.
        prefix: of their tags.
    """

    def __init__(self, gallery: Gallery, prefix: str) -> None:
        self.gallery, self.prefix = gallery, prefix

    def show(
        self, trainer: pl.Trainer, spectra: Mapping[str, Tensor], kept: Mapping[str, int]
    ) -> None:
        """Show one measurement, and which states a reduction would keep."""
        self.gallery.show(
            trainer,
            trainer.global_step,
            lambda: _spectra(self.prefix, spectra, kept),
            _log_values(self.prefix, spectra),
        )

    def show_history(self, trainer: pl.Trainer, history: Sequence[Mapping[str, Any]]) -> None:
        """Show the spectra of several measurements together."""
        if len(history) < 2:
            return
        tag = f"{self.prefix}/spectra_over_training"
        draw = lambda: {tag: plot_spectra_over_training(history)}  # noqa: E731
        self.gallery.show(trainer, trainer.global_step, draw, {})


def _spectra(prefix: str, spectra: Mapping[str, Tensor], kept: Mapping[str, int]) -> Figures:
    """A figure for each layer, or where there are too many one for all of them."""
    if len(spectra) > MOST_LAYERS:
        return {f"{prefix}/spectra": plot_spectra(spectra, kept)}
    return {
        f"{prefix}/spectrum/{name or 'model'}": plot_spectra({name: sigma}, kept)
        for name, sigma in spectra.items()
    }


def _log_values(prefix: str, spectra: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Decimal logarithms of HSVs, for histograms; zeros have none and are left out."""
    return {
        f"{prefix}/log10_hsv/{name or 'model'}": positive.log10()
        for name, sigma in spectra.items()
        if len(positive := sigma[sigma > 0])
    }
