"""What the families of transformers' layers have in common: the config that describes the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lightning_compressm._names import is_inside

__all__ = ["config_attributes"]


def config_attributes(
    model: nn.Module, state_dims: Mapping[str, int], names: Sequence[str]
) -> dict[str, Any]:
    """What configs of transformers' models in ``model`` say of the state dimension.

    A config has one state dimension for all layers. Where they differ, the config says so in its
    ``per_layer_config``: transformers' Mamba models can't be built from such a config, so that
    ``from_pretrained`` raises instead of computing something else.

    Args:
        model: a model of transformers, or one that contains some.
        state_dims: path of each layer of a family -> its state dimension.
        names: how configs call the state dimension.

    Returns:
        Dotted attribute name -> new value.

    Example:
        >>> config_attributes(nn.Linear(2, 2), {}, ("state_size",))
        {}
    """
    attributes: dict[str, Any] = {}
    seen: list[tuple[str, object]] = []  # two models may share one
    for path, module in model.named_modules():
        config = getattr(module, "config", None)
        theirs = type(module).__module__.partition(".")[0] == "transformers"
        dims = {p: d for p, d in state_dims.items() if is_inside(p, path)}
        known = any(config is other and is_inside(str(path), outer) for outer, other in seen)
        if not theirs or config is None or known or not dims:
            continue
        seen.append((str(path), config))
        same = len(set(dims.values())) == 1
        index = {path: getattr(model.get_submodule(path), "layer_idx", None) for path in dims}
        # Reading an attribute that differs between layers raises, so it is looked up in `vars`.
        for name in (n for n in names if vars(config).get(n) is not None):
            found = {name: next(iter(dims.values()))} if same else {}
            found = {} if found.get(name) == vars(config)[name] else found
            layers = {int(i): dims[p] for p, i in index.items() if i is not None and not same}
            found |= _per_layer(config, name, layers)
            attributes |= {f"{path}.config.{key}".lstrip("."): v for key, v in found.items()}
    return attributes


def _per_layer(config: Any, name: str, layers: Mapping[int, int]) -> dict[str, Any]:
    """The config's ``per_layer_config`` with other values for ``name``, if that changes it."""
    if not hasattr(type(config), "per_layer_config"):
        return {}
    old = config.to_dict().get("per_layer_config") or {}
    new = {int(i): {k: v for k, v in own.items() if k != name} for i, own in old.items()}
    for i, state_dim in layers.items():
        new.setdefault(i, {})[name] = state_dim
    new = {i: own for i, own in new.items() if own}
    return {"per_layer_config": new or None} if new or old else {}
