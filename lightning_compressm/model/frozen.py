"""SSM layers that are not trained: averages that a model keeps by hand, and others that stay."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from lightning_compressm._names import check_patterns, is_inside, matches, plain_name
from lightning_compressm.errors import UnsupportedLayerError
from lightning_compressm.model.layers import SSMLayer, find_ssm_layers, select_layers

__all__ = ["ChosenLayers", "choose_layers"]


@dataclass(frozen=True, eq=False)
class ChosenLayers:
    """Which SSM layers of a model are reduced, which follow, and which stay because of training.

    Attributes:
        layers: name -> layer to be reduced.
        twins: path of a module that holds averages -> path of what it averages.
        frozen: names of the layers that are frozen and stay as they are.
        excluded: names of all that are neither reduced on their own nor named in `ignore`.

    Example:
        >>> ChosenLayers({}).twins
        {}
    """

    layers: Mapping[str, SSMLayer]
    twins: Mapping[str, str] = field(default_factory=dict)
    frozen: Sequence[str] = ()
    excluded: Collection[str] = ()


def choose_layers(
    model: nn.Module,
    layers: Sequence[str] | None = None,
    ignore: Sequence[str] | None = None,
    averages: Sequence[str] | None = None,
    *,
    trained: Collection[int] | None = None,
) -> ChosenLayers:
    """Tell the layers that are to be reduced from those that follow them, and from frozen ones.

    Args:
        model: any module.
        layers: glob patterns; ``None`` for all layers but frozen ones, where others are trained.
        ignore: glob patterns of layers to leave out.
        averages: glob patterns of layers that hold averages of others. Each belongs to a module of
            the same class with the same layers: the only one, or the one of the closest weights.
        trained: ids of the parameters that are trained; ``None`` for a finished model, in which
            frozen layers are reduced too, unless they are copies of others.

    Raises:
        UnsupportedLayerError: if a layer that is not trained is built like one that is, and is not
            named in ``averages`` or ``ignore``; if it is not clear what an average averages; and
            as :func:`~lightning_compressm.model.layers.select_layers` does.
        ValueError: if a pattern matches no SSM layer.

    Example:
        >>> from copy import deepcopy
        >>> from lightning_compressm.nn import LRU
        >>> model = nn.ModuleDict({"net": LRU(4, 8)})
        >>> model["ema"] = deepcopy(model["net"]).requires_grad_(False)
        >>> choose_layers(model, averages=["ema"]).twins
        {'ema': 'net'}
    """
    found = find_ssm_layers(model)
    check_patterns("averages", averages, list(found))
    averaged = {name for name in found if matches(name, averages)}
    ids = {id(p) for p in model.parameters() if p.requires_grad} if trained is None else trained
    trains = {name for name, layer in found.items() if _has_any(layer, ids)} - averaged
    others = {n for n in found if not matches(n, ignore)} - trains - averaged
    others = others if layers is None else {n for n in others if matches(n, layers)}
    pairs = _Pairs(model, found, trains)
    if others:
        _refuse_twins(pairs, others)
    twins = _twins_of(pairs, averaged) if averaged else {}
    frozen = [] if trained is None or layers is not None else _frozen(found, others)
    if frozen and len(frozen) == len(found):
        raise UnsupportedLayerError(
            f"all SSM layers are frozen: {', '.join(map(repr, frozen))}; expected some to train. "
            "Name those to reduce in `layers`."
        )
    excluded = averaged | set(frozen)
    chosen = select_layers(model, layers, ignore, to_reduce=True, without=excluded, found=found)
    return ChosenLayers(chosen, twins, frozen, excluded)


def _has_any(layer: SSMLayer, ids: Collection[int]) -> bool:
    return any(id(parameter) in ids for parameter in layer.module.parameters())


def _frozen(found: Mapping[str, SSMLayer], names: Collection[str]) -> list[str]:
    """Those of which nothing could be trained, not even by an optimizer that comes later."""
    parameters = {name: list(found[name].module.parameters()) for name in found if name in names}
    return [name for name, own in parameters.items() if not any(p.requires_grad for p in own)]


def _refuse_twins(pairs: _Pairs, names: Collection[str]) -> None:
    for path, twins in pairs.of(names, same_stack=False).items():
        name, twin = plain_name(path), plain_name(pairs.closest(path, twins)[0])
        pattern = [name if name in pairs.found else f"{name}.*"]
        raise UnsupportedLayerError(
            f"'{name}' is not trained and is built like '{twin}', which is. If it is an average of "
            "those weights (EMA, a target network), it has to be reduced in the same coordinates: "
            f"pass averages={pattern!r}. Otherwise pass ignore={pattern!r}, and it stays as it is."
        )


def _twins_of(pairs: _Pairs, names: Collection[str]) -> dict[str, str]:
    """Path of a module that holds averages -> path of what it averages."""
    twins: dict[str, str] = {}
    for path, candidates in pairs.of(names, same_stack=True).items():
        twins[path], clear = pairs.closest(path, candidates)
        if not clear:
            raise UnsupportedLayerError(
                f"averages: '{path}' may be an average of '{twins[path]}' or of another module "
                "like it; expected one that is much closer in its weights. Start the "
                "average from the weights that it averages, or put it into `ignore`."
            )
    paths = {name: pairs.found[name].path for name in sorted(names)}
    if lonely := [n for n, p in paths.items() if not any(is_inside(p, twin) for twin in twins)]:
        raise UnsupportedLayerError(
            f"averages: {', '.join(map(repr, lonely))}: expected a trained layer of the same class "
            "and the same shapes for each; found none. Take them out of `averages`."
        )
    return twins


@dataclass(frozen=True, eq=False)
class _Pairs:
    """Modules that are built alike, of which one has layers that are not trained."""

    model: nn.Module
    found: Mapping[str, SSMLayer]
    trained: Collection[str]

    def of(self, names: Collection[str], *, same_stack: bool) -> dict[str, list[str]]:
        """The largest modules with no layers but these -> those like it whose layers are trained.

        Args:
            names: of layers.
            same_stack: whether layers of one stack, told apart by numbers alone, can be twins.
        """
        pairs: dict[str, list[str]] = {}
        for name in self.found:
            if name not in names or any(is_inside(self.found[name].path, path) for path in pairs):
                continue
            for path in _ancestors(self.found[name].path):
                if not {n for n, _ in self._layers(path)} <= set(names):
                    continue
                if twins := list(self._twins(path, same_stack)):
                    pairs[path] = twins
                    break
        return pairs

    def closest(self, path: str, twins: Sequence[str]) -> tuple[str, bool]:
        """The twin of the closest weights, and whether any other is more than twice as far off."""
        if len(twins) == 1:
            return twins[0], True
        distances = sorted((self._distance(path, twin), twin) for twin in twins)
        return distances[0][1], 2 * distances[0][0] < distances[1][0]

    def _twins(self, path: str, same_stack: bool) -> Iterator[str]:
        own, layers = self.model.get_submodule(path), self._layers(path)
        for other, module in self.model.named_modules():
            if type(module) is not type(own) or is_inside(path, other) or is_inside(other, path):
                continue
            theirs = self._layers(other)
            if len(theirs) != len(layers) or not {n for n, _ in theirs} <= set(self.trained):
                continue
            if not same_stack and _differ_in_numbers(path, other):
                continue
            if all(map(self._alike, layers, theirs)):
                yield str(other)

    def _layers(self, path: str) -> list[tuple[str, str]]:
        """Name, and path below ``path``, of each SSM layer there."""
        return [
            (name, layer.path[len(path) :])
            for name, layer in self.found.items()
            if is_inside(layer.path, path)
        ]

    def _alike(self, one: tuple[str, str], other: tuple[str, str]) -> bool:
        layers = [self.found[name] for name, _ in (one, other)]
        same = one[1] == other[1] and layers[0].family is layers[1].family
        return same and _shapes(layers[0].module) == _shapes(layers[1].module)

    def _distance(self, path: str, twin: str) -> float:
        """Root of the sum of squared differences of all parameters of the SSM layers."""
        total = 0.0
        for (one, _), (other, _) in zip(self._layers(path), self._layers(twin), strict=True):
            parameters = [self.found[name].module.parameters() for name in (one, other)]
            for a, b in zip(*parameters, strict=True):
                total += float((a.detach() - b.detach().to(a.device)).abs().square().sum())
        return float(total**0.5)


def _shapes(module: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, tuple(p.shape)) for name, p in module.named_parameters()]


def _ancestors(path: str) -> Iterator[str]:
    """The modules that a path leads through, the largest below the root first, and itself."""
    parts = path.split(".")
    return (".".join(parts[:i]) for i in range(1, len(parts) + 1))


def _differ_in_numbers(path: str, other: str) -> bool:
    """Whether two paths lead to different places of stacks: seen from their ends."""
    ends = zip(reversed(path.split(".")), reversed(other.split(".")), strict=False)
    return any(a != b and a.isdigit() and b.isdigit() for a, b in ends)
