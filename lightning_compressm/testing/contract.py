"""The contract of every family as checks: for the package's own families and for anybody's.

Needs torch only. Each check raises an AssertionError that says what was expected and what came.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lightning_compressm.compressor import compress
from lightning_compressm.errors import CalibrationError, CompreSSMError
from lightning_compressm.families import Family, FamilyBase, SelectiveFamily, find_family
from lightning_compressm.families._base import tensor_of
from lightning_compressm.model.loading import load_compressed
from lightning_compressm.model.resizing import install_resize_hooks
from lightning_compressm.surgery.plan import take
from lightning_compressm.testing import helpers as common
from lightning_compressm.testing.helpers import expect

__all__ = ["CONTRACT", "check_family"]

Check = Callable[[FamilyBase], None]

CONTRACT: dict[str, Check] = {}
"""Name of each point of the contract -> its check, e.g. for ``pytest.mark.parametrize``."""

# In float64; a family whose states are normalised together need only come close, by one state.
_EXACT, _CLOSE = 1e-10, 0.5


def check_family(family: FamilyBase | type[FamilyBase]) -> None:
    """Run every check of the contract on a family, with its own example layer.

    A point that is about layers of another kind (linear or selective) always holds.

    Args:
        family: a registered :class:`Family` or :class:`SelectiveFamily`, or its class; its method
            ``example`` gives the layer.

    Raises:
        AssertionError: names every point that does not hold, and why.

    Example:
        >>> from lightning_compressm.families import registered_families
        >>> check_family(registered_families()["LRU"])
        >>> list(CONTRACT)[:2]
        ['is_recognised', 'full_order_changes_nothing']
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

    def seeded(family: FamilyBase) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            check(family)

    name = check.__name__.strip("_")
    seeded.__name__, seeded.__doc__ = name, check.__doc__
    CONTRACT[name] = seeded
    return seeded


@_point
def _is_recognised(family: FamilyBase) -> None:
    """The registry finds the family for its example layer, and for nothing plainer."""
    layer, _ = family.example()
    found = find_family(layer)
    expect(
        type(found) is type(family),
        f"find_family gives {type(found).__name__} for the example layer; expected "
        f"{type(family).__name__}. Decorate the class with @register_family, and look at matches()",
    )
    for other in (nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)), nn.Identity()):
        expect(not family.matches(other), f"matches() accepts {type(other).__name__}")


@_point
def _full_order_changes_nothing(family: FamilyBase) -> None:
    """All states kept: the output stays (relative 1e-10 in float64, 1e-4 in float32)."""
    blamed = "system() and write() do not agree"
    if isinstance(family, SelectiveFamily):
        blamed = "state_entries() leaves some out, or changes their order"
    for double, tolerance in ((True, 1e-10), (False, 1e-4)):
        layer, inputs = common.example(family, double=double)
        before = common.run(layer, inputs)
        common.reduce(family, layer, family.state_dim(layer))
        error = common.relative(common.run(layer, inputs), before)
        expect(
            error <= tolerance,
            f"the output changed by {error:.2g} (relative) in {before.dtype} although all "
            f"states were kept; expected at most {tolerance}. {blamed}",
        )


@_point
def _error_stays_below_the_bound(family: FamilyBase) -> None:
    """Linear layers: L2 norm of the output error <= 2 sum(discarded sigma) * that of any input."""
    if not isinstance(family, Family):
        return
    original, inputs = common.example(family, double=True)
    n = family.state_dim(original)
    for order in sorted({1, n // 2, n - 1} - {0}):
        layer = deepcopy(original)
        bound = common.truncate(family, layer, order).bound
        assert bound is not None
        for _ in range(4):
            inputs = torch.randn_like(inputs)
            change = common.run(layer, inputs) - common.run(original, inputs)
            error = float(change.norm() / inputs.norm())
            limit = float(bound.max()) * (1 + 1e-6) + 1e-10
            expect(
                error <= limit,
                f"{n} -> {order} states: output error {error:.3g} times the input, above the bound "
                f"{limit:.3g}. system() does not describe what the layer computes",
            )


@_point
def _states_that_are_not_read_do_not_matter(family: FamilyBase) -> None:
    """Selective layers: the output stays if only states go that C does not read.

    To a relative 1e-10 in float64; where B and C are normalised over the states (``approximate``),
    within a half if one state goes.
    """
    if not isinstance(family, SelectiveFamily):
        return
    layer, inputs = common.example(family, double=True)
    n = family.state_dim(layer)
    kept = n - 1 if family.approximate else common.half(family, layer)
    keep, lost = common.stop_reading(family, layer, kept)
    before, C = common.run(layer, inputs), _readout(family, layer, inputs)
    unread = not bool(take(C, 2, lost).any())
    expect(unread, "signals() gives a C that is not zero where readout_entries() are")
    common.drop(family, layer, keep)
    error = common.relative(common.run(layer, inputs), before)
    limit = _CLOSE if family.approximate else _EXACT
    expect(
        error <= limit,
        f"the output changed by {error:.2g} (relative) although only states went that C does not "
        f"read; expected at most {limit}. state_entries() mixes states up",
    )


@_point
def _signals_follow_the_states(family: FamilyBase) -> None:
    """Selective layers: a reduced layer's signals are those of the states that it kept."""
    if not isinstance(family, SelectiveFamily) or family.approximate:
        return
    layer, inputs = common.example(family, double=True)
    with torch.no_grad():
        before = family.signals(layer, inputs).double()
        keep, _ = common.random_states(family, layer, common.half(family, layer))
        common.drop(family, layer, keep)
        after = family.signals(layer, inputs).double()
    A = before.A if before.A.shape[-1] == 1 else take(before.A, 2, keep)
    wanted = {
        "dt": before.dt,
        "A": A,
        "B": take(before.B.movedim(2, 0), 3, keep).movedim(0, 2),
        "C": take(before.C.movedim(2, 0), 3, keep).movedim(0, 2),
        "x": before.x,
        "weight": before.weight,
    }
    for name, value in wanted.items():
        error = common.relative(getattr(after, name), value)
        expect(
            error <= _EXACT,
            f"'{name}' of signals() differs by {error:.2g} (relative) from that of the kept states "
            "before; expected the same. state_entries() and signals() do not agree",
        )


@_point
def _the_refit_helps(family: FamilyBase) -> None:
    """Selective layers: with the refit the output is no farther away than without."""
    if not isinstance(family, SelectiveFamily):
        return
    original, inputs = common.example(family)
    wanted, errors = common.run(original, inputs), []
    for refit in (True, False):
        layer = deepcopy(original)
        compress(
            layer,
            state_dim=common.half(family, layer),
            sample=inputs,
            refit=refit,
            max_output_error=None,
        )
        errors.append(common.relative(common.run(layer, inputs), wanted))
    expect(
        errors[0] <= errors[1] * (1 + 1e-6),
        f"relative output error {errors[0]:.3g} with the refit, {errors[1]:.3g} without. "
        "signals() does not describe what the layer computes, or write_readout() writes elsewhere",
    )


@_point
def _training_goes_on(family: FamilyBase) -> None:
    """Every new parameter gets a gradient and is changed by the next step of the optimizer."""
    layer, inputs = common.example(family)
    bystander = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.AdamW([*layer.parameters(), bystander], lr=1e-2, weight_decay=0.0)
    for _ in range(2):
        common.train_step(layer, inputs, optimizer)
    common.reduce(family, layer, common.half(family, layer), optimizer)
    parameters = dict(layer.named_parameters())
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    expected = {id(p) for p in (*parameters.values(), bystander)}
    expect(held == expected, "the optimizer does not hold exactly the model's parameters")
    strangers = [tuple(p.shape) for p in optimizer.state if id(p) not in expected]
    expect(not strangers, f"the optimizer keeps state of old parameters, shapes {strangers}")
    before = {name: p.detach().clone() for name, p in parameters.items()}
    common.train_step(layer, inputs, optimizer)
    for name, parameter in parameters.items():
        gradient = parameter.grad
        expect(gradient is not None and bool(gradient.any()), f"no gradient reaches '{name}'")
        expect(bool(torch.isfinite(parameter).all()), f"'{name}' is not finite after a step")
        expect(not torch.equal(parameter, before[name]), f"a step does not change '{name}'")


@_point
def _checkpoints_load_at_full_size(family: FamilyBase) -> None:
    """A reduced layer's state dict loads into a new full-size layer, which then computes the same.

    Through :func:`load_compressed`, and through ``load_state_dict`` once the hooks are installed;
    and a full-size state dict loads into a reduced layer.
    """
    layer, inputs = common.example(family)
    full_state = deepcopy(layer.state_dict())
    full_outputs, n = common.run(layer, inputs), family.state_dim(layer)
    common.reduce(family, layer, common.half(family, layer))
    fresh = [common.example(family)[0] for _ in range(2)]
    load_compressed(nn.Sequential(fresh[0]), nn.Sequential(layer).state_dict())
    install_resize_hooks(fresh[1])
    fresh[1].load_state_dict(layer.state_dict())
    for way, loaded in zip(("load_compressed", "load_state_dict"), fresh, strict=True):
        common.expect_dim(family, loaded, family.state_dim(layer), f"after {way}")
        same = torch.equal(common.run(loaded, inputs), common.run(layer, inputs))
        expect(same, f"{way} into a full-size layer gives other outputs")
    load_compressed(layer, full_state)
    common.expect_dim(family, layer, n, "after loading a full-size checkpoint")
    same = torch.equal(common.run(layer, inputs), full_outputs)
    expect(same, "a full-size checkpoint in a reduced layer gives other outputs")


@_point
def _surroundings_survive(family: FamilyBase) -> None:
    """Type, device, frozenness, attributes, ties, hooks, names and mode stay as they were."""
    for double in (False, True):
        layer, inputs = common.example(family, double=double)
        names = list(family.state_axes(layer))
        root, calls = common.surround(layer, names)
        before = {name: common.traits(t) for name, t in common.tensors_of(layer).items()}
        order = common.half(family, layer)
        common.reduce(family, layer, order, root=root, prefix="layer")
        common.expect_dim(family, layer, order, "after a reduction")
        after = {name: common.traits(t) for name, t in common.tensors_of(layer).items()}
        expect(after == before, f"traits of the tensors changed: {before} became {after}")
        for name, twin in zip(names, root.get_submodule("twins").children(), strict=True):
            expect(tensor_of(twin, "it") is tensor_of(layer, name), f"'{name}' is no longer tied")
        common.run(layer, inputs)
        expect(len(calls) == 1, f"a forward hook fired {len(calls)} times in one call")
        expect(not any(m.training for m in root.modules()), "the layer left evaluation mode")


@_point
def _averages_follow(family: FamilyBase) -> None:
    """An average that holds the layer's own values computes what the reduced layer computes."""
    layer, inputs = common.example(family, double=True)
    average = AveragedModel(layer)
    root = nn.ModuleDict({"layer": layer, "average": average})
    order = common.half(family, layer)
    common.reduce(family, layer, order, root=root, prefix="layer")
    common.expect_dim(family, average.module, order, "in an average of the layer")
    wanted = common.run(layer, inputs)
    error = common.relative(common.run(average.module, inputs), wanted)
    expect(
        error <= 1e-8,
        f"an average of the same values gives an output that differs by {error:.2g} (relative); "
        "expected the same. reduction_plan() and projected_plan() do not agree",
    )


@_point
def _step_follows(family: FamilyBase) -> None:
    """Where there is ``step(x, state)``, it equals the parallel form after a reduction."""
    layer, inputs = common.example(family, double=True)
    if not (hasattr(layer, "step") and hasattr(layer, "initial_state")):
        return
    common.reduce(family, layer, common.half(family, layer))
    stepped = common.run_steps(layer, inputs, family.length_dim)
    parallel = common.run(layer, inputs)
    error = float((stepped - parallel).abs().max() / parallel.abs().max())
    expect(error <= 1e-8, f"step() differs from the parallel form by {error:.2g} (relative)")


@_point
def _refusals_change_nothing(family: FamilyBase) -> None:
    """What can't be reduced is refused with the package's errors, before any change.

    That is a parametrized tensor, NaN, and a selective layer without calibration data.
    """
    layer, _ = common.example(family)
    first = next(iter(family.state_axes(layer)))
    common.parametrize_tensor(layer, first)
    _expect_refusal(family, layer, "a parametrized tensor")
    layer, _ = common.example(family)
    common.poison(layer, first)
    _expect_refusal(family, layer, "NaN")
    if isinstance(family, SelectiveFamily):
        layer, _ = common.example(family)
        _expect_refusal(family, layer, "a missing sample", CalibrationError, sample=False)


def _expect_refusal(
    family: FamilyBase,
    layer: nn.Module,
    what: str,
    wanted: type[CompreSSMError] = CompreSSMError,
    *,
    sample: bool = True,
) -> None:
    inputs = common.example(family)[1] if sample else None
    tensors = common.tensors_of(layer)
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    try:
        compress(layer, state_dim=1, sample=inputs)
    except wanted:
        pass
    else:
        raise AssertionError(f"{what} is not refused; expected a {wanted.__name__}")
    now = common.tensors_of(layer)
    same = all(tensor is tensors.get(name) for name, tensor in now.items())
    expect(
        same and common.identical(now, before),
        f"{what} is refused only after the layer was changed",
    )


def _readout(family: SelectiveFamily, layer: nn.Module, inputs: Tensor) -> Tensor:
    """C of each group's states, (groups, batch L, N)."""
    with torch.no_grad():
        return family.signals(layer, inputs).C.movedim(2, 0).flatten(1, 2)
