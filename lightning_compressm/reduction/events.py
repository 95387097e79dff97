"""What happened to each layer, as data, as a table, and as a picture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from lightning_compressm import _plain
from lightning_compressm.model.layers import SSMLayer
from lightning_compressm.plot import plot_spectra

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "CompressionReport",
    "LayerEvent",
    "dimension_metrics",
    "format_states",
    "format_table",
]


@dataclass(frozen=True, kw_only=True)
class LayerEvent:
    """One decision on one layer.

    Attributes:
        layer: module name.
        family: name of the layer's family.
        action: ``"reduce"``, ``"skip"`` or ``"rollback"``.
        old_state_dim: state dimension before.
        new_state_dim: state dimension after; the old one for a skip.
        energy_kept: share of the Hankel energy (sum of HSVs) kept, in [0, 1].
        error_bound: 2 * sum(discarded HSVs), a bound on the H-infinity norm of the layer's error;
            ``None`` where no theorem holds (time-limited Gramians, ablations).
        output_error: measured error of a selective layer's output on the calibration data, relative
            to its size (root mean squares); ``None`` where it was not measured.
        loss_change: by how much all cuts of this look together, or a cut that was refused for it
            alone, changed the loss of a training batch, as a share of the running loss; ``None``
            where it was not measured.
        seconds: time of the look, and of a layer that was reduced its share of the swap.
        reason: why a layer was skipped, or kept more states than asked for; else empty.
        balance: the balancing that was used; for a selective layer the criterion.
        horizon: the horizon that was used, ``None`` for infinite.
        step: optimizer steps done before it.
        epoch: epoch in which it happened.

    Example:
        >>> event = LayerEvent(layer="lru", family="LRU", old_state_dim=8, new_state_dim=4)
        >>> event.action
        'reduce'
    """

    layer: str
    family: str
    old_state_dim: int
    new_state_dim: int
    action: Literal["reduce", "skip", "rollback"] = "reduce"
    energy_kept: float = 1.0
    error_bound: float | None = None
    output_error: float | None = None
    loss_change: float | None = None
    seconds: float = 0.0
    reason: str = ""
    balance: str = ""
    horizon: int | None = None
    step: int = 0
    epoch: int = 0

    @classmethod
    def reduce(cls, layer: SSMLayer, new_state_dim: int, **facts: Any) -> LayerEvent:
        """A cut of a layer; ``facts`` are further attributes."""
        return cls(
            layer=layer.name,
            family=layer.family.name,
            old_state_dim=layer.state_dim,
            new_state_dim=new_state_dim,
            **facts,
        )

    @classmethod
    def skip(cls, layer: SSMLayer, **facts: Any) -> LayerEvent:
        """A layer that stays as it is; ``facts`` are further attributes."""
        return cls.reduce(layer, layer.state_dim, action="skip", **facts)

    def skipped(self, reason: str) -> LayerEvent:
        """The same event for a reduction that was not carried out; skips keep their own reason."""
        if self.action != "reduce":
            return self
        return replace(
            self,
            action="skip",
            new_state_dim=self.old_state_dim,
            energy_kept=1.0,
            error_bound=None,
            output_error=None,
            reason=reason,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain types only."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: object) -> LayerEvent:
        """The inverse of :meth:`to_dict`.

        Raises:
            TypeError: if the data is damaged.
        """
        event = cls(**_plain.mapping(data))
        for words in (event.layer, event.family, event.action, event.reason, event.balance):
            _plain.text(words)
        for whole in (event.old_state_dim, event.new_state_dim, event.step, event.epoch):
            _plain.integer(whole)
        for value in (event.energy_kept, event.seconds):
            _plain.number(value)
        for optional in (event.error_bound, event.output_error, event.loss_change, event.horizon):
            if optional is not None:
                _plain.number(optional)
        return event


@dataclass(frozen=True, eq=False)
class CompressionReport:
    """The result of :func:`lightning_compressm.compress`.

    Attributes:
        events: one :class:`LayerEvent` for each layer that was looked at.
        spectra: layer name -> its HSVs before the reduction, descending.

    Example:
        >>> CompressionReport([]).to_dict()
        {'events': []}
    """

    events: list[LayerEvent]
    spectra: Mapping[str, Tensor] = field(default_factory=dict)

    def table(self) -> str:
        """A plain-text table, one line for each layer."""
        return format_table(self.events)

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, ready for JSON."""
        return {"events": [event.to_dict() for event in self.events]}

    def plot(self) -> Figure:
        """HSV spectra with the kept dimension marked.

        Raises:
            ImportError: without matplotlib (the ``plot`` extra).
        """
        kept = {event.layer: event.new_state_dim for event in self.events}
        return plot_spectra(self.spectra, kept)

    def __str__(self) -> str:
        """The table."""
        return self.table()


def dimension_metrics(
    state_dims: Mapping[str, int], history: Iterable[Mapping[str, Any]]
) -> dict[str, float]:
    """What is logged of each layer and in all.

    Args:
        state_dims: layer name -> current state dimension.
        history: events as plain dicts, in the order in which they happened.

    Example:
        >>> dimension_metrics({"lru": 4}, [])["compressm/state_dim/lru"]
        4.0
    """
    history = list(history)
    kept = {e["layer"]: e["energy_kept"] for e in history if e["action"] != "skip"}
    metrics = {
        "compressm/total_state_dim": float(sum(state_dims.values())),
        "compressm/seconds": float(sum(event["seconds"] for event in history)),
    }
    for name, state_dim in state_dims.items():
        metrics[f"compressm/state_dim/{name}"] = float(state_dim)
        metrics[f"compressm/energy_kept/{name}"] = float(kept.get(name, 1.0))
    return metrics


_HEADER = ("layer", "family", "action", "states", "energy kept", "error bound", "note")


def format_table(events: Iterable[LayerEvent]) -> str:
    """A plain-text table of events, columns aligned.

    Example:
        >>> print(
        ...     format_table(
        ...         [LayerEvent(layer="lru", family="LRU", old_state_dim=8, new_state_dim=4)]
        ...     )
        ... )
        layer  family  action  states  energy kept  error bound  note
        -----  ------  ------  ------  -----------  -----------  ----
        lru    LRU     reduce  8 -> 4  100.0%       -
    """
    rows = [_HEADER, *(_row(event) for event in events)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADER))]
    rows.insert(1, tuple("-" * width for width in widths))
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def format_states(old: int, new: int) -> str:
    """What became of a number of states.

    Example:
        >>> format_states(8, 4), format_states(8, 8)
        ('8 -> 4', '8')
    """
    return str(old) if old == new else f"{old} -> {new}"


def _row(event: LayerEvent) -> tuple[str, ...]:
    bound = "-" if event.error_bound is None else f"{event.error_bound:.3g}"
    return (
        event.layer or "(model)",
        event.family,
        event.action,
        f"{event.old_state_dim} -> {event.new_state_dim}",
        f"{event.energy_kept:.1%}",
        bound,
        event.reason,
    )
