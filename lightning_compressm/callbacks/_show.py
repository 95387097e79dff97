"""What a user sees while a run is reduced: on rank 0, above the progress bar."""

from __future__ import annotations

import io
import shutil
import statistics
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from torch import nn

from lightning_compressm.callbacks import _lightning as pl
from lightning_compressm.reduction.events import LayerEvent, format_states, format_table

__all__ = ["StepClock", "count_parameters", "show_events", "show_summary"]

_KEPT = 500  # batches that a median is taken of


class StepClock:
    """Times of batches before the first cut of a fit and after its last one, in seconds."""

    def __init__(self, parameters: int = 0) -> None:
        self.parameters = parameters
        self.before: deque[float] = deque(maxlen=_KEPT)
        self.after: deque[float] = deque(maxlen=_KEPT)
        self._current = self.before
        self._last: float | None = None

    def tick(self) -> None:
        """At the end of every batch."""
        now = time.perf_counter()
        if self._last is not None:
            self._current.append(now - self._last)
        self._last = now

    def pause(self) -> None:
        """What comes before the end of the next batch is no batch alone."""
        self._last = None

    def cut(self) -> None:
        """The model has another size from here on."""
        self._current = self.after
        self.after.clear()
        self.pause()


def show_events(trainer: pl.Trainer, events: Sequence[LayerEvent]) -> None:
    """A table of what one look has done."""
    title = f"CompreSSM after step {events[0].step}"
    if find_spec("rich") is None:
        _say(trainer, f"{title}:\n{format_table(events)}")
    else:
        _say(trainer, _rich_table(title, events))


def _rich_table(title: str, events: Iterable[LayerEvent]) -> str:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=SIMPLE)
    for name in ("layer", "states", "energy kept", "loss", "seconds", "note"):
        table.add_column(name, justify="left" if name in ("layer", "note") else "right")
    for event in events:
        table.add_row(*_cells(event))
    text = io.StringIO()
    Console(file=text, width=shutil.get_terminal_size((100, 24)).columns).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().strip("\n").splitlines())


def show_summary(
    trainer: pl.Trainer, clock: StepClock, history: Iterable[Mapping[str, Any]], model: nn.Module
) -> None:
    """What the reductions of a run have saved, if there were any."""
    events = list(history)
    reduced = [event for event in events if event["action"] == "reduce"]
    if not reduced:
        return
    first = {e["layer"]: e["old_state_dim"] for e in reversed(reduced)}
    last = {e["layer"]: e["new_state_dim"] for e in events if e["layer"] in first}
    seconds = sum(event["seconds"] for event in events)
    states = f"{sum(first.values())} -> {sum(last.values())} states"
    layers = f"{len(first)} layer{'' if len(first) == 1 else 's'}"
    parameters = f"{clock.parameters:,} -> {count_parameters(model):,} parameters"
    lines = [f"CompreSSM: {states} in {layers}, {parameters}"]
    if clock.before and clock.after:
        before, after = statistics.median(clock.before), statistics.median(clock.after)
        lines.append(
            f"  a batch took {1e3 * before:.3g} ms before the first cut and {1e3 * after:.3g} ms "
            f"after the last one: {before / after:.2f} times as fast (medians)"
        )
    lines.append(f"  looks and swaps took {seconds:.3g} s in all")
    lines.append(f"  history: callback.history{_saved(trainer)}")
    _say(trainer, "\n".join(lines))


def _saved(trainer: pl.Trainer) -> str:
    folder = getattr(trainer.checkpoint_callback, "dirpath", None)
    return f", and every checkpoint in {folder} (compressm inspect)" if folder else ""


def _cells(event: LayerEvent) -> tuple[str, ...]:
    return (
        event.layer or "(model)",
        format_states(event.old_state_dim, event.new_state_dim),
        f"{event.energy_kept:.1%}",
        "" if event.loss_change is None else f"{event.loss_change:+.2%}",
        f"{event.seconds:.2g}",
        event.reason,
    )


def _say(trainer: pl.Trainer, text: str) -> None:
    """Print without tearing a progress bar that is on the screen."""
    if not trainer.is_global_zero:
        return
    bar: Any = trainer.progress_bar_callback
    shown = bool(getattr(bar, "is_enabled", False))
    if shown and getattr(bar, "_train_progress_bar", None) is not None:  # tqdm
        bar.print(text)
    elif shown and getattr(bar, "progress", None) is not None:  # Rich, by its own console
        from rich import get_console

        get_console().print(text, markup=False, highlight=False)
    else:
        pl.rank_zero_info(text)


def count_parameters(model: nn.Module) -> int:
    """Of the whole model."""
    return sum(parameter.numel() for parameter in model.parameters())
