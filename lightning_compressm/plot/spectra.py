"""Pictures of Hankel singular values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_compressm.plot._canvas import (
    DISCARDED,
    FONT,
    GREY,
    KEPT,
    log_axis,
    panels,
    short,
    spread,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_spectra", "plot_spectra_over_training"]

MOST_PANELS = 12
MOST_LINES = 8  # of one layer, at different times
_BRIGHTEST = 0.8  # of the colour map: beyond, it is too pale on white
_FLOOR = 1e-16  # of the largest value: below is rounding, and zero has no place on a log axis


def plot_spectra(spectra: Mapping[str, Tensor], kept: Mapping[str, int] | None = None) -> Figure:
    """Hankel singular values of layers on logarithmic axes, a panel for each layer.

    Of more than 12 layers 11 are drawn, evenly chosen from the first to the last, and the others in
    one panel together. A bank of systems is drawn as its median and the range of its systems.

    Args:
        spectra: layer name -> HSVs, shape (N,) or (systems, N), descending.
        kept: layer name -> state dimension that is kept; as many of the largest values are drawn
            as kept, the others as discarded.

    Returns:
        A matplotlib figure, not shown and not saved.

    Raises:
        ImportError: without matplotlib.

    Example:
        >>> import torch
        >>> figure = plot_spectra({"lru": torch.tensor([1.0, 0.1, 0.01])}, {"lru": 2})
        >>> [text.get_text() for text in figure.axes[0].texts]
        ['2 kept', '1 discarded']
    """
    kept = kept or {}
    shown, others = _chosen(list(spectra))
    figure, axes = panels(len(shown) + bool(others))
    for place, name in zip(axes, shown, strict=False):
        _spectrum(place, spectra[name], kept.get(name))
        place.set_title(short(name), fontsize=FONT + 1)
    if others:
        _others(axes[-1], {name: spectra[name] for name in others}, kept)
    _name_axes(figure)
    return figure


def plot_spectra_over_training(looks: Sequence[Mapping[str, Any]]) -> Figure:
    """Spectra of each layer at several times, from dark (first) to bright (last).

    At most 8 times are drawn, and of more than 12 layers 12, both evenly chosen from the first to
    the last. Of a bank the median over its systems is drawn.

    Args:
        looks: in order, each with ``step``, ``spectra`` as for :func:`plot_spectra`, and perhaps
            ``kept``, layer name -> state dimension: values beyond it are dotted. The ``history``
            of a :class:`~lightning_compressm.HankelMonitor` will do.

    Returns:
        A matplotlib figure, not shown and not saved.

    Raises:
        ImportError: without matplotlib.

    Example:
        >>> import torch
        >>> sigma = torch.tensor([1.0, 0.1, 0.01])
        >>> looks = [{"step": n, "spectra": {"lru": sigma / n}, "kept": {"lru": 2}} for n in (1, 9)]
        >>> [text.get_text() for text in plot_spectra_over_training(looks).axes[0].texts]
        ['step 1', 'step 9']
    """
    names = list(dict.fromkeys(name for look in looks for name in look["spectra"]))
    figure, axes = panels(min(len(names), MOST_PANELS))
    for place, name in zip(axes, spread(names, MOST_PANELS), strict=False):
        _over_training(place, name, [look for look in looks if name in look["spectra"]])
        place.set_title(short(name), fontsize=FONT + 1)
    more = len(names) - len(axes)
    if more > 0:
        figure.suptitle(f"{len(axes)} of {len(names)} layers", fontsize=FONT + 1)
    _name_axes(figure)
    return figure


def _chosen(names: list[str]) -> tuple[list[str], list[str]]:
    """Layers with a panel of their own, and those that share one."""
    if len(names) <= MOST_PANELS:
        return names, []
    shown = spread(names, MOST_PANELS - 1)
    return shown, [name for name in names if name not in shown]


def _rows(sigma: Tensor) -> Tensor:
    """Shape (systems, N), on the CPU, above zero."""
    rows = sigma.detach().cpu().double().reshape(-1, sigma.shape[-1])
    return rows.clamp(min=_FLOOR * (float(rows.max()) or 1.0))


def _spectrum(axes: Axes, sigma: Tensor, kept: int | None) -> None:
    rows = _rows(sigma)
    states, line = range(1, rows.shape[-1] + 1), rows.median(0).values
    end = len(states) if kept is None else min(kept, len(states))
    log_axis(axes)
    if len(rows) > 1:
        low, high = rows.min(0).values, rows.max(0).values
        axes.fill_between(states, low, high, color=GREY, alpha=0.25, linewidth=0)
    marker = 3.0 if len(states) <= 64 else 0.0
    axes.plot(states[:end], line[:end], "o-", color=KEPT, markersize=marker)
    if end < len(states):
        axes.plot(states[end:], line[end:], "o:", color=DISCARDED, markersize=marker, mfc="white")
    if kept is not None:
        _label(axes, line, 0, end, f"{end} kept", KEPT)
        if end < len(states):
            count = len(states) - end
            _label(axes, line, end, len(states), f"{count} discarded", DISCARDED)


def _label(axes: Axes, line: Tensor, start: int, end: int, text: str, colour: str) -> None:
    """Beside the middle of a part of a falling curve: to its upper right, or to its lower left."""
    at = (start + end - 1) // 2
    left = at < 0.5 * len(line)
    axes.annotate(
        text,
        (at + 1, float(line[at])),
        (6, 5) if left else (-6, -5),
        textcoords="offset points",
        ha="left" if left else "right",
        va="bottom" if left else "top",
        color=colour,
        fontsize=FONT,
    )


def _others(axes: Axes, spectra: Mapping[str, Tensor], kept: Mapping[str, int]) -> None:
    log_axis(axes)
    for sigma in spectra.values():
        line = _rows(sigma).median(0).values
        axes.plot(range(1, len(line) + 1), line, color=GREY, alpha=0.4, linewidth=0.8)
    axes.set_title(f"{len(spectra)} other layers", fontsize=FONT + 1)
    if dims := [kept[name] for name in spectra if name in kept]:
        text = f"{min(dims)} to {max(dims)} kept" if min(dims) < max(dims) else f"{dims[0]} kept"
        axes.text(0.97, 0.95, text, transform=axes.transAxes, ha="right", va="top",
                  color=KEPT, fontsize=FONT)  # fmt: skip


def _over_training(axes: Axes, name: str, looks: Sequence[Mapping[str, Any]]) -> None:
    from matplotlib import colormaps

    log_axis(axes)
    shown = spread(looks, MOST_LINES)
    for i, look in enumerate(shown):
        line = _rows(look["spectra"][name]).median(0).values
        end = min(look.get("kept", {}).get(name, len(line)), len(line))
        colour = colormaps["viridis"](_BRIGHTEST * i / max(len(shown) - 1, 1))
        axes.plot(range(1, end + 1), line[:end], color=colour)
        axes.plot(range(max(end, 1), len(line) + 1), line[max(end, 1) - 1 :], ":", color=colour)
        if i in (0, len(shown) - 1):  # falling curves leave the upper right free
            height = 0.97 if i == 0 else 0.87
            axes.text(0.97, height, f"step {look['step']}", transform=axes.transAxes, ha="right",
                      va="top", color=colour, fontsize=FONT)  # fmt: skip


def _name_axes(figure: Figure) -> None:
    figure.supxlabel("state", fontsize=FONT + 1)
    figure.supylabel("Hankel singular value", fontsize=FONT + 1)
