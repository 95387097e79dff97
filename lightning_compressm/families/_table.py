"""The table of supported layers, made from the registry."""

from __future__ import annotations

from lightning_compressm.families._base import Family, FamilyBase
from lightning_compressm.families._registry import registered_families
from lightning_compressm.families._selective import SelectiveFamily

__all__ = ["support_table"]

_HEADER = ("family", "layers", "what goes", "what makes up for it", "bound")


def support_table() -> str:
    """All registered families as a Markdown table.

    Example:
        >>> print(support_table().splitlines()[0])
        | family | layers | what goes | what makes up for it | bound |
    """
    rows = [_HEADER, ("---",) * len(_HEADER)]
    rows += [_row(family) for _, family in sorted(registered_families().items())]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _row(family: FamilyBase) -> tuple[str, ...]:
    layers = family.layers or "your own"
    if not isinstance(family, SelectiveFamily):
        assert isinstance(family, Family)
        if family.only_balance == "modes":
            return family.name, layers, "whole states", "least squares on C, in closed form", "none"
        return family.name, layers, "balanced states", "balanced truncation", "2 sum(sigma)"
    refit = {
        "readout": "least squares on C, in closed form",
        "local": "a short fit to the old output",
    }[family.refit]
    what = "whole states (approximate: B, C are normalised)" if family.approximate else None
    return family.name, layers, what or "whole states", refit, "none; output checked"
