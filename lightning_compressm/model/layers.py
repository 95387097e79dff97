"""Find the SSM layers of a model."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from torch import nn

from lightning_compressm._averages import inside_average
from lightning_compressm._names import check_patterns, matches, plain_name
from lightning_compressm._tensors import replaceable
from lightning_compressm.errors import CompreSSMError, UnsupportedLayerError
from lightning_compressm.families import find_family, named_layers, registered_families
from lightning_compressm.families._base import FamilyBase, tensor_of
from lightning_compressm.families._refused import nothing_to_reduce, refusal_reason

__all__ = ["SSMLayer", "find_ssm_layers", "select_layers"]


@dataclass(frozen=True, eq=False)
class SSMLayer:
    """One SSM layer of a model.

    Attributes:
        name: module name, without the wrappers of ``torch.compile``.
        path: module name as the model has it.
        module: the layer.
        family: the :class:`~lightning_compressm.Family` that knows it.

    Example:
        >>> from lightning_compressm.nn import LRU
        >>> find_ssm_layers(LRU(4, 8))[""].state_dim
        8
    """

    name: str
    path: str
    module: nn.Module
    family: FamilyBase

    def __str__(self) -> str:
        """Its name and kind, as errors have them."""
        return f"layer '{self.name}' ({self.family.name})"

    @property
    def state_dim(self) -> int:
        """The current state dimension N."""
        return self.family.state_dim(self.module)

    @property
    def device(self) -> torch.device:
        """Where the layer's tensors are."""
        return next(self.module.parameters()).device

    def on_cpu(self) -> SSMLayer:
        """The same layer, copied tensor by tensor: a copy on its device would need room there."""
        memo: dict[int, object] = {}
        for parameter in self.module.parameters():
            copied = nn.Parameter(parameter.detach().cpu().clone(), parameter.requires_grad)
            copied.__dict__.update(parameter.__dict__)
            memo[id(parameter)] = copied
        for buffer in self.module.buffers():
            memo[id(buffer)] = buffer.detach().cpu().clone()
        return replace(self, module=deepcopy(self.module, memo))


def find_ssm_layers(model: nn.Module) -> dict[str, SSMLayer]:
    """All SSM layers of ``model`` that a registered family knows.

    Args:
        model: any module, also compiled or wrapped.

    Returns:
        Module name -> :class:`SSMLayer`, in the order of ``named_modules``. A module that is
        registered twice appears once. Layers of an ``AveragedModel`` that is part of the model are
        left out: they follow those that they average.

    Example:
        >>> from torch import nn
        >>> from lightning_compressm.nn import LRU
        >>> list(find_ssm_layers(nn.Sequential(nn.Linear(2, 4), LRU(4, 8))))
        ['1']
    """
    found: dict[str, SSMLayer] = {}
    averaged = inside_average(model)
    for path, module, family in named_layers(model):
        if id(module) in averaged:
            continue
        name = plain_name(path)
        found[name] = SSMLayer(name, path, module, family)
    return found


def select_layers(
    model: nn.Module,
    layers: Sequence[str] | None = None,
    ignore: Sequence[str] | None = None,
    *,
    to_reduce: bool = False,
    without: Collection[str] = (),
    found: Mapping[str, SSMLayer] | None = None,
) -> dict[str, SSMLayer]:
    """The SSM layers that patterns leave over.

    Args:
        model: any module.
        layers: glob patterns; ``None`` for all layers.
        ignore: glob patterns of layers to leave out.
        to_reduce: also refuse layers that can be analysed but not reduced.
        without: names of further layers to leave out.
        found: what :func:`find_ssm_layers` gave, where it was asked already.

    Returns:
        Module name -> :class:`SSMLayer`.

    Raises:
        UnsupportedLayerError: if nothing is left, two layers share some of their tensors, a chosen
            layer has the same tensor twice or none yet (meta device), or is of a kind that can't be
            reduced (patterns may name these too); with ``to_reduce`` also for hooks on its state
            tensors, and for adapters that wrap them.
        ValueError: if a pattern matches no SSM layer.

    Example:
        >>> from torch import nn
        >>> from lightning_compressm.nn import LRU
        >>> list(select_layers(nn.Sequential(LRU(4, 8), LRU(4, 8)), ignore=["0"]))
        ['1']
    """
    found = find_ssm_layers(model) if found is None else found
    refused = _find_refused(model)
    names = [*found, *refused]
    if not names:
        raise UnsupportedLayerError(_nothing_found(model))
    check_patterns("layers", layers, names)
    check_patterns("ignore", ignore, names)
    left = [
        name
        for name in names
        if (layers is None or matches(name, layers))
        and not matches(name, ignore)
        and name not in without
    ]
    for name in left:
        if name in refused:
            raise UnsupportedLayerError(
                f"{name or 'the model'} can't be reduced: {refused[name]}. Put it into `ignore`."
            )
    if not left:
        raise UnsupportedLayerError(
            f"`layers` and `ignore` leave none of the SSM layers {', '.join(map(repr, names))}."
        )
    chosen = {name: found[name] for name in left}
    for layer in chosen.values():
        layer.family.refuse(layer.module)
        _check_tensors(layer)
    _check_sharing(chosen.values(), [found[name] for name in found if name not in chosen])
    if to_reduce:
        _refuse_irreplaceable(chosen.values())
    return chosen


def _refuse_irreplaceable(layers: Iterable[SSMLayer]) -> None:
    for layer in layers:
        try:
            for name in layer.family.state_axes(layer.module):
                replaceable(layer.module, name)
        except CompreSSMError as error:
            raise UnsupportedLayerError(f"'{layer.name}' can't be reduced: {error}") from error


def _find_refused(model: nn.Module) -> dict[str, str]:
    """Name of a layer that is known but can't be reduced -> its class and why."""
    refused: dict[str, str] = {}
    averaged = inside_average(model)
    for path, module in model.named_modules():
        reason = None if id(module) in averaged else refusal_reason(module)
        if reason is not None and find_family(module) is None:
            refused[plain_name(path)] = f"{type(module).__name__} {reason}"
    return refused


def _check_tensors(layer: SSMLayer) -> None:
    """A layer has tensors with values, and for each with states only one place."""
    places: dict[int, list[str]] = defaultdict(list)
    for path, module in layer.module.named_modules():
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                places[id(tensor)].append(f"{path}.{key}".lstrip("."))
                if tensor.is_meta:
                    raise UnsupportedLayerError(
                        f"'{layer.name}' has tensors on the meta device; expected values. "
                        "Materialise the model first: to_empty(), or a checkpoint and assign=True."
                    )
    for name in layer.family.state_axes(layer.module):
        shared = places[id(tensor_of(layer.module, name))]
        if len(shared) > 1:
            raise UnsupportedLayerError(
                f"'{layer.name}' uses one tensor as {' and as '.join(map(repr, shared))}; expected "
                "one for each, since a reduction gives them different values. Untie them, or put "
                "the layer into `ignore`."
            )


def _check_sharing(layers: Iterable[SSMLayer], others: Iterable[SSMLayer]) -> None:
    """Layers may share all of their tensors or none, and none with layers that stay as they are.

    Half-shared ones have no common basis.
    """
    groups: dict[int, tuple[str, set[int]]] = {}
    for layer in layers:
        names = layer.family.state_axes(layer.module)
        tensors = {id(tensor_of(layer.module, name)) for name in names}
        for tensor in tensors:
            other, theirs = groups.setdefault(tensor, (layer.name, tensors))
            if theirs != tensors:
                raise UnsupportedLayerError(
                    f"'{layer.name}' and '{other}' share some of their state tensors but not all; "
                    "expected all or none. Put both into `ignore`, or untie them."
                )
    for layer in others:
        for parameter in layer.module.parameters():
            if id(parameter) in groups:
                raise UnsupportedLayerError(
                    f"'{groups[id(parameter)][0]}' is to be reduced and shares tensors with "
                    f"'{layer.name}', which is left out; expected both or none. Put both into "
                    "`ignore`, or untie them."
                )


def _nothing_found(model: nn.Module) -> str:
    counts = Counter(type(module).__name__ for module in model.modules())
    seen = ", ".join(f"{name} x{count}" for name, count in counts.most_common(12))
    known = "; ".join(sorted(registered_families()))
    named = {type(module).__name__: nothing_to_reduce(module) for module in model.modules()}
    empty = "".join(f" {name} is {what}." for name, what in named.items() if what)
    return (
        f"no SSM layer found in {type(model).__name__}.{empty} Looked at: {seen}. "
        f"Known families: {known}."
        " Register a Family for your own layer with lightning_compressm.register_family."
    )
