"""Objects that describe models and may be shared by several of them, such as a config."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from typing import Any

from torch import nn

__all__ = ["separate_configs"]


def separate_configs(model: nn.Module, attributes: Mapping[str, Any], steps: ExitStack) -> None:
    """Give parts of a model whose config is to change a copy, since others may have the same one.

    All modules of these parts then hold the copy, also within larger configs, and so do modules
    around them in which nothing else holds the old one. Whatever else holds it keeps it.

    Args:
        model: any module.
        attributes: dotted name -> new value, of modules (nothing is done for these) or of objects
            that modules hold. Parts that shared one and give it the same values go on sharing.
        steps: is given what puts the old objects back.

    Example:
        >>> from types import SimpleNamespace
        >>> model, config = nn.Linear(2, 2), SimpleNamespace(size=2)
        >>> model.config = config
        >>> separate_configs(model, {"config.size": 3}, ExitStack())
        >>> model.config is config, model.config == config
        (False, True)
    """
    edits: dict[tuple[int, int], dict[str, Any]] = defaultdict(dict)
    homes: dict[tuple[int, int], tuple[nn.Module, Any]] = {}
    for part, config, key, value in _edits(model, attributes):
        place = (id(part), id(config))
        homes[place] = part, config
        edits[place][key] = value
    groups: dict[tuple[int, str], list[nn.Module]] = defaultdict(list)
    configs: dict[int, Any] = {}
    for place, (part, config) in homes.items():
        configs[id(config)] = config
        groups[id(config), repr(edits[place])].append(part)
    # All before the first change: a second group must not take what the first one left.
    takers = [
        (configs[number], _takers(model, parts, configs[number]))
        for (number, _), parts in groups.items()
    ]
    for config, modules in takers:
        copies: dict[int, Any] = {}
        for module in modules:
            _copy_in(module, config, copies, steps)


def _edits(
    model: nn.Module, attributes: Mapping[str, Any]
) -> Iterator[tuple[nn.Module, Any, str, Any]]:
    """The module, the object that it holds, its attribute and the new value."""
    for name, value in attributes.items():
        module, rest = model, name.split(".")
        while rest[0] in module._modules:
            module = module.get_submodule(rest.pop(0))
        held: Any = module
        for part in rest[:-1]:
            held = getattr(held, part)
        if held is not module and hasattr(held, "__dict__"):
            yield module, held, rest[-1], value


def _takers(model: nn.Module, parts: Sequence[nn.Module], config: Any) -> list[nn.Module]:
    """The modules of some parts that hold a config, and those around that hold it for them only."""
    inside = {id(module) for part in parts for module in part.modules()}
    around = {id(m) for m in model.modules() if any(id(p) in map(id, m.modules()) for p in parts)}
    holders = [m for m in model.modules() if any(_reaches(v, config) for v in vars(m).values())]
    foreign = {id(m) for m in holders} - inside - around

    def takes(module: nn.Module) -> bool:
        alone = foreign.isdisjoint(map(id, module.modules()))
        return id(module) in inside or (id(module) in around and alone)

    return [module for module in holders if takes(module)]


def _copy_in(module: nn.Module, config: Any, copies: dict[int, Any], steps: ExitStack) -> None:
    content = vars(module)
    for key, value in list(content.items()):
        if _reaches(value, config):
            steps.callback(content.__setitem__, key, value)
            content[key] = deepcopy(value, copies)


def _reaches(value: Any, config: Any) -> bool:
    """Whether a value is the config, or a config that holds it."""
    if value is config:
        return True
    bases = {*type(value).__mro__} & {*type(config).__mro__} - {object}
    if not bases or isinstance(value, nn.Module) or not hasattr(value, "__dict__"):
        return False
    return any(_reaches(inner, config) for inner in vars(value).values())
