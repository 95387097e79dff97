"""The contract of every family as checks: for the package's own families and for anybody's.

Needs torch only. Each check raises an AssertionError that says what was expected and what came.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_compressm.compressor import apply_proposal, compress
from lightning_compressm.control import Reduction, balanced_truncation
from lightning_compressm.errors import CompreSSMError
from lightning_compressm.families import Family, find_family
from lightning_compressm.families._base import tensor_of
from lightning_compressm.surgery.loading import install_resize_hooks, load_compressed

__all__ = ["CONTRACT", "check_family"]

Check = Callable[[Family], None]

CONTRACT: dict[str, Check] = {}
"""Name of each point of the contract -> its check, e.g. for ``pytest.mark.parametrize``."""


def check_family(family: Family | type[Family]) -> None:
    """Run every check of the contract on a family, with its own example layer.

    Args:
        family: a registered family, or its class; :meth:`Family.example` gives the layer.

    Raises:
        AssertionError: names every point that does not hold, and why.

    Example:
        >>> from lightning_compressm.families import registered_families
        >>> check_family(registered_families()["LRU"])
    """
    instance = family() if isinstance(family, type) else family
    failures: list[str] = []
    for name, check in CONTRACT.items():
        try:
            check(instance)
        except Exception as error:
            kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
            failures.append(f"- {name}: {kind}{error}")
    if failures:
        summary = f"{type(instance).__name__} breaks {len(failures)} of {len(CONTRACT)} points:"
        raise AssertionError("\n".join([summary, *failures]))


def _point(check: Check) -> Check:
    """Add a check to the contract; it runs with a seed of its own."""

    def seeded(family: Family) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            check(family)

    name = check.__name__.strip("_")
    seeded.__name__, seeded.__doc__ = name, check.__doc__
    CONTRACT[name] = seeded
    return seeded


@_point
def _is_recognised(family: Family) -> None:
    """The registry finds the family for its example layer, and for nothing plainer."""
    layer, _ = family.example()
    found = find_family(layer)
    _expect(
        type(found) is type(family),
        f"find_family gives {type(found).__name__} for the example layer; expected "
        f"{type(family).__name__}. Decorate the class with @register_family, and look at matches()",
    )
    for other in (nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)), nn.Identity()):
        _expect(not family.matches(other), f"matches() accepts {type(other).__name__}")


@_point
def _full_order_changes_nothing(family: Family) -> None:
    """All states kept: the output stays (relative 1e-10 in float64, 1e-4 in float32)."""
    for double, tolerance in ((True, 1e-10), (False, 1e-4)):
        layer, inputs = _example(family, double=double)
        before = _run(layer, inputs)
        _reduce(family, layer, family.state_dim(layer))
        error = (_run(layer, inputs) - before).norm() / before.norm()
        _expect(
            float(error) <= tolerance,
            f"the output changed by {float(error):.2g} (relative) in {before.dtype} although all "
            f"states were kept; expected at most {tolerance}. system() and write() do not agree",
        )


@_point
def _error_stays_below_the_bound(family: Family) -> None:
    """Output error in L2 <= 2 sum(discarded sigma) * input in L2, for every input."""
    original, inputs = _example(family, double=True)
    n = family.state_dim(original)
    for order in sorted({1, n // 2, n - 1} - {0}):
        layer = deepcopy(original)
        bound = _reduce(family, layer, order).bound
        assert bound is not None
        for _ in range(4):
            inputs = torch.randn_like(inputs)
            error = float((_run(layer, inputs) - _run(original, inputs)).norm() / inputs.norm())
            limit = float(bound.max()) * (1 + 1e-6) + 1e-10
            _expect(
                error <= limit,
                f"{n} -> {order} states: output error {error:.3g} times the input, above the bound "
                f"{limit:.3g}. system() does not describe what the layer computes",
            )


@_point
def _training_goes_on(family: Family) -> None:
    """Every new parameter gets a gradient and is changed by the next step of the optimizer."""
    layer, inputs = _example(family)
    bystander = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.AdamW([*layer.parameters(), bystander], lr=1e-2, weight_decay=0.0)
    for _ in range(2):
        _train_step(layer, inputs, optimizer)
    _reduce(family, layer, _half(family, layer), optimizer)
    parameters = dict(layer.named_parameters())
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    expected = {id(p) for p in (*parameters.values(), bystander)}
    _expect(held == expected, "the optimizer does not hold exactly the model's parameters")
    strangers = [tuple(p.shape) for p in optimizer.state if id(p) not in expected]
    _expect(not strangers, f"the optimizer keeps state of old parameters, shapes {strangers}")
    before = {name: p.detach().clone() for name, p in parameters.items()}
    _train_step(layer, inputs, optimizer)
    for name, parameter in parameters.items():
        gradient = parameter.grad
        _expect(gradient is not None and bool(gradient.any()), f"no gradient reaches '{name}'")
        _expect(bool(torch.isfinite(parameter).all()), f"'{name}' is not finite after a step")
        _expect(not torch.equal(parameter, before[name]), f"a step does not change '{name}'")


@_point
def _checkpoints_load_at_full_size(family: Family) -> None:
    """A reduced layer's state dict loads into a new full-size layer, which then computes the same.

    Through :func:`load_compressed`, and through ``load_state_dict`` once the hooks are installed;
    and a full-size state dict loads into a reduced layer.
    """
    layer, inputs = _example(family)
    full_state = deepcopy(layer.state_dict())
    full_outputs, n = _run(layer, inputs), family.state_dim(layer)
    _reduce(family, layer, _half(family, layer))
    fresh = [_example(family)[0] for _ in range(2)]
    load_compressed(nn.Sequential(fresh[0]), nn.Sequential(layer).state_dict())
    install_resize_hooks(fresh[1])
    fresh[1].load_state_dict(layer.state_dict())
    for way, loaded in zip(("load_compressed", "load_state_dict"), fresh, strict=True):
        _expect_dim(family, loaded, family.state_dim(layer), f"after {way}")
        same = torch.equal(_run(loaded, inputs), _run(layer, inputs))
        _expect(same, f"{way} into a full-size layer gives other outputs")
    load_compressed(layer, full_state)
    _expect_dim(family, layer, n, "after loading a full-size checkpoint")
    same = torch.equal(_run(layer, inputs), full_outputs)
    _expect(same, "a full-size checkpoint in a reduced layer gives other outputs")


@_point
def _surroundings_survive(family: Family) -> None:
    """Type, device, frozenness, attributes, ties, hooks, names and mode stay as they were."""
    for double in (False, True):
        layer, inputs = _example(family, double=double)
        names = list(family.state_axes(layer))
        root, calls = _surround(layer, names)
        before = {name: _traits(tensor) for name, tensor in _tensors(layer).items()}
        order = _half(family, layer)
        _reduce(family, layer, order, root=root, prefix="layer")
        _expect_dim(family, layer, order, "after a reduction")
        after = {name: _traits(tensor) for name, tensor in _tensors(layer).items()}
        _expect(after == before, f"traits of the tensors changed: {before} became {after}")
        for name, twin in zip(names, root.get_submodule("twins").children(), strict=True):
            _expect(tensor_of(twin, "it") is tensor_of(layer, name), f"'{name}' is no longer tied")
        _run(layer, inputs)
        _expect(len(calls) == 1, f"a forward hook fired {len(calls)} times in one call")
        _expect(not any(m.training for m in root.modules()), "the layer left evaluation mode")


@_point
def _step_follows(family: Family) -> None:
    """Where there is ``step(x, state)``, it equals the parallel form after a reduction."""
    layer, inputs = _example(family, double=True)
    if not (hasattr(layer, "step") and hasattr(layer, "initial_state")):
        return
    _reduce(family, layer, _half(family, layer))
    stepped, parallel = _run_steps(layer, inputs, family.length_dim), _run(layer, inputs)
    error = float((stepped - parallel).abs().max() / parallel.abs().max())
    _expect(error <= 1e-8, f"step() differs from the parallel form by {error:.2g} (relative)")


@_point
def _refusals_change_nothing(family: Family) -> None:
    """A parametrized tensor and NaN are refused with the package's errors, before any change."""
    for break_it, what in ((_parametrize, "a parametrized tensor"), (_poison, "NaN")):
        layer, _ = _example(family)
        break_it(layer, next(iter(family.state_axes(layer))))
        tensors = _tensors(layer)
        before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        try:
            compress(layer, state_dim=1)
        except CompreSSMError:
            pass
        else:
            raise AssertionError(f"{what} is not refused; expected a CompreSSMError")
        same = all(
            tensor is tensors[name] and _identical(tensor, before[name])
            for name, tensor in _tensors(layer).items()
        )
        _expect(same, f"{what} is refused only after the layer was changed")


def _expect(holds: bool, message: str) -> None:
    if not holds:
        raise AssertionError(message)


def _expect_dim(family: Family, layer: nn.Module, order: int, when: str) -> None:
    got = family.state_dim(layer)
    _expect(got == order, f"state dimension {got} {when}; expected {order}")
    for name, dim in family.state_axes(layer).items():
        size = tensor_of(layer, name).shape[dim]
        _expect(size == order, f"'{name}' has size {size} along {dim} {when}; expected {order}")


def _example(family: Family, *, double: bool = False) -> tuple[nn.Module, Tensor]:
    layer, inputs = family.example()
    if double:
        layer._apply(_widened)  # type: ignore[no-untyped-call]
        inputs = _widened(inputs)
    return layer, inputs


def _widened(tensor: Tensor) -> Tensor:
    if tensor.is_complex():
        return tensor.to(torch.complex128)
    return tensor.double() if tensor.is_floating_point() else tensor


def _run(layer: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return _first_tensor(layer(inputs))


@torch.no_grad()
def _run_steps(layer: Any, inputs: Tensor, length_dim: int) -> Tensor:
    state, outputs = layer.initial_state(inputs.shape[0]), []
    for x in inputs.unbind(length_dim):
        y, state = layer.step(x, state)
        outputs.append(y)
    return torch.stack(outputs, length_dim)


def _first_tensor(outputs: Any) -> Tensor:
    tensor: Tensor = outputs[0] if isinstance(outputs, tuple | list) else outputs
    return tensor


def _train_step(layer: nn.Module, inputs: Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    outputs = _first_tensor(layer(inputs))
    loss = (outputs - torch.ones_like(outputs)).abs().square().mean()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def _half(family: Family, layer: nn.Module) -> int:
    return max(1, family.state_dim(layer) // 2)


def _reduce(
    family: Family,
    layer: nn.Module,
    order: int,
    *optimizers: torch.optim.Optimizer,
    root: nn.Module | None = None,
    prefix: str = "",
) -> Reduction:
    """Reduce ``layer``, which ``root`` calls ``prefix``, to ``order`` states."""
    system = family.system(layer)
    balance = "real" if system.real_output else "complex"
    reduction = balanced_truncation(system, order, balance=balance)  # type: ignore[arg-type]
    plan = family.reduction_plan(layer, reduction).prefixed(prefix)
    apply_proposal(layer if root is None else root, plan, optimizers)
    return reduction


def _tensors(layer: nn.Module) -> dict[str, Tensor]:
    return dict(layer.named_parameters()) | dict(layer.named_buffers())


def _surround(layer: nn.Module, names: list[str]) -> tuple[nn.Module, list[None]]:
    """Put a layer into a model that shares its tensors, and leave marks on it."""
    twins = nn.ModuleList()
    for name in names:
        tensor, twin = tensor_of(layer, name), nn.Module()
        if isinstance(tensor, nn.Parameter):
            tensor.mark = name  # type: ignore[attr-defined]
            twin.register_parameter("it", tensor)
        else:
            twin.register_buffer("it", tensor)
        twins.append(twin)
    next(layer.parameters()).requires_grad_(False)
    calls: list[None] = []
    layer.register_forward_hook(lambda *_: calls.append(None))
    return nn.ModuleDict({"layer": layer, "twins": twins}).eval(), calls


def _traits(tensor: Tensor) -> tuple[object, ...]:
    mark = getattr(tensor, "mark", None)
    return type(tensor), tensor.dtype, tensor.device, tensor.requires_grad, tensor.ndim, mark


def _identical(a: Tensor, b: Tensor) -> bool:
    """Equal, NaN counted as equal to NaN."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a[~a.isnan()], b[~b.isnan()])


def _parametrize(layer: nn.Module, name: str) -> None:
    path, _, key = name.rpartition(".")
    parametrize.register_parametrization(layer.get_submodule(path), key, nn.Identity())


def _poison(layer: nn.Module, name: str) -> None:
    with torch.no_grad():
        tensor_of(layer, name).view(-1)[0] = float("nan")
