"""Which families are known: the package's own, a user's, and those of other packages."""

from __future__ import annotations

import importlib
import pkgutil
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import entry_points
from typing import Any, TypeVar

from torch import nn

from lightning_compressm.families._base import FamilyBase

__all__ = [
    "ENTRY_POINT_GROUP",
    "find_family",
    "model_attributes",
    "named_layers",
    "register_family",
    "registered_families",
]

ENTRY_POINT_GROUP = "lightning_compressm.families"
"""Packages announce families of theirs under this entry point group."""

FamilyT = TypeVar("FamilyT", bound=FamilyBase)

_families: dict[str, FamilyBase] = {}


def register_family(family: type[FamilyT]) -> type[FamilyT]:
    """Class decorator: make a :class:`Family` known. The latest to register is asked first.

    Args:
        family: a concrete subclass of :class:`Family` with a ``name``; registering a name again
            replaces the earlier one.

    Returns:
        The class itself.

    Raises:
        TypeError: if it is not a concrete Family with a name.

    Example:
        >>> from lightning_compressm.families.lru import LRUFamily
        >>> register_family(LRUFamily) is LRUFamily
        True
    """
    given: object = family
    if not (isinstance(given, type) and issubclass(given, FamilyBase)):
        raise TypeError(f"expected a subclass of Family, got {family!r}.")
    if missing := sorted(getattr(family, "__abstractmethods__", ())):
        raise TypeError(f"{family.__name__} lacks {', '.join(missing)}; see Family's docstring.")
    if not isinstance(getattr(family, "name", None), str):
        raise TypeError(f"{family.__name__} needs a class attribute `name` (a short string).")
    _families.pop(family.name, None)
    _families[family.name] = family()
    return family


def registered_families() -> dict[str, FamilyBase]:
    """Name -> family, in the order in which they registered.

    Example:
        >>> "LRU" in registered_families()
        True
    """
    _discover()
    return dict(_families)


def find_family(module: nn.Module) -> FamilyBase | None:
    """The family that knows ``module``, or ``None``.

    Example:
        >>> from torch import nn
        >>> find_family(nn.Linear(2, 2)) is None
        True
    """
    _discover()
    return next((f for f in reversed(_families.values()) if f.matches(module)), None)


def named_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, FamilyBase]]:
    """Path, module and family of every layer in ``model`` that a family knows.

    Example:
        >>> from lightning_compressm.nn import LRU
        >>> [(path, family.name) for path, _, family in named_layers(nn.Sequential(LRU(4, 8)))]
        [('0', 'LRU')]
    """
    for path, module in model.named_modules():
        family = find_family(module)
        if family is not None:
            yield path, module, family


def model_attributes(model: nn.Module, state_dims: Mapping[str, int]) -> dict[str, Any]:
    """Attributes of a whole model, such as a config, that say how many states its layers have.

    Args:
        model: the root of the model.
        state_dims: path of an SSM layer -> its state dimension to be; others keep theirs.

    Returns:
        Dotted attribute name -> value.

    Example:
        >>> model_attributes(nn.Linear(2, 2), {})
        {}
    """
    found: dict[FamilyBase, dict[str, int]] = defaultdict(dict)
    for path, module, family in named_layers(model):
        found[family][path] = state_dims.get(path, family.state_dim(module))
    attributes: dict[str, Any] = {}
    for family, dims in found.items():
        attributes |= family.shared_attributes(model, dims)
    return attributes


@cache
def _discover() -> None:
    """Import every public module of this folder, and every announced family, once."""
    own = importlib.import_module("lightning_compressm.families")
    users = dict(_families)
    _families.clear()
    for info in pkgutil.iter_modules(own.__path__):
        if not info.name.startswith("_"):
            importlib.import_module(f"{own.__name__}.{info.name}")
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        register_family(entry.load())
    # A user's own family may have come first; it must still be asked first.
    for name, family in users.items():
        _families.pop(name, None)
        _families[name] = family
