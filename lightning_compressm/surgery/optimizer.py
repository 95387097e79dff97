"""Bind optimizers to replaced parameters without making new optimizers.

Schedulers, gradient scalers and Lightning's wrappers hold on to the optimizer object and to its
parameter groups; so both stay, and only the tensors inside change.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from copy import copy
from inspect import signature
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import LBFGS, SGD, Adagrad, Optimizer

from lightning_compressm._undo import all_or_nothing
from lightning_compressm.errors import UnsupportedOptimizerError
from lightning_compressm.surgery.apply import Replacement
from lightning_compressm.surgery.moments import transport_states, truncate_state, unknown_keys

__all__ = [
    "OptimizerStatePolicy",
    "carry_gradients",
    "check_optimizer",
    "checked_optimizers",
    "rebind_optimizers",
]

OptimizerStatePolicy = Literal["transport", "truncate", "reset"]


def check_optimizer(optimizer: object) -> None:
    """Refuse optimizers whose state could not be carried over.

    Raises:
        UnsupportedOptimizerError: for anything but a plain :class:`torch.optim.Optimizer`, and for
            those that shard or flatten parameters, which would go silently wrong.

    Example:
        >>> import torch
        >>> check_optimizer(torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1))
    """
    name = type(optimizer).__name__
    if not isinstance(optimizer, Optimizer):
        raise UnsupportedOptimizerError(
            f"optimizers: expected torch.optim.Optimizer objects, got {name}. Pass the "
            "optimizer itself."
        )
    if any(cls.__name__ == "ZeroRedundancyOptimizer" for cls in type(optimizer).__mro__):
        raise UnsupportedOptimizerError(
            "ZeroRedundancyOptimizer shards its state by the parameters' sizes at construction; "
            "a reduction would train wrong parameters. Use a plain optimizer with DDP."
        )
    held = _held_parameters(optimizer)
    if held and not isinstance(optimizer, LBFGS):
        raise UnsupportedOptimizerError(
            f"{name} keeps its own references to parameters in {sorted(held)}; they would go stale "
            "after a reduction. Use an optimizer that reads `param_groups`, and keeps what belongs "
            "to a parameter in `state`."
        )


def checked_optimizers(optimizers: Iterable[Optimizer] | Optimizer) -> list[Optimizer]:
    """The optimizers as a list, all of a kind that can be carried along.

    Raises:
        UnsupportedOptimizerError: for anything else.

    Example:
        >>> checked_optimizers(())
        []
    """
    given: object = optimizers
    if not isinstance(given, Iterable | Optimizer):
        raise UnsupportedOptimizerError(
            f"optimizers: expected a list of torch.optim.Optimizer objects, got {given!r}. Leave "
            "it out if there are none."
        )
    listed = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
    for optimizer in listed:
        check_optimizer(optimizer)
    return listed


def rebind_optimizers(
    optimizers: Iterable[Optimizer] | Optimizer,
    replaced: Mapping[str, Replacement],
    policy: OptimizerStatePolicy = "transport",
    undo: ExitStack | None = None,
) -> None:
    """Point every optimizer at the new parameters and carry its state over.

    Args:
        optimizers: all optimizers that may hold replaced parameters, or the only one.
        replaced: what :func:`~lightning_compressm.surgery.apply.apply_plan` returned.
        policy: ``"transport"`` carries moments through the change of basis, ``"truncate"`` slices
            them by leading index, ``"reset"`` drops them. LBFGS always starts a new history,
            since it describes a space that no longer exists.
        undo: is given what takes the rebinding back.

    Raises:
        UnsupportedOptimizerError: before anything is changed.

    Example:
        >>> import torch
        >>> from lightning_compressm.surgery.apply import apply_plan
        >>> from lightning_compressm.surgery.plan import Select, SurgeryPlan, TensorEdit
        >>> layer = torch.nn.Linear(2, 4, bias=False)
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
        >>> keep = torch.tensor([0, 3])
        >>> edit = TensorEdit(layer.weight[keep], Select(0, keep))
        >>> rebind_optimizers([optimizer], apply_plan(layer, SurgeryPlan({"weight": edit})))
        >>> optimizer.param_groups[0]["params"][0] is layer.weight
        True
    """
    optimizers = checked_optimizers(optimizers)
    new_states = [_new_states(optimizer, replaced, policy) for optimizer in optimizers]
    with all_or_nothing(undo) as steps:
        for optimizer, states in zip(optimizers, new_states, strict=True):
            steps.callback(_restorer(optimizer))
            _swap(optimizer, replaced, states)


def carry_gradients(replaced: Mapping[str, Replacement]) -> None:
    """Give the new parameters the pending gradients of the old ones, in the new basis.

    Only for gradients that are still to be used (accumulated by hand across a reduction).
    """
    pending = {n: {"grad_avg": r.old.grad} for n, r in replaced.items() if _has_grad(r)}
    for name, state in transport_states(replaced, pending).items():
        replaced[name].new.grad = state["grad_avg"]


def _has_grad(replacement: Replacement) -> bool:
    return replacement.old.is_leaf and replacement.old.grad is not None


def _new_states(
    optimizer: Optimizer, replaced: Mapping[str, Replacement], policy: OptimizerStatePolicy
) -> dict[str, dict[str, Any]]:
    if isinstance(optimizer, LBFGS):
        return {}
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    states = {
        name: dict(optimizer.state[replacement.old])
        for name, replacement in replaced.items()
        if id(replacement.old) in held and optimizer.state.get(replacement.old)
    }
    if policy == "reset":
        return {n: _initial_state(optimizer, replaced[n], s) for n, s in states.items()}
    if policy == "transport":
        _tell_of(unknown_keys(replaced, states), optimizer)
        carried = transport_states(replaced, states)
    else:
        carried = {
            name: state
            for name, old in states.items()
            if (state := truncate_state(replaced[name], old)) is not None
        }
    for name in states.keys() - carried.keys():
        carried[name] = _initial_state(optimizer, replaced[name], states[name])
    return carried


_told: WeakKeyDictionary[Optimizer, set[str]] = WeakKeyDictionary()


def _tell_of(keys: set[str], optimizer: Optimizer) -> None:
    """Warn of state that is not known; once for each optimizer, whatever it is that has it."""
    told = _told.setdefault(optimizer, set())
    new = sorted(keys - told)
    told |= keys
    if new:
        warnings.warn(
            f"the state {', '.join(map(repr, new))} of {type(optimizer).__name__} is not known to "
            "follow gradients or their squares, so parameters in a new basis start theirs anew",
            stacklevel=2,
        )


def _initial_state(
    optimizer: Optimizer, replacement: Replacement, old: dict[str, Any]
) -> dict[str, Any]:
    """Empty where the optimizer fills missing state at its next step."""
    if isinstance(optimizer, SGD) and torch.is_tensor(old.get("momentum_buffer")):
        # Fused SGD does not mix parameters with and without momentum; zero is how it starts.
        return {"momentum_buffer": torch.zeros_like(replacement.new)}
    if isinstance(optimizer, Adagrad):  # up to torch 2.11 its constructor alone fills it
        group = next(g for g in optimizer.param_groups if _is_in(replacement.old, g["params"]))
        options = {k: v for k, v in group.items() if k in signature(Adagrad).parameters}
        return dict(Adagrad(**options | {"params": [replacement.new]}).state[replacement.new])
    return {}


def _is_in(tensor: Tensor, tensors: Iterable[Tensor]) -> bool:
    return any(one is tensor for one in tensors)


def _swap(
    optimizer: Optimizer, replaced: Mapping[str, Replacement], states: dict[str, dict[str, Any]]
) -> None:
    new_of = {id(r.old): r.new for r in replaced.values()}
    touched = False
    for group in optimizer.param_groups:
        params = group["params"]
        touched |= any(id(p) in new_of for p in params)
        params[:] = [new_of.get(id(p), p) for p in params]
    for name, replacement in replaced.items():
        optimizer.state.pop(replacement.old, None)
        if states.get(name):
            optimizer.state[replacement.new] = states[name]
    if touched and isinstance(optimizer, LBFGS):
        # It caches its parameter list and flat size, and would go on training the old tensors.
        optimizer.state.clear()
        optimizer._params = optimizer.param_groups[0]["params"]
        optimizer._numel_cache = None


def _restorer(optimizer: Optimizer) -> Callable[[], None]:
    """What gives an optimizer its parameters and its state of now back."""
    lists = [(group["params"], list(group["params"])) for group in optimizer.param_groups]
    state = copy(optimizer.state)
    extra = {k: v for k, v in vars(optimizer).items() if k in ("_params", "_numel_cache")}

    def restore() -> None:
        for params, old in lists:
            params[:] = old
        optimizer.state.clear()
        optimizer.state.update(state)
        vars(optimizer).update(extra)

    return restore


def _held_parameters(optimizer: Optimizer) -> set[str]:
    """Names of attributes other than param_groups and state that hold parameters, or their ids."""
    params = {id(p) for group in optimizer.param_groups for p in group["params"]}

    def holds(value: object) -> bool:
        if isinstance(value, Optimizer):
            items: Iterable[object] = [p for group in value.param_groups for p in group["params"]]
        elif isinstance(value, Mapping):
            items = [*value.keys(), *value.values()]
        else:
            items = value if isinstance(value, list | tuple | set) else [value]
        # An id is what those go by who key their buffers by parameter.
        ids = (id(item) if isinstance(item, Tensor) else item for item in items)
        return any(isinstance(item, int) and item in params for item in ids)

    own = {k: v for k, v in vars(optimizer).items() if k not in ("param_groups", "state")}
    return {name for name, value in own.items() if holds(value)}
