"""The contract of every family as checks: for the package's own families and for anybody's.

Needs torch only. Each check raises an AssertionError that says what was expected and what came.
"""

from __future__ import annotations

from lightning_compressm.families import FamilyBase
from lightning_compressm.testing import computation, surroundings  # noqa: F401 (the points)
from lightning_compressm.testing._points import CONTRACT

__all__ = ["CONTRACT", "check_family"]


def check_family(family: FamilyBase | type[FamilyBase]) -> None:
    """Run every check of the contract on a family, with its own example layer.

    A point that is about layers of another kind (linear or selective) always holds.

    Args:
        family: a registered :class:`Family` or :class:`SelectiveFamily`, or its class; its method
            ``example`` gives the layer.

    Raises:
        AssertionError: names every point that does not hold, and why.

    Example:
        >>> from lightning_compressm.families import registered_families
        >>> check_family(registered_families()["LRU"])
        >>> list(CONTRACT)[:2]
        ['is_recognised', 'full_order_changes_nothing']
    """
    instance = family() if isinstance(family, type) else family
    failures: list[str] = []
    for name, check in CONTRACT.items():
        try:
            check(instance)
        except Exception as error:
            kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
            failures.append(f"- {name}: {kind}{error}")
    if failures:
        summary = f"{type(instance).__name__} breaks {len(failures)} of {len(CONTRACT)} points:"
        raise AssertionError("\n".join([summary, *failures]))
