"""Values of a model, its optimizers and averages, to go back to after a change of shape."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_compressm import _plain
from lightning_compressm._undo import all_or_nothing
from lightning_compressm.errors import SurgeryError
from lightning_compressm.model.resizing import resize_all_plan
from lightning_compressm.surgery.apply import Replacement, apply_plan
from lightning_compressm.surgery.optimizer import rebind_optimizers
from lightning_compressm.surgery.plan import SurgeryPlan, TensorEdit

__all__ = ["Snapshot"]


@dataclass(frozen=True, eq=False)
class Snapshot:
    """Copies in host memory, as plain data.

    Learning rates and whatever else schedulers change are not part of it: a schedule goes on.

    Attributes:
        model: name -> parameter or buffer, also those that a state dict leaves out.
        optimizers: for each optimizer, position of a parameter -> its state.
        averages: the same as ``model`` for each averaged copy.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> snapshot = Snapshot.take(layer)
        >>> _ = nn.init.zeros_(layer.weight)
        >>> snapshot.restore(layer)
        >>> bool(layer.weight.any())
        True
    """

    model: Mapping[str, Tensor]
    optimizers: Sequence[Mapping[int, Any]] = field(default_factory=list)
    averages: Sequence[Mapping[str, Tensor]] = field(default_factory=list)

    @staticmethod
    def take(
        model: nn.Module,
        optimizers: Iterable[Optimizer] = (),
        averages: Iterable[nn.Module] = (),
    ) -> Snapshot:
        """Copy everything to host memory."""
        return Snapshot(
            _values(model),
            [_states(optimizer) for optimizer in optimizers],
            [_values(average) for average in averages],
        )

    def restore(
        self,
        model: nn.Module,
        optimizers: Iterable[Optimizer] = (),
        averages: Iterable[nn.Module] = (),
        undo: ExitStack | None = None,
    ) -> None:
        """Bring all of it back, in the shapes of then; or leave everything as it is.

        Args:
            model: the one that the snapshot was taken of.
            optimizers: as many as then, in the same order.
            averages: as many as then, in the same order.
            undo: is given what takes it back.

        Raises:
            SurgeryError: if models or optimizers are not those of the snapshot.
        """
        optimizers, averages = list(optimizers), list(averages)
        self._check(optimizers, averages)
        with all_or_nothing(undo) as steps:
            replaced = _restore_values(model, self.model, steps)
            rebind_optimizers(optimizers, replaced, "reset", steps)
            for optimizer, states in zip(optimizers, self.optimizers, strict=True):
                _restore_states(optimizer, states)
            for average, values in zip(averages, self.averages, strict=True):
                _restore_values(average, values, steps)

    def _check(self, optimizers: Sequence[Optimizer], averages: Sequence[nn.Module]) -> None:
        for what, now, then in (
            ("optimizers", len(optimizers), len(self.optimizers)),
            ("averaged models", len(averages), len(self.averages)),
        ):
            if now != then:
                raise SurgeryError(
                    f"expected {then} {what} as when the state was kept, got {now}; nothing was "
                    "changed. Resume with the optimizers and callbacks that the run had."
                )

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and CPU tensors (loads with ``weights_only=True``)."""
        return {
            "model": dict(self.model),
            "optimizers": [dict(states) for states in self.optimizers],
            "averages": [dict(values) for values in self.averages],
        }

    @staticmethod
    def from_dict(data: object) -> Snapshot:
        """The inverse of :meth:`to_dict`.

        Raises:
            TypeError: or ``KeyError``, if the data is damaged.
        """
        saved = _plain.mapping(data)
        optimizers = [
            {_plain.integer(i): _plain.mapping(state) for i, state in _plain.mapping(one).items()}
            for one in saved["optimizers"]
        ]
        averages = [_plain.tensors(average) for average in saved["averages"]]
        return Snapshot(_plain.tensors(saved["model"]), optimizers, averages)


def _tensors(module: nn.Module, *, all_names: bool = False) -> dict[str, Tensor]:
    """Parameters and buffers; one that has several names comes once, unless all are wanted."""
    once = not all_names
    parameters = module.named_parameters(remove_duplicate=once)
    return {**dict(parameters), **dict(module.named_buffers(remove_duplicate=once))}


def _values(module: nn.Module) -> dict[str, Tensor]:
    return {name: _kept(tensor) for name, tensor in _tensors(module).items()}


def _states(optimizer: Optimizer) -> dict[int, Any]:
    return {
        position: _kept(optimizer.state[parameter])
        for position, parameter in enumerate(_parameters(optimizer))
        if optimizer.state.get(parameter)
    }


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _kept(value: Any) -> Any:
    """A copy in host memory, also of the tensors in dicts and lists."""
    if torch.is_tensor(value):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _kept(item) for key, item in value.items()}
    return [_kept(item) for item in value] if isinstance(value, list | tuple) else value


def _restore_values(
    module: nn.Module, saved: Mapping[str, Tensor], steps: ExitStack
) -> dict[str, Replacement]:
    """New objects where the shape is another one, new values elsewhere."""
    now = _tensors(module)
    if now.keys() != saved.keys():
        raise SurgeryError(
            "expected the model whose state was kept, got one with other parameters or buffers: "
            f"{sorted(now.keys() ^ saved.keys())}; nothing was changed."
        )
    saved_of = {id(tensor): saved[name] for name, tensor in now.items()}
    # Under all their names: each of two tied layers has to get its state dimension back.
    every_name = {
        name: saved_of[id(tensor)] for name, tensor in _tensors(module, all_names=True).items()
    }
    resized = resize_all_plan(module, every_name, "")
    edits = {
        name: TensorEdit(every_name[name], edit.moments) for name, edit in resized.edits.items()
    }
    replaced = apply_plan(module, SurgeryPlan(edits, resized.attributes), steps)
    changed = {id(replacement.old) for replacement in replaced.values()}
    with torch.no_grad():
        for name, tensor in now.items():
            if id(tensor) not in changed:
                steps.callback(_value_restorer(tensor, tensor.detach().clone()))
                tensor.copy_(saved[name])
    return replaced


def _value_restorer(tensor: Tensor, before: Tensor) -> Callable[[], None]:
    def restore() -> None:
        with torch.no_grad():
            tensor.copy_(before)

    return restore


def _restore_states(optimizer: Optimizer, states: Mapping[int, Any]) -> None:
    for group, parameter, position in _positions(optimizer):
        if position in states:
            optimizer.state[parameter] = {
                key: _placed(value, key, group, parameter)
                for key, value in states[position].items()
            }
        else:
            optimizer.state.pop(parameter, None)


def _positions(optimizer: Optimizer) -> list[tuple[dict[str, Any], Tensor, int]]:
    pairs = [(group, p) for group in optimizer.param_groups for p in group["params"]]
    return [(group, p, position) for position, (group, p) in enumerate(pairs)]


def _placed(value: Any, key: str, group: Mapping[str, Any], parameter: Tensor) -> Any:
    """On the parameter's device, but for step counts that are read by the host."""
    if torch.is_tensor(value):
        on_device = group.get("capturable") or group.get("fused") or key != "step"
        return value.to(parameter.device if on_device else "cpu", copy=True)
    if isinstance(value, dict):
        return {name: _placed(item, key, group, parameter) for name, item in value.items()}
    if isinstance(value, list):
        return [_placed(item, key, group, parameter) for item in value]
    return value
