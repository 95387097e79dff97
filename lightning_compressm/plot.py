"""Pictures; needs matplotlib (the ``plot`` extra)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_spectra"]


def plot_spectra(spectra: Mapping[str, Tensor], kept: Mapping[str, int] | None = None) -> Figure:
    """Hankel singular values of layers on a logarithmic axis.

    Args:
        spectra: layer name -> HSVs, shape (N,) or (systems, N), descending.
        kept: layer name -> state dimension to mark.

    Returns:
        A matplotlib figure, not shown and not saved.

    Raises:
        ImportError: without matplotlib.

    Example:
        >>> import torch
        >>> figure = plot_spectra({"lru": torch.tensor([1.0, 0.1, 0.01])}, {"lru": 2})
        >>> len(figure.axes[0].lines)
        2
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "plots need matplotlib: pip install 'lightning_compressm[plot]'"
        ) from error
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    for name, sigma in spectra.items():
        rows = sigma.detach().cpu().reshape(-1, sigma.shape[-1]).clamp(min=1e-16)
        (line,) = axes.semilogy(range(1, rows.shape[-1] + 1), rows[0], label=name or "model")
        for row in rows[1:]:
            axes.semilogy(range(1, len(row) + 1), row, color=line.get_color(), alpha=0.3)
        if kept and name in kept:
            axes.axvline(kept[name] + 0.5, color=line.get_color(), linestyle=":")
    axes.set_xlabel("state")
    axes.set_ylabel("Hankel singular value")
    if spectra:
        axes.legend()
    return figure
