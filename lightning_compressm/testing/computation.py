"""What a reduced layer computes: points of the contract."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor, nn

from lightning_compressm.compressor import compress
from lightning_compressm.control import DiagonalLTI
from lightning_compressm.families import Family, FamilyBase, SelectiveFamily, find_family
from lightning_compressm.surgery.plan import take
from lightning_compressm.testing import helpers as common
from lightning_compressm.testing._points import point
from lightning_compressm.testing.helpers import expect

# In float64; a family whose states are normalised together need only come close, by one state.
_EXACT, _CLOSE = 1e-10, 0.5


@point
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


@point
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


@point
def _error_stays_below_the_bound(family: FamilyBase) -> None:
    """Linear layers: L2 norm of the output error <= 2 sum(discarded sigma) * that of any input.

    Where no bound is known, the layer computes what the reduction says.
    """
    if not isinstance(family, Family):
        return
    original, inputs = common.example(family, double=True)
    n = family.state_dim(original)
    for order in sorted({1, n // 2, n - 1} - {0}):
        layer = deepcopy(original)
        reduction = common.truncate(family, layer, order)
        if reduction.bound is None:
            _computes(family, layer, reduction.system)
            continue
        bound = reduction.bound
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


def _computes(family: Family, layer: nn.Module, system: DiagonalLTI) -> None:
    frequencies = torch.linspace(0, torch.pi, 32, dtype=torch.float64)
    with torch.no_grad():
        response = family.system(layer).frequency_response(frequencies)
    error = common.relative(response, system.frequency_response(frequencies))
    expect(
        error <= _EXACT,
        f"the frequency response of the reduced layer differs by {error:.2g} (relative) from that "
        f"of the reduced system; expected at most {_EXACT}. The plan writes something else",
    )


@point
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


@point
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


@point
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


def _readout(family: SelectiveFamily, layer: nn.Module, inputs: Tensor) -> Tensor:
    """C of each group's states, (groups, batch L, N)."""
    with torch.no_grad():
        return family.signals(layer, inputs).C.movedim(2, 0).flatten(1, 2)
