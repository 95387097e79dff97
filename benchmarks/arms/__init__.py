"""What is compared: each file of this folder is one arm, found by itself.

A new criterion or schedule is a new file with a subclass of `Arm`; it joins every table.
"""

from __future__ import annotations

import importlib
import pkgutil

from benchmarks.arms._base import Arm

__all__ = ["Arm", "all_arms"]


def all_arms() -> dict[str, Arm]:
    """Name -> arm, in the order of their `place`.

    Example:
        >>> list(all_arms())[:3]
        ['full', 'small', 'published']
    """
    arms = [arm for module in pkgutil.iter_modules(__path__) for arm in _arms_in(module.name)]
    return {arm.name: arm for arm in sorted(arms, key=lambda arm: (arm.place, arm.name))}


def _arms_in(name: str) -> list[Arm]:
    """One of each class of a file that says what it is called."""
    module = importlib.import_module(f"{__name__}.{name}")
    return [
        kind()
        for kind in vars(module).values()
        if isinstance(kind, type)
        and issubclass(kind, Arm)
        and kind.__module__ == module.__name__
        and "name" in vars(kind)
    ]
