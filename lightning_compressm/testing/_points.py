"""The points of the contract: each is a check of a family, with a seed of its own."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lightning_compressm.families import FamilyBase

__all__ = ["CONTRACT", "Check", "point"]

Check = Callable[[FamilyBase], None]

CONTRACT: dict[str, Check] = {}
"""Name of each point of the contract -> its check, e.g. for ``pytest.mark.parametrize``."""


def point(check: Check) -> Check:
    """Add a check to the contract; it runs with a seed of its own."""

    def seeded(family: FamilyBase) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            check(family)

    name = check.__name__.strip("_")
    seeded.__name__, seeded.__doc__ = name, check.__doc__
    CONTRACT[name] = seeded
    return seeded
