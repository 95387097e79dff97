"""Pictures of spectra and state dimensions; needs matplotlib (the ``plot`` extra)."""

from lightning_compressm.plot.dimensions import plot_before_after, plot_state_dims
from lightning_compressm.plot.spectra import plot_spectra, plot_spectra_over_training

__all__ = [
    "plot_before_after",
    "plot_spectra",
    "plot_spectra_over_training",
    "plot_state_dims",
]
