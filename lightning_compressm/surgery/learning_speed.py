"""Let what is left of a layer learn as fast as the whole layer did.

Adam moves every entry of a parameter by about the learning rate, however small its gradient is.
A layer's map is a sum over its N states, so with r like ones left a step moves it r/N as far.
Recipes that train state-space parameters at a fraction of the others' rate did so for N states; up
to the others' rate, the steps of what is left are lengthened by N/r.
"""

from __future__ import annotations

import functools
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop

from lightning_compressm._names import is_inside
from lightning_compressm.errors import CheckpointError
from lightning_compressm.surgery._stretch import Held, Stretch
from lightning_compressm.surgery.plan import SurgeryPlan

__all__ = ["LearningSpeed", "state_parameters"]

# Step functions whose updates have the rate's size, whatever the gradient's, and what the rate
# counts in: only like is compared with like.
_UNITS = {
    inspect.unwrap(kind.step): unit
    for unit, kinds in {
        "entry": (Adam, AdamW, Adamax, NAdam, RAdam, RMSprop),
        "all gradients so far": (Adagrad,),
    }.items()
    for kind in kinds
}


def state_parameters(
    model: nn.Module, plan: SurgeryPlan, path: str, old_dim: int, new_dim: int
) -> list[str]:
    """The parameters of a layer that a plan is about to cut, and that consist of states alone.

    Every size that changes goes from a multiple of ``old_dim`` to the same multiple of
    ``new_dim``. So projections that hold other rows beside those of the states are left out, and so
    is what a plan rewrites in its old shape.

    Args:
        model: the module that the plan was made for, not changed yet.
        plan: the change.
        path: of the layer in the model; empty if it is the model itself.
        old_dim: states of the layer now.
        new_dim: states after the change.

    Returns:
        Their names in the model.

    Example:
        >>> from lightning_compressm.surgery.plan import TensorEdit
        >>> layer = nn.Linear(3, 8)
        >>> plan = SurgeryPlan({"weight": TensorEdit(torch.zeros(2, 3))})
        >>> state_parameters(layer, plan, "", 8, 2)
        ['weight']
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return [
        name
        for name, edit in plan.edits.items()
        if name in parameters
        and is_inside(name, path)
        and _consists_of_states(parameters[name].shape, edit.value.shape, old_dim, new_dim)
    ]


class LearningSpeed:
    """Lengthens the steps of parameters whose layers have lost states.

    The applied update of a followed parameter, whatever made it (moments, weight decay, clipped
    gradients), is multiplied by ``min(N / r, fastest / own)``, at least 1: N states before the
    first cut, r now, ``own`` the learning rate of the parameter's group and ``fastest`` the highest
    rate of all other groups that train something, both as they are when the step begins. In one
    group with everything else nothing changes. For Adam, AdamW and their kin this is what a rate
    raised by the factor would do, decoupled weight decay included.

    The rate itself is not touched: schedulers overwrite it, or go on from what they find, and
    parameters of one group have one. Instead a hook before ``step`` copies the parameters, and one
    after it extends what has moved. A step that is skipped (loss scaling) moves nothing.

    Optimizers whose steps follow the gradients (SGD), have no rate for each entry (LBFGS, Muon,
    Adafactor), or are not known are left alone: in a new basis some gradients are larger and some
    smaller, so that no one factor fits, and a ratio of rates says nothing there.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> groups = [{"params": [layer.weight], "lr": 0.01}, {"params": [layer.bias], "lr": 0.03}]
        >>> speed = LearningSpeed()
        >>> speed.follow(["weight"], old_dim=8, new_dim=2)
        >>> speed.attach(layer, [Adam(groups)])
        >>> speed.factors()  # not 4: the other group's rate is the limit
        {'weight': 3.0}
        >>> speed.detach()
    """

    def __init__(self) -> None:
        self._dims: dict[str, tuple[int, int]] = {}  # states before the first cut, and now
        self._model: nn.Module | None = None
        self._homes: dict[str, nn.Module] = {}  # looked up once, as every step asks for them
        self._optimizers: Sequence[Optimizer] = ()
        self._hooks = ExitStack()
        self._held: dict[int, tuple[list[Held], list[int]]] = {}  # what optimizers hold, by id

    def follow(self, names: Iterable[str], old_dim: int, new_dim: int) -> None:
        """Take note that a layer's states have become fewer, or more again.

        Args:
            names: of its parameters that consist of states.
            old_dim: states before, counted as N if these parameters were never cut before.
            new_dim: states now; N ends it.
        """
        self._held.clear()
        for name in names:
            full, _ = self._dims.get(name, (old_dim, old_dim))
            self._dims[name] = (full, new_dim)
            if new_dim >= full:
                del self._dims[name]

    def followed(self, path: str) -> list[str]:
        """The names of the followed parameters inside a layer."""
        return [name for name in self._dims if is_inside(name, path)]

    def attach(self, model: nn.Module, optimizers: Iterable[Optimizer]) -> None:
        """Watch the steps of these optimizers until :meth:`detach`.

        Args:
            model: the one that the names are relative to.
            optimizers: all that may hold its parameters.

        Raises:
            CheckpointError: if the model has no parameter of a followed name.
        """
        self.detach()
        known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        if strangers := sorted(self._dims.keys() - known):
            raise CheckpointError(
                f"expected parameters of the model whose steps to lengthen, got {strangers}, which "
                "it has not. The callback's state is of another model: load the weights alone, by "
                "load_compressed(model, path)."
            )
        self._model, self._optimizers = model, list(optimizers)
        for optimizer in self._optimizers:
            if _unit(optimizer):
                stretch = Stretch(partial(self.held, optimizer), partial(self.factor, optimizer))
                self._hooks.callback(optimizer.register_step_pre_hook(stretch.keep).remove)
                self._hooks.callback(optimizer.register_step_post_hook(stretch.extend).remove)

    def detach(self) -> None:
        """Let go of model and optimizers."""
        self._hooks.close()
        self._homes.clear()
        self._held.clear()
        self._model, self._optimizers = None, ()

    def left_alone(self) -> list[str]:
        """The classes of attached optimizers that hold followed parameters and are left alone."""
        ratios = self._ratios()
        return sorted(
            {
                type(optimizer).__name__
                for optimizer in self._optimizers
                if not _unit(optimizer)
                and any(
                    id(p) in ratios for group in optimizer.param_groups for p in group["params"]
                )
            }
        )

    def factors(self) -> dict[str, float]:
        """Parameter name -> by what its next update is multiplied; only those above 1."""
        by_id = {id(parameter): name for name, parameter in self._parameters()}
        return {
            by_id[id(parameter)]: float(factor)
            for optimizer in self._optimizers
            if _unit(optimizer)
            for held in self.held(optimizer)
            for parameter in held.parameters
            if float(factor := self.factor(optimizer, held)) > 1
        }

    def held(self, optimizer: Optimizer) -> list[Held]:
        """The followed parameters of an optimizer, as many together as have a factor in common.

        Looked up anew after changes only, since a step of a small model is short.
        """
        now = [id(parameter) for _, parameter in self._parameters()]
        found, then = self._held.get(id(optimizer), ([], now))
        if not found or now != then or any(held.outdated for held in found):
            found = list(self._look_up(optimizer))
            self._held[id(optimizer)] = found, now
        return found

    def _look_up(self, optimizer: Optimizer) -> Iterator[Held]:
        ratios = self._ratios()
        for group in optimizer.param_groups if ratios else ():
            alike: dict[float, list[int]] = defaultdict(list)
            for place, parameter in enumerate(group["params"]):
                if id(parameter) in ratios:
                    alike[ratios[id(parameter)]].append(place)
            for ratio, places in alike.items():
                yield Held(group, ratio, places)

    def factor(self, optimizer: Optimizer, held: Held) -> float | Tensor:
        """By what the next update of parameters may be multiplied, at least 1."""
        return _at_most(_limit(held.group, self._others(optimizer, held.group)), held.ratio)

    def _others(self, optimizer: Optimizer, own: Mapping[str, Any]) -> Iterator[float | Tensor]:
        """The rates of the other groups that train something, counted in the same unit."""
        for other in self._optimizers:
            if _unit(other) != _unit(optimizer):
                continue
            for group in other.param_groups:
                if group is not own and any(p.requires_grad for p in group["params"]):
                    yield _rate(group)

    def _ratios(self) -> dict[int, float]:
        """Id of each followed parameter -> N / r."""
        return {
            id(parameter): self._dims[name][0] / self._dims[name][1]
            for name, parameter in self._parameters()
        }

    def _parameters(self) -> Iterator[tuple[str, Tensor]]:
        """As they are now: a reduction or a rollback may have put new objects in their place."""
        if self._model is not None:
            for name in self._dims:
                path, _, key = name.rpartition(".")
                if path not in self._homes:
                    self._homes[path] = self._model.get_submodule(path)
                yield name, getattr(self._homes[path], key)

    def __getstate__(self) -> dict[str, Any]:
        """A copy, or another process, attaches itself to what it has."""
        return vars(LearningSpeed()) | {"_dims": dict(self._dims)}

    def state_dict(self) -> dict[str, list[int]]:
        """Parameter name -> states before the first cut, and now."""
        return {name: list(dims) for name, dims in self._dims.items()}

    def load_state_dict(self, state: Mapping[str, Sequence[int]]) -> None:
        """Go on from a saved state.

        Args:
            state: what :meth:`state_dict` gave.
        """
        self._held.clear()
        self._dims = {name: (full, now) for name, (full, now) in state.items()}


def _consists_of_states(old: torch.Size, new: torch.Size, old_dim: int, new_dim: int) -> bool:
    changed = [(a, b) for a, b in zip(old, new, strict=False) if a != b]
    return (
        len(old) == len(new)
        and bool(changed)
        and all(a * new_dim == b * old_dim for a, b in changed)
    )


def _unit(optimizer: Optimizer) -> str:
    """What its rates count in; empty where the rule does not hold or the class is not known.

    By the function: a subclass with a step of its own is another optimizer.
    """
    return _unit_of(type(optimizer).step)


@functools.cache
def _unit_of(step: Callable[..., Any]) -> str:
    return _UNITS.get(inspect.unwrap(step), "")


def _rate(group: Mapping[str, Any]) -> float | Tensor:
    """Of a group; a tensor only where reading it would wait for a device."""
    rate: float | Tensor = group["lr"]
    return rate.item() if torch.is_tensor(rate) and rate.device.type == "cpu" else rate


def _limit(own: Mapping[str, Any], others: Iterable[float | Tensor]) -> float | Tensor:
    """How many times the own rate is the highest other one; at least 1."""
    rate, rates = _rate(own), list(others)
    device = next((r.device for r in (rate, *rates) if torch.is_tensor(r)), None)
    if device is None:
        return max(1.0, max(rates, default=0.0) / rate) if rate > 0 else 1.0
    fastest = torch.stack([torch.zeros((), device=device).add(r) for r in (0.0, *rates)]).max()
    return torch.nan_to_num(fastest / rate, nan=1.0).clamp(min=1.0)


def _at_most(limit: float | Tensor, ratio: float) -> float | Tensor:
    return limit.clamp(max=ratio) if torch.is_tensor(limit) else min(limit, ratio)
