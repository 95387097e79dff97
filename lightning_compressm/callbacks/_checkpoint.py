"""Reading what callbacks keep in checkpoints: all of it is checked before any of it is taken up."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_compressm import _plain
from lightning_compressm.callbacks.schedule import Window
from lightning_compressm.errors import CheckpointError
from lightning_compressm.model.snapshot import Snapshot
from lightning_compressm.reduction.decision import Decision
from lightning_compressm.reduction.events import LayerEvent
from lightning_compressm.surgery.moments import misfit

__all__ = [
    "CallbackState",
    "check_optimizer_states",
    "read_spectra",
    "read_state",
]

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
    epoch: int
    sequences: dict[str, Any]
    trial: dict[str, Any]
    rollback: dict[str, Any]
    speed: dict[str, list[int]]
    pending: Decision | None


def read_state(saved: object) -> CallbackState:
    """The state of a :class:`CompreSSMCallback`, out of a checkpoint.

    Raises:
        CheckpointError: naming the entry that is missing or damaged.
    """
    return CallbackState(
        window=_entry(saved, "window", _window),
        history=_entry(saved, "history", _history),
        looks=_entry(saved, "looks", _plain.count),
        looked_at_step=_entry(saved, "looked_at_step", _plain.integer),
        epoch=_entry(saved, "epoch", _plain.integer),
        sequences=_entry(saved, "sequences", _sequences),
        trial=_entry(saved, "trial", _trial),
        rollback=_entry(saved, "rollback", _rollback),
        speed=_entry(saved, "speed", _speed),
        pending=_entry(saved, "pending", _pending),
    )


def read_spectra(saved: object) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The history and the sequences of a :class:`HankelMonitor`.

    Raises:
        CheckpointError: naming the entry that is missing or damaged.
    """
    return _entry(saved, "history", _spectra), _entry(saved, "sequences", _sequences)


def _sequences(value: Any) -> dict[str, Any]:
    """What is known of the sequences."""
    lengths = _plain.mapping(value["lengths"]).items()
    return {"lengths": {_plain.text(name): _plain.count(length) for name, length in lengths}}


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
    start, end, *looks = value
    return Window(
        _plain.integer(start), _plain.integer(end), tuple(_plain.integer(step) for step in looks)
    )


def _history(value: Any) -> list[dict[str, Any]]:
    return [LayerEvent.from_dict(event).to_dict() for event in _plain.items(value)]


def _spectra(value: Any) -> list[dict[str, Any]]:
    for look in _plain.items(value):
        _plain.integer(look["step"])
        _plain.integer(look["epoch"])
        _plain.tensors(look["spectra"])
    return [dict(look) for look in value]


def _trial(value: Any) -> dict[str, Any]:
    """The states at the start, the losses of the latest steps, and that of the first look."""
    starts = _plain.mapping(value["starts"]).items()
    return {
        "starts": {_plain.text(name): _plain.count(state_dim) for name, state_dim in starts},
        "losses": [_plain.number(loss) for loss in _plain.items(value["losses"])],
        "reference": None if value["reference"] is None else _plain.number(value["reference"]),
    }


def _pending(value: Any) -> Decision | None:
    return None if value is None else Decision.from_dict(value)


def _speed(value: Any) -> dict[str, list[int]]:
    """States before the first cut, and now, of each parameter whose steps are lengthened."""
    dims = {_plain.text(name): _plain.items(pair) for name, pair in _plain.mapping(value).items()}
    for full, now in dims.values():
        if not 1 <= _plain.integer(now) < _plain.integer(full):
            raise ValueError(f"expected fewer states than {full}, at least 1; got {now}")
    return dims


def _rollback(value: Any) -> dict[str, Any]:
    saved = _plain.mapping(value)
    if saved["reference"] is not None:
        _plain.number(saved["reference"])
    _plain.text(saved["verdict"])
    _plain.flag(saved["stopped"])
    if saved["file"] is not None:
        _plain.text(saved["file"])
    if saved["snapshot"] is not None:
        Snapshot.from_dict(saved["snapshot"])
    return saved
