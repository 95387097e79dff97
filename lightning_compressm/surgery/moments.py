"""How an optimizer's per-parameter state follows a change of basis.

Gradients are covectors: with x = T x' the gradient of x' is T^H times that of x. Momentum-like
state is a sum of gradients and follows the same matrices; second moments follow their squares
(the diagonal of J diag(v) J^T); step sizes and other magnitudes keep their mean. What is known by
no name is only ever sliced.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_compressm._precision import double
from lightning_compressm.surgery.apply import Replacement
from lightning_compressm.surgery.plan import Combine, Contract, Select, real_parts, take

__all__ = ["misfit", "transport_states", "truncate_state", "unknown_keys"]

State = dict[str, Any]

_FIRST = {"exp_avg", "momentum_buffer", "grad_avg", "prev"}
_SECOND = {"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "variance", "row_var", "col_var"}
_POINT = {"ax"}
_MAGNITUDE = {"exp_inf", "step_size", "acc_delta"}
_REFILLED = 2.0  # times the old mean: too large only makes the next steps smaller


def transport_states(
    replaced: Mapping[str, Replacement], states: Mapping[str, State]
) -> dict[str, State]:
    """New optimizer state for every replaced tensor that has state.

    Args:
        replaced: tensor name -> what replaced it.
        states: tensor name -> the optimizer's state of the old tensor.

    Returns:
        Tensor name -> state. A name is missing where nothing could be carried, so that the
        optimizer starts that parameter afresh.

    Example:
        >>> transport_states({}, {})
        {}
    """
    states = {name: _centred(state) for name, state in states.items()}
    order = sorted(states, key=lambda name: isinstance(replaced[name].edit.moments, Contract))
    carried: dict[str, State] = {}
    for name in order:
        state = _transport_one(name, replaced, states, carried)
        if state is not None:
            carried[name] = state
    return {name: _uncentred(state) for name, state in carried.items()}


def truncate_state(replacement: Replacement, state: State) -> State | None:
    """The leading entries of every state tensor, whatever the basis (as published).

    Args:
        replacement: the old and the new tensor.
        state: the optimizer's state of the old tensor.

    Returns:
        The truncated state, or ``None`` where a state tensor does not have the parameter's shape.

    Example:
        >>> import torch
        >>> from lightning_compressm.surgery.plan import TensorEdit
        >>> new = torch.zeros(2)
        >>> truncate_state(Replacement(torch.zeros(4), new, TensorEdit(new)), {"a": torch.ones(4)})
        {'a': tensor([1., 1.])}
    """
    result: State = {}
    for key, value in state.items():
        if _keeps(value, replacement.old):
            result[key] = _copied(value)
        elif _follows(value, replacement.old):
            sizes = [min(v, n) for v, n in zip(value.shape, replacement.new.shape, strict=True)]
            result[key] = value[tuple(slice(size) for size in sizes)].clone()
        else:
            return None
    return result


def unknown_keys(replaced: Mapping[str, Replacement], states: Mapping[str, State]) -> set[str]:
    """State that can't be carried into a new basis, since its name says nothing of what it is.

    Args:
        replaced: tensor name -> what replaced it.
        states: tensor name -> the optimizer's state of the old tensor.

    Example:
        >>> import torch
        >>> from lightning_compressm.surgery.plan import TensorEdit
        >>> replacement = Replacement(torch.zeros(4), torch.zeros(2), TensorEdit(torch.zeros(2)))
        >>> unknown_keys({"w": replacement}, {"w": {"z": torch.ones(4), "exp_avg": torch.ones(4)}})
        {'z'}
    """
    return {
        key
        for name, state in states.items()
        if not isinstance(replaced[name].edit.moments, Select)
        for key, value in state.items()
        if _kind(key) == "unknown" and not _keeps(value, replaced[name].old)
    }


def misfit(state: State, parameter: Tensor) -> str | None:
    """The first of the well-known state tensors that can't belong to ``parameter``, if any.

    Example:
        >>> misfit({"exp_avg": torch.zeros(4, 3)}, torch.zeros(2, 3))
        'exp_avg'
    """
    known = _FIRST | _SECOND | _POINT | _MAGNITUDE
    return next(
        (
            key
            for key, value in state.items()
            if key in known and not _keeps(value, parameter) and not _follows(value, parameter)
        ),
        None,
    )


def _transport_one(
    name: str,
    replaced: Mapping[str, Replacement],
    states: Mapping[str, State],
    carried: Mapping[str, State],
) -> State | None:
    replacement = replaced[name]
    result: State = {}
    for key, value in states[name].items():
        if _keeps(value, replacement.old):
            result[key] = _copied(value)
        elif not _follows(value, replacement.old):
            return None
        else:
            new = _transport_tensor(name, key, replaced, states, carried)
            if new is None:
                return None
            result[key] = new.to(value.dtype).contiguous()
    return result


def _transport_tensor(
    name: str,
    key: str,
    replaced: Mapping[str, Replacement],
    states: Mapping[str, State],
    carried: Mapping[str, State],
) -> Tensor | None:
    replacement = replaced[name]
    value: Tensor = states[name][key]
    rule, kind = replacement.edit.moments, _kind(key)
    if isinstance(rule, Select):
        if value.shape[rule.dim] != replacement.old.shape[rule.dim]:
            return value.clone()
        return take(value, rule.dim, rule.index)
    if kind == "unknown":  # see `unknown_keys`
        return None
    if kind == "point":
        return replacement.new.detach().clone()
    if isinstance(rule, Combine) and kind in ("first", "second"):
        return _combine(name, key, rule, kind, replaced, states)
    if isinstance(rule, Contract) and kind == "first":
        return _contract(key, rule, value, carried)
    scale = 1.0 if kind == "magnitude" or isinstance(rule, Combine) else _REFILLED
    return _refill(replacement, value, 0.0 if kind == "first" else scale)


def _combine(
    name: str,
    key: str,
    rule: Combine,
    kind: str,
    replaced: Mapping[str, Replacement],
    states: Mapping[str, State],
) -> Tensor:
    value: Tensor = states[name][key]
    if value.shape[rule.dim] == 1 != replaced[name].old.shape[rule.dim]:
        return value.clone()  # already averaged over the dimension that changes (Adafactor)
    sources: dict[str, Tensor] = {}
    for source, state in states.items():
        if torch.is_tensor(state.get(key)):
            sources.update(real_parts(source, state[key]))
    parts = [
        _combine_part(rule.dim, rule.parts[part], kind, sources, real_parts(name, value))
        for part in sorted(rule.parts, reverse=True)  # ":re" before ":im"
    ]
    return torch.complex(*parts) if len(parts) == 2 else parts[0]


def _combine_part(
    dim: int,
    matrices: Mapping[str, Tensor],
    kind: str,
    sources: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
) -> Tensor:
    like = next(iter(own.values()))
    total, weight = torch.zeros(()), torch.zeros(())
    for source, matrix in matrices.items():
        if source not in sources:
            continue  # frozen, or not yet stepped: it has no moments to contribute
        values = double(sources[source])
        m = double(matrix).to(values.device)
        m = m.square() if kind == "second" else m
        moved = torch.tensordot(m, values, ([1], [dim])).movedim(0, dim)
        total, weight = total + moved, weight + m.abs().sum(1)
    if kind == "second":  # a state made new, out of no old one, starts from the mean
        empty = (weight == 0).nonzero().flatten()
        total = total.index_fill(dim, empty, float(double(like).mean()))
    return total.to(like)


def _contract(key: str, rule: Contract, value: Tensor, carried: Mapping[str, State]) -> Tensor:
    total = torch.zeros(())
    moments: dict[str, Tensor] = {}
    for source, state in carried.items():
        if torch.is_tensor(state.get(key)):
            moments.update(real_parts(source, state[key]))
    for source, weights in rule.weights.items():
        if source in moments:
            values = double(moments[source])
            total = total + (weights.to(values.device) * values).sum(rule.dim)
    size = next(iter(rule.weights.values())).shape[0]
    return total.to(value.device).expand(size).clone()


def _refill(replacement: Replacement, value: Tensor, scale: float) -> Tensor:
    shape = [
        new if size == old else size
        for size, old, new in zip(
            value.shape, replacement.old.shape, replacement.new.shape, strict=True
        )
    ]
    return value.new_full(shape, scale * double(value).mean().item() if scale else 0.0)


def _centred(state: State) -> State:
    """Centred RMSprop's square_avg as a variance: carried apart it could fall below grad_avg^2."""
    if not torch.is_tensor(state.get("grad_avg")) or "square_avg" not in state:
        return state
    return state | {"square_avg": state["square_avg"] - _squared(state["grad_avg"])}


def _uncentred(state: State) -> State:
    if not torch.is_tensor(state.get("grad_avg")) or "square_avg" not in state:
        return state
    return state | {"square_avg": state["square_avg"] + _squared(state["grad_avg"])}


def _squared(value: Tensor) -> Tensor:
    """Squares of the real parts, as optimizers form them."""
    if not value.is_complex():
        return value.square()
    return torch.view_as_complex(torch.view_as_real(value).square())


def _copied(value: Any) -> Any:
    """A copy: the next step counts in place, and undoing must find the old count."""
    return value.clone() if torch.is_tensor(value) else value


def _kind(key: str) -> str:
    for kind, names in (
        ("first", _FIRST),
        ("second", _SECOND),
        ("point", _POINT),
        ("magnitude", _MAGNITUDE),
    ):
        if key in names:
            return kind
    if not key.startswith("exp_avg"):
        return "unknown"
    return "second" if key.endswith("_sq") else "first"


def _keeps(value: Any, old: Tensor) -> bool:
    """Step counters, flags and other things without the parameter's shape."""
    return not torch.is_tensor(value) or (value.numel() == 1 and value.shape != old.shape)


def _follows(value: Tensor, old: Tensor) -> bool:
    """Each dimension of the state is the parameter's, or 1."""
    return value.ndim == old.ndim and all(
        size in (1, full) for size, full in zip(value.shape, old.shape, strict=True)
    )
