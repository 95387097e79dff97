"""A change of a model written down as data: it can be checked, broadcast, saved and undone.

A :class:`SurgeryPlan` names tensors and attributes of a module and says what each becomes. For
every tensor it also says how an optimizer's moments follow (a *moment rule*), because the new
parameters usually live in another basis than the old ones.

A complex tensor ``B`` counts as two real parts, ``B:re`` and ``B:im``: optimizers treat them as
two real numbers as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_compressm import _plain
from lightning_compressm.errors import SurgeryError

__all__ = ["Combine", "Contract", "MomentRule", "Refill", "Select", "SurgeryPlan", "TensorEdit"]


@dataclass(frozen=True, eq=False)
class Select:
    """Moments are picked by index along ``dim``, exactly as the tensor's own entries.

    ``index`` has one dimension, or two where each slice along dimension 0 has entries of its own.

    Example:
        >>> import torch
        >>> Select(0, torch.tensor([2, 0])).index.tolist()
        [2, 0]
    """

    dim: int
    index: Tensor


@dataclass(frozen=True, eq=False)
class Combine:
    """First moments are real-linear combinations of old ones along ``dim``.

    ``parts`` maps each real part of the new tensor (``""``, or ``":re"`` and ``":im"`` of a
    complex one) to ``{source part: matrix (new, old)}``. Second moments follow with the squared
    matrices, the diagonal approximation of ``J diag(v) J^T``.

    Example:
        >>> import torch
        >>> rule = Combine(0, {"": {"B_re": torch.eye(2), "B_im": torch.zeros(2, 2)}})
        >>> sorted(rule.parts[""])
        ['B_im', 'B_re']
    """

    dim: int
    parts: Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True, eq=False)
class Contract:
    """First moment = sum over sources of ``(weights * new source moment).sum(dim)``.

    For a gain g in ``B~ = g B`` the chain rule gives ``dL/d log g = sum_h <dL/dB, B>``: a
    contraction of moments that were carried already. Second moments are refilled.

    Example:
        >>> import torch
        >>> Contract(1, {"B": torch.ones(2, 3)}).dim
        1
    """

    dim: int
    weights: Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Refill:
    """First moments start at zero, second moments at twice their old mean.

    For coordinates whose gradients have no linear transport (eigenvalues); a larger second moment
    only makes the first steps after a reduction smaller.

    Example:
        >>> Refill()
        Refill()
    """


MomentRule = Select | Combine | Contract | Refill
_RULES: dict[str, type[Any]] = {
    "select": Select,
    "combine": Combine,
    "contract": Contract,
    "refill": Refill,
}


@dataclass(frozen=True, eq=False)
class TensorEdit:
    """The new value of one parameter or buffer, and how optimizer moments follow it.

    Example:
        >>> import torch
        >>> TensorEdit(torch.zeros(4)).moments
        Refill()
    """

    value: Tensor
    moments: MomentRule = field(default_factory=Refill)


@dataclass(frozen=True, eq=False)
class SurgeryPlan:
    """What becomes of named tensors and attributes, relative to some module.

    Attributes:
        edits: dotted tensor name -> :class:`TensorEdit`.
        attributes: dotted attribute name -> new value (numbers, strings, tensors).
        projections: module name -> named tensors with which the family of that layer lets a copy of
            it, with other values (an average of the weights), follow.

    Example:
        >>> import torch
        >>> plan = SurgeryPlan({"nu_log": TensorEdit(torch.zeros(4))}, {"d_state": 4})
        >>> sorted(plan.prefixed("net.lru").edits)
        ['net.lru.nu_log']
    """

    edits: Mapping[str, TensorEdit] = field(default_factory=dict)
    attributes: Mapping[str, Any] = field(default_factory=dict)
    projections: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        """Whether the plan changes anything."""
        return bool(self.edits or self.attributes)

    def prefixed(self, prefix: str) -> SurgeryPlan:
        """The same plan seen from a parent in which this module is called ``prefix``."""
        return _prefixed(self, prefix)

    @staticmethod
    def merge(parts: Iterable[tuple[str, SurgeryPlan]]) -> SurgeryPlan:
        """One plan out of several that touch different names.

        Args:
            parts: where a module lives, and the plan that is relative to it.

        Raises:
            SurgeryError: if two plans name the same tensor.
        """
        edits: dict[str, TensorEdit] = {}
        attributes: dict[str, Any] = {}
        projections: dict[str, Mapping[str, Tensor]] = {}
        for prefix, part in parts:
            plan = _prefixed(part, prefix)
            if twice := edits.keys() & plan.edits.keys():
                raise SurgeryError(f"expected each tensor in one plan; got {sorted(twice)} twice.")
            edits.update(plan.edits)
            attributes.update(plan.attributes)
            projections.update(plan.projections)
        return SurgeryPlan(edits, attributes, projections)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, strings, numbers and CPU tensors (loads with ``weights_only=True``)."""
        edits = {
            name: {"value": edit.value, **_rule_to_dict(edit.moments)}
            for name, edit in self.edits.items()
        }
        projections = {name: dict(tensors) for name, tensors in self.projections.items()}
        data: dict[str, Any] = {"edits": edits, "attributes": dict(self.attributes)}
        on_cpu: dict[str, Any] = _on_cpu(data | {"projections": projections})
        return on_cpu

    @staticmethod
    def from_dict(data: object) -> SurgeryPlan:
        """The inverse of :meth:`to_dict`.

        Raises:
            TypeError: or ``KeyError``, if the data is damaged.
        """
        saved = _plain.mapping(data)
        edits = {
            _plain.text(name): TensorEdit(_plain.tensor(entry["value"]), _rule_of(entry))
            for name, entry in _plain.mapping(saved["edits"]).items()
        }
        attributes = {_plain.text(k): v for k, v in _plain.mapping(saved["attributes"]).items()}
        projections = {
            _plain.text(name): _plain.tensors(tensors)
            for name, tensors in _plain.mapping(saved["projections"]).items()
        }
        return SurgeryPlan(edits, attributes, projections)


def _prefixed(plan: SurgeryPlan, prefix: str) -> SurgeryPlan:
    if not prefix:
        return plan
    edits = {
        f"{prefix}.{name}": TensorEdit(edit.value, _prefix_rule(edit.moments, prefix))
        for name, edit in plan.edits.items()
    }
    attributes = {f"{prefix}.{name}": value for name, value in plan.attributes.items()}
    projections = {_joined(prefix, name): p for name, p in plan.projections.items()}
    return SurgeryPlan(edits, attributes, projections)


def _rule_to_dict(rule: MomentRule) -> dict[str, Any]:
    kind = next(name for name, cls in _RULES.items() if isinstance(rule, cls))
    moments = dict(vars(rule))
    if isinstance(rule, Combine):
        moments["parts"] = {part: dict(sources) for part, sources in rule.parts.items()}
    if isinstance(rule, Contract):
        moments["weights"] = dict(rule.weights)
    return {"rule": kind, "moments": moments}


def _rule_of(entry: Mapping[str, Any]) -> MomentRule:
    rule: MomentRule = _RULES[entry["rule"]](**entry["moments"])
    if not isinstance(rule, Refill):
        _plain.integer(rule.dim)
    if isinstance(rule, Select):
        _plain.tensor(rule.index)
    elif isinstance(rule, Combine):
        for sources in _plain.mapping(rule.parts).values():
            _plain.tensors(sources)
    elif isinstance(rule, Contract):
        _plain.tensors(rule.weights)
    return rule


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if name else prefix


def _on_cpu(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _on_cpu(item) for key, item in value.items()}
    # Copies: torch.save refuses views of one storage as different types (B, and its real part).
    return value.detach().cpu().clone() if torch.is_tensor(value) else value


def _prefix_rule(rule: MomentRule, prefix: str) -> MomentRule:
    if isinstance(rule, Combine):
        parts = {
            part: {f"{prefix}.{source}": matrix for source, matrix in sources.items()}
            for part, sources in rule.parts.items()
        }
        return Combine(rule.dim, parts)
    if isinstance(rule, Contract):
        weights = {f"{prefix}.{source}": w for source, w in rule.weights.items()}
        return Contract(rule.dim, weights)
    return rule


def take(tensor: Tensor, dim: int, index: Tensor) -> Tensor:
    """The entries ``index`` along ``dim``; of each slice along dimension 0 its own if it is 2-D.

    Example:
        >>> import torch
        >>> take(torch.tensor([[1, 2], [3, 4]]), 1, torch.tensor([[1], [0]])).tolist()
        [[2], [3]]
    """
    index = index.to(tensor.device)
    if index.ndim == 1:
        return tensor.index_select(dim, index)
    slices = zip(tensor, index, strict=True)
    return torch.stack([part.index_select(dim - 1, own) for part, own in slices])


def real_parts(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """``{name: tensor}``, or the views ``name:re`` and ``name:im`` of a complex tensor.

    Example:
        >>> import torch
        >>> sorted(real_parts("B", torch.zeros(2, dtype=torch.complex64)))
        ['B:im', 'B:re']
    """
    if not tensor.is_complex():
        return {name: tensor}
    pair = torch.view_as_real(tensor)
    return {f"{name}:re": pair[..., 0], f"{name}:im": pair[..., 1]}
