"""Pictures: what is in them, and that it can be read where there are many layers."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

from lightning_compressm.plot import (
    plot_before_after,
    plot_spectra,
    plot_spectra_over_training,
    plot_state_dims,
)

NAMES = [f"backbone.layers.{i}.mixer.ssm" for i in range(64)]
SPECTRA = {name: torch.exp(-0.01 * (10 + i) * torch.arange(40)) for i, name in enumerate(NAMES)}
KEPT = {name: (5, 20, 40)[i % 3] for i, name in enumerate(NAMES)}


def event(layer: str, step: int, old: int, new: int) -> dict[str, Any]:
    return {"layer": layer, "step": step, "old_state_dim": old, "new_state_dim": new}


def history(layers: int, ways: int = 64) -> list[dict[str, Any]]:
    """Two cuts of each layer; so many different ways to go."""
    first = [event(name, 100, 128, 64 - i % ways) for i, name in enumerate(NAMES[:layers])]
    return [*first, *(event(e["layer"], 200, e["new_state_dim"], 8) for e in first[::2])]


def ticks_of(axes: Any) -> list[Any]:
    """Labels of the y axis that are drawn: there are others beyond its ends."""
    low, high = sorted(axes.get_ylim())
    found = zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)
    return [label for place, label in found if low <= place <= high]


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


# -- what is drawn -------------------------------------------------------------------------------


def test_kept_and_discarded_values_are_lines_of_their_own() -> None:
    (axes,) = plot_spectra({"lru": torch.tensor([1.0, 0.5, 0.1, 0.0])}, {"lru": 2}).axes
    kept, discarded = axes.lines
    assert list(kept.get_ydata()) == [1.0, 0.5]
    assert list(discarded.get_xdata()) == [3, 4]
    assert list(discarded.get_ydata()) == pytest.approx([0.1, 1e-16])  # zero at the floor
    assert kept.get_color() != discarded.get_color()
    assert kept.get_linestyle() != discarded.get_linestyle()
    assert axes.get_yscale() == "log"


def test_a_bank_is_drawn_as_its_median_and_range() -> None:
    bank = torch.tensor([[3.0, 0.3], [2.0, 0.2], [8.0, 0.1]])
    (axes,) = plot_spectra({"": bank}).axes
    assert list(axes.lines[0].get_ydata()) == pytest.approx([3.0, 0.2])
    corners = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert [corners.min(), corners.max()] == pytest.approx([0.1, 8.0])
    assert axes.get_title() == "model"


def test_a_measurement_is_a_line_and_the_first_and_last_are_named() -> None:
    looks = [{"step": n, "spectra": {"lru": torch.tensor([n, 0.1])}} for n in range(1, 30)]
    looks[-1]["kept"] = {"lru": 1}
    (axes,) = plot_spectra_over_training(looks).axes
    assert texts(axes.figure) == ["step 1", "step 29"]
    solid, dotted = axes.lines[::2], axes.lines[1::2]
    assert [line.get_ydata()[0] for line in solid] == [1, 5, 9, 13, 17, 21, 25, 29]
    assert len(solid[-1].get_xdata()) == 1  # the rest is dotted
    assert list(dotted[-1].get_xdata()) == [1, 2]


def test_state_dims_step_where_layers_were_cut() -> None:
    events = [event("a", 10, 8, 4), event("b", 10, 8, 8), event("c", 10, 8, 4),
              event("b", 30, 8, 2)]  # fmt: skip
    figure = plot_state_dims(events, until=50)
    together, alone = figure.axes[0].lines  # a and c go the same way
    assert [list(together.get_xdata()), list(together.get_ydata())] == [[0, 10, 50], [8, 4, 4]]
    assert [list(alone.get_xdata()), list(alone.get_ydata())] == [[0, 30, 50], [8, 2, 2]]
    assert sorted(texts(figure)) == ["a, c: 4", "b: 2"]


def test_a_rollback_is_drawn_as_a_way_back() -> None:
    (line,) = plot_state_dims([event("a", 10, 8, 4), event("a", 20, 4, 8)]).axes[0].lines
    assert list(line.get_ydata()) == [8, 4, 8, 8]


def test_bars_are_of_the_first_and_the_last_dimension() -> None:
    figure = plot_before_after(history(3))
    widths = [bar.get_width() for bar in figure.axes[0].patches]
    assert widths == [128, 128, 128, 8, 63, 8]
    assert texts(figure) == ["128 → 8", "128 → 63", "128 → 8"]


@pytest.mark.parametrize(
    ("draw", "nothing"),
    [(plot_spectra, {}), (plot_spectra_over_training, []), (plot_state_dims, []),
     (plot_before_after, [])],
)  # fmt: skip
def test_a_picture_of_nothing(draw: Any, nothing: Any) -> None:
    draw(nothing).draw_without_rendering()


# -- many layers ---------------------------------------------------------------------------------

MANY = {
    "spectra": lambda: plot_spectra(SPECTRA, KEPT),
    "over training": lambda: plot_spectra_over_training(
        [{"step": n, "spectra": SPECTRA, "kept": KEPT} for n in (100, 200)]
    ),
    "state dims": lambda: plot_state_dims(history(64), 1000),
    "state dims, alike": lambda: plot_state_dims(history(64, ways=3), 1000),
    "before and after": lambda: plot_before_after(history(64)),
}


@pytest.mark.parametrize("draw", MANY.values(), ids=MANY)
def test_sixty_four_layers_are_readable(draw: Any) -> None:
    """No text covers another one, leaves the picture, or is smaller than 8 points."""
    figure = draw()
    figure.draw_without_rendering()
    assert len(figure.axes) <= 12
    words = [w for axes in figure.axes for w in [*axes.texts, axes.title, *ticks_of(axes)]]
    words = [w for w in words if w.get_text()]
    boxes = {w: w.get_window_extent() for w in words}
    assert all(w.get_fontsize() >= 8 for w in words)
    width, height = figure.bbox.size
    assert width <= 900
    corners = [corner for box in boxes.values() for corner in box.get_points()]
    assert all(-1 <= x <= width + 1 for x, _ in corners)
    assert all(-1 <= y <= height + 1 for _, y in corners)
    overlapping = [
        (a.get_text(), b.get_text())
        for a, b in combinations(words, 2)
        if boxes[a].overlaps(boxes[b])
    ]
    assert not overlapping


def test_layers_without_a_panel_are_summed_up() -> None:
    rest = plot_spectra(SPECTRA, KEPT).axes[-1]
    assert (len(rest.lines), rest.get_title()) == (53, "53 other layers")
    assert rest.texts[0].get_text() == "5 to 40 kept"
    bars = plot_before_after(history(64))
    assert bars.axes[0].get_yticklabels()[-1].get_text() == "mean of 41 others"
    assert len(bars.axes[0].patches) == 2 * 24
    assert "median: 8" in texts(plot_state_dims(history(64)))
