"""What the families of transformers' layers have in common: the config that describes the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

__all__ = ["config_attributes"]


def config_attributes(
    model: nn.Module,
    matches: Callable[[nn.Module], bool],
    names: Sequence[str],
    state_dim: int | None,
) -> dict[str, Any]:
    """Where configs of transformers' models in ``model`` hold the state dimension.

    A config has room for one state dimension. If the layers differ it is left as it is: the saved
    model then refuses to load with it instead of computing something else.

    Args:
        model: a model of transformers, or one that contains some.
        matches: whether a module is a layer of the family.
        names: how configs call the state dimension.
        state_dim: of all layers, ``None`` if they differ.

    Returns:
        Dotted attribute name -> new value.

    Example:
        >>> config_attributes(nn.Linear(2, 2), lambda module: False, ("state_size",), 4)
        {}
    """
    if state_dim is None:
        return {}
    attributes: dict[str, Any] = {}
    seen: set[int] = set()
    for path, module in model.named_modules():
        config = getattr(module, "config", None)
        theirs = type(module).__module__.partition(".")[0] == "transformers"
        if not theirs or id(config) in seen or not any(matches(m) for m in module.modules()):
            continue
        seen.add(id(config))
        for name in names:
            if getattr(config, name, None) is not None:
                attributes[f"{path}.config.{name}".lstrip(".")] = state_dim
    return attributes
