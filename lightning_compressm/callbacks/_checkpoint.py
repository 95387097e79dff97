"""Reading what callbacks keep in checkpoints: all of it is checked before any of it is taken up."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_compressm.callbacks.schedule import Window
from lightning_compressm.errors import CheckpointError
from lightning_compressm.model.snapshot import Snapshot
from lightning_compressm.reduction.events import LayerEvent
from lightning_compressm.surgery.moments import misfit
from lightning_compressm.surgery.plan import (
    Combine,
    Contract,
    MomentRule,
    Refill,
    Select,
    SurgeryPlan,
)

__all__ = [
    "CallbackState",
    "Pending",
    "check_optimizer_states",
    "pending_to_dict",
    "read_sequences",
    "read_spectra",
    "read_state",
]

Pending = tuple[SurgeryPlan, list[LayerEvent]]

_ADVICE = (
    "The state is none that this version has saved: use another checkpoint, or take the weights "
    "alone, by load_compressed(model, path)."
)
_DAMAGED = (AttributeError, IndexError, KeyError, TypeError, ValueError)


@dataclass(frozen=True)
class CallbackState:
    """What :class:`CompreSSMCallback` goes on from."""

    window: Window | None
    history: list[dict[str, Any]]
    looks: int
    looked_at_step: int
    sequences: dict[str, Any]
    rollback: dict[str, Any]
    pending: Pending | None


def read_state(saved: object) -> CallbackState:
    """The state of a :class:`CompreSSMCallback`, out of a checkpoint.

    Raises:
        CheckpointError: naming the entry that is missing or damaged.
    """
    return CallbackState(
        window=_entry(saved, "window", _window),
        history=_entry(saved, "history", _history),
        looks=_entry(saved, "looks", _count),
        looked_at_step=_entry(saved, "looked_at_step", _integer),
        sequences=_entry(saved, "sequences", read_sequences),
        rollback=_entry(saved, "rollback", _rollback),
        pending=_entry(saved, "pending", _pending),
    )


def pending_to_dict(pending: Pending | None) -> dict[str, Any] | None:
    """What was decided and not carried out yet, as plain types and tensors."""
    if pending is None:
        return None
    plan, events = pending
    return {"plan": plan.to_dict(), "events": [event.to_dict() for event in events]}


def read_spectra(saved: object) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The history and the sequences of a :class:`HankelMonitor`.

    Raises:
        CheckpointError: naming the entry that is missing or damaged.
    """
    return _entry(saved, "history", _looks), _entry(saved, "sequences", read_sequences)


def read_sequences(value: Any) -> dict[str, Any]:
    """What is known of the sequences."""
    lengths = {_text(name): _count(length) for name, length in _mapping(value["lengths"]).items()}
    return {"lengths": lengths, "seen": _count(value["seen"])}


def check_optimizer_states(optimizers: Iterable[Optimizer], model: nn.Module) -> None:
    """Refuse restored state of another shape than the parameters, which torch does not look at.

    Raises:
        CheckpointError: naming the parameter.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            key = misfit(state, parameter) if isinstance(state, dict) else None
            if key is not None:
                raise CheckpointError(
                    f"the checkpoint's optimizer state '{key}' of '{names.get(id(parameter))}' "
                    f"does not fit: expected shape {tuple(parameter.shape)}, got "
                    f"{tuple(state[key].shape)}. Its weights are of another model or another time; "
                    "load them alone, by load_compressed(model, path), and train from there."
                )


def _entry(saved: object, name: str, read: Callable[[Any], Any]) -> Any:
    if not isinstance(saved, Mapping):
        raise CheckpointError(
            f"expected the callback's state as a mapping, got {type(saved).__name__}. " + _ADVICE
        )
    if name not in saved:
        raise CheckpointError(f"the callback's state has no '{name}'. {_ADVICE}")
    try:
        return read(saved[name])
    except _DAMAGED as error:
        raise CheckpointError(
            f"the callback's state is damaged in '{name}' ({type(error).__name__}: {error}). "
            + _ADVICE
        ) from error


def _window(value: Any) -> Window | None:
    if value is None:
        return None
    start, end = value
    return Window(_integer(start), _integer(end))


def _history(value: Any) -> list[dict[str, Any]]:
    return [_event(event).to_dict() for event in _list(value)]


def _looks(value: Any) -> list[dict[str, Any]]:
    for look in _list(value):
        _integer(look["step"])
        _integer(look["epoch"])
        _check_tensors(look["spectra"])
    return [dict(look) for look in value]


def _pending(value: Any) -> Pending | None:
    if value is None:
        return None
    plan = SurgeryPlan.from_dict(_mapping(value["plan"]))
    for name, edit in plan.edits.items():
        _text(name)
        _tensor(edit.value)
        _check_rule(edit.moments)
    for name in (*plan.attributes, *plan.projections):
        _text(name)
    for tensors in plan.projections.values():
        _check_tensors(tensors)
    events = [_event(event) for event in _list(value["events"])]
    if not events:
        raise ValueError("a plan without events")
    return plan, events


def _rollback(value: Any) -> dict[str, Any]:
    saved = _mapping(value)
    if saved["reference"] is not None:
        _number(saved["reference"])
    _text(saved["verdict"])
    if not isinstance(saved["stopped"], bool):
        raise TypeError(f"expected True or False, got {type(saved['stopped']).__name__}")
    if saved["file"] is not None:
        _text(saved["file"])
    if saved["snapshot"] is not None:
        _check_snapshot(Snapshot.from_dict(_mapping(saved["snapshot"])))
    return saved


def _check_tensors(values: Any) -> None:
    for name, tensor in _mapping(values).items():
        _text(name)
        _tensor(tensor)


def _check_snapshot(snapshot: Snapshot) -> None:
    for values in (snapshot.model, *snapshot.averages):
        _check_tensors(values)
    for states in snapshot.optimizers:
        for position, state in _mapping(states).items():
            _integer(position)
            _mapping(state)


def _check_rule(rule: MomentRule) -> None:
    if not isinstance(rule, Refill):
        _integer(rule.dim)
    if isinstance(rule, Select):
        _tensor(rule.index)
    elif isinstance(rule, Combine):
        matrices = [m for part in _mapping(rule.parts).values() for m in _mapping(part).values()]
        for matrix in matrices:
            _tensor(matrix)
    elif isinstance(rule, Contract):
        for weights in _mapping(rule.weights).values():
            _tensor(weights)
    if isinstance(rule, Contract | Refill):
        _number(rule.scale)


def _event(value: Any) -> LayerEvent:
    event = LayerEvent(**_mapping(value))
    for text in (event.layer, event.family, event.action, event.reason, event.balance):
        _text(text)
    for count in (event.old_state_dim, event.new_state_dim, event.step, event.epoch):
        _integer(count)
    for number in (event.energy_kept, event.seconds):
        _number(number)
    for optional in (event.error_bound, event.output_error, event.horizon):
        if optional is not None:
            _number(optional)
    return event


def _expect(value: Any, kind: type | tuple[type, ...], name: str) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"expected {name}, got {type(value).__name__}")
    return value


def _list(value: Any) -> list[Any]:
    return list(_expect(value, list, "a list"))


def _mapping(value: Any) -> dict[str, Any]:
    return dict(_expect(value, Mapping, "a mapping"))


def _text(value: Any) -> str:
    return str(_expect(value, str, "text"))


def _tensor(value: Any) -> None:
    _expect(value, Tensor, "a tensor")


def _number(value: Any) -> None:
    _expect(value, (int, float), "a number")


def _integer(value: Any) -> int:
    return int(_expect(value, int, "an integer"))


def _count(value: Any) -> int:
    if _integer(value) < 0:
        raise ValueError(f"expected a count, got {value}")
    return int(value)
