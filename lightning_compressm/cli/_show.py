"""Tables on a terminal, and JSON for scripts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lightning_compressm.cli._facts import LayerFacts
from lightning_compressm.reduction.events import format_states

__all__ = ["show_events", "show_json", "show_layers"]


def show_json(content: Mapping[str, Any]) -> None:
    """Print plain types."""
    print(json.dumps(content, indent=2, allow_nan=False))


def show_layers(layers: Sequence[LayerFacts], tolerances: Sequence[float]) -> None:
    """A line for each layer."""
    header = ["layer", "family", "states", *(f"tolerance {t:g}" for t in tolerances)]
    noted = any(layer.unknown for layer in layers)
    rows = []
    for layer in layers:
        kept = (layer.states_for(t) for t in tolerances)
        cells = [layer.name or "(model)", layer.family, str(layer.state_dim)]
        cells += ["" if n is None else str(n) for n in kept]
        rows.append([*cells, layer.unknown] if noted else cells)
    _print("Layers", [*header, "spectrum"] if noted else header, rows)


def show_events(events: Iterable[Mapping[str, Any]]) -> None:
    """A line for each layer and look."""
    rows = [
        [
            str(e["step"]),
            e["layer"] or "(model)",
            e["action"],
            format_states(e["old_state_dim"], e["new_state_dim"]),
            f"{e.get('energy_kept', 1.0):.1%}",
            str(e.get("reason", "")),
        ]
        for e in events
    ]
    if rows:
        _print("History", ["step", "layer", "action", "states", "energy kept", "note"], rows)


def _print(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for name in header:
        is_number = name == "states" or name.startswith("tolerance")
        table.add_column(name, justify="right" if is_number else "left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
