"""The contract, point by point, on every registered family; and that each check can fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compressm import register_family
from lightning_compressm.control import DiagonalLTI
from lightning_compressm.control.calibration import SelectiveSignals
from lightning_compressm.families import FamilyBase, SelectiveFamily, registered_families
from lightning_compressm.families.lru import LRUFamily
from lightning_compressm.families.mamba import MambaFamily
from lightning_compressm.families.mamba2 import Mamba2Family
from lightning_compressm.families.zamba import ZambaFamily
from lightning_compressm.surgery.plan import SurgeryPlan, TensorEdit
from lightning_compressm.testing import CONTRACT, check_family
from tests.families.layers import Decay, DecayFamily, PortedLRU

FAMILIES = registered_families()


class PortFamily(LRUFamily):
    """The same family with an example of the complex, looped kind."""

    def example(self, d_state: int = 8) -> tuple[nn.Module, Tensor]:
        return PortedLRU(3, 5, d_state), torch.randn(2, 12, 3)


@pytest.mark.parametrize("point", CONTRACT)
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_contract_of(family: FamilyBase, point: str):
    CONTRACT[point](family)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_check_family_accepts(family: FamilyBase):
    check_family(family)
    check_family(type(family))


@pytest.mark.parametrize("point", CONTRACT)
def test_contract_of_a_port_with_complex_matrices(point: str):
    register_family(PortFamily)
    CONTRACT[point](PortFamily())


@pytest.mark.parametrize("point", CONTRACT)
def test_contract_of_a_users_own_family(point: str):
    register_family(DecayFamily)
    CONTRACT[point](DecayFamily())


def test_every_check_draws_the_same_numbers_and_leaves_the_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    check_family(LRUFamily)
    assert torch.equal(torch.rand(4), expected)


# -- a family that breaks a point is caught, and the message names the point --------------------


def _wrong_scale(self: Any, module: nn.Module, system: DiagonalLTI) -> dict[str, Tensor]:
    values = DecayFamily.write(self, module, system)
    return values | {"leave": 2 * values["leave"]}


def _other_system(self: Any, module: nn.Module) -> DiagonalLTI:
    """Reads and writes a matrix a hundred times too small, so that full order still works."""
    system = DecayFamily.system(self, module)
    return DiagonalLTI(system.eigenvalues, system.B / 100, system.C)


def _other_system_back(self: Any, module: nn.Module, system: DiagonalLTI) -> dict[str, Tensor]:
    values = DecayFamily.write(self, module, system)
    return values | {"enter": 100 * values["enter"]}


def _forgets_a_tensor(self: Any, module: nn.Module, system: DiagonalLTI) -> dict[str, Tensor]:
    values = DecayFamily.write(self, module, system)
    return {name: value for name, value in values.items() if name != "leave"}


def _dead_output(self: Any, module: nn.Module, system: DiagonalLTI) -> dict[str, Tensor]:
    values = DecayFamily.write(self, module, system)
    return values if system.order == 8 else values | {"leave": 0 * values["leave"]}


def _no_resize(self: Any, module: nn.Module, state_dim: int) -> SurgeryPlan:
    return SurgeryPlan()


def _changes_early(self: Any, module: nn.Module, reduction: Any) -> SurgeryPlan:
    module.poles = nn.Parameter(module.poles[: reduction.order].detach().clone())
    return DecayFamily.reduction_plan(self, module, reduction)


def _replaces_by_hand(self: Any, module: nn.Module, reduction: Any) -> SurgeryPlan:
    """Assigns the tensors itself instead of handing them over as a plan."""
    for name, value in self.write(module, reduction.system).items():
        setattr(module, name, nn.Parameter(value.to(torch.complex64)))
    return SurgeryPlan({}, {"state_dim": reduction.order})


def _stale_poles(self: Any, module: nn.Module, reduction: Any) -> SurgeryPlan:
    plan = DecayFamily.reduction_plan(self, module, reduction)
    edits = dict(plan.edits)
    edits["poles"] = TensorEdit(torch.full_like(edits["poles"].value, torch.nan))
    return SurgeryPlan(edits, plan.attributes)


BROKEN: dict[str, tuple[dict[str, Callable[..., Any]], str]] = {
    "matches nothing": ({"matches": lambda self, m: False}, "is_recognised"),
    "matches everything": ({"matches": lambda self, m: True}, "is_recognised"),
    "writes another scale": ({"write": _wrong_scale}, "full_order_changes_nothing"),
    "reads another system": (
        {"system": _other_system, "write": _other_system_back},
        "error_stays_below_the_bound",
    ),
    "forgets a tensor": ({"write": _forgets_a_tensor}, "surroundings_survive"),
    "leaves a dead layer": ({"write": _dead_output}, "training_goes_on"),
    "can't be resized": ({"resize_plan": _no_resize}, "checkpoints_load_at_full_size"),
    "replaces by hand": ({"reduction_plan": _replaces_by_hand}, "surroundings_survive"),
    "leaves the optimizer behind": ({"reduction_plan": _replaces_by_hand}, "training_goes_on"),
    "writes NaN": ({"reduction_plan": _stale_poles}, "full_order_changes_nothing"),
    "changes before refusing": ({"reduction_plan": _changes_early}, "training_goes_on"),
}


@pytest.mark.parametrize(("methods", "point"), BROKEN.values(), ids=BROKEN)
def test_a_broken_family_is_caught(methods: dict[str, Callable[..., Any]], point: str):
    broken = register_family(type("Broken", (DecayFamily,), {"name": "Broken", **methods}))
    with pytest.raises(AssertionError, match=rf"Broken breaks \d of 12 points:(.|\n)*- {point}: "):
        check_family(broken)


def _one_head_for_all(self: Any, module: nn.Module, keep: Tensor) -> dict[str, Any]:
    return ZambaFamily.state_entries(self, module, keep[:1].expand(len(keep), -1))


def _other_rates(self: Any, module: nn.Module, keep: Tensor) -> dict[str, Any]:
    """B and C of the states that stay, with the decay rates of the first ones."""
    entries = MambaFamily.state_entries(self, module, keep)
    return entries | {"A_log": (1, torch.arange(keep.shape[1]))}


def _forgets_the_convolution(self: Any, module: nn.Module, keep: Tensor) -> dict[str, Any]:
    entries = Mamba2Family.state_entries(self, module, keep)
    return {name: entry for name, entry in entries.items() if name != "conv1d.bias"}


def _swapped(self: Any, module: nn.Module, inputs: Tensor) -> SelectiveSignals:
    s = MambaFamily.signals(self, module, inputs)
    return SelectiveSignals(s.dt, s.A, s.C, s.B, s.x, s.weight)


def _wrong_sign(self: Any, module: nn.Module, keep: Tensor, delta: Tensor) -> dict[str, Tensor]:
    return ZambaFamily.write_readout(self, module, keep, -delta)


def _needs_no_data(self: Any, module: nn.Module) -> None:
    """Changes the layer before anybody found out that there is no calibration data."""
    with torch.no_grad():
        module.D.mul_(2)


BROKEN_SELECTIVE: dict[str, tuple[type[FamilyBase], dict[str, Callable[..., Any]], str]] = {
    "takes all heads for one": (
        ZambaFamily,
        {"state_entries": _one_head_for_all},
        "states_that_are_not_read_do_not_matter",
    ),
    "mixes up decay rates": (
        MambaFamily,
        {"state_entries": _other_rates},
        "states_that_are_not_read_do_not_matter",
    ),
    "forgets a bias": (
        Mamba2Family,
        {"state_entries": _forgets_the_convolution},
        "checkpoints_load_at_full_size",
    ),
    "swaps B and C": (
        MambaFamily,
        {"signals": _swapped},
        "states_that_are_not_read_do_not_matter",
    ),
    "mixes up its signals": (
        MambaFamily,
        {"state_entries": _other_rates},
        "signals_follow_the_states",
    ),
    "refits the wrong way": (ZambaFamily, {"write_readout": _wrong_sign}, "the_refit_helps"),
    "changes before refusing": (
        MambaFamily,
        {"check_finite": _needs_no_data},
        "refusals_change_nothing",
    ),
    "matches nothing": (MambaFamily, {"matches": lambda self, m: False}, "is_recognised"),
}


@pytest.mark.parametrize(
    ("base", "methods", "point"), BROKEN_SELECTIVE.values(), ids=BROKEN_SELECTIVE
)
def test_a_broken_selective_family_is_caught(
    base: type[FamilyBase], methods: dict[str, Callable[..., Any]], point: str
):
    broken = register_family(type("Broken", (base,), {"name": "Broken", **methods}))
    with pytest.raises(AssertionError, match=rf"Broken breaks \d of 12 points:(.|\n)*- {point}: "):
        check_family(broken)


def test_a_selective_family_that_does_not_say_what_makes_c_is_told_so():
    class Silent(MambaFamily):
        name = "Silent"
        readout_entries = SelectiveFamily.readout_entries

    register_family(Silent)
    with pytest.raises(NotImplementedError, match="does not say what makes its C zero"):
        CONTRACT["states_that_are_not_read_do_not_matter"](Silent())


def test_refusing_late_is_caught():
    class Late(DecayFamily):
        name = "Late"

        def system(self, module: nn.Module) -> DiagonalLTI:
            with torch.no_grad():
                module.enter.mul_(2)
            return super().system(module)

    register_family(Late)
    with pytest.raises(AssertionError, match="only after the layer was changed"):
        CONTRACT["refusals_change_nothing"](Late())


def test_a_wrong_step_is_caught(monkeypatch: pytest.MonkeyPatch):
    register_family(DecayFamily)
    zeros = lambda self, batch: torch.zeros(batch, self.state_dim, dtype=torch.complex128)  # noqa: E731
    step = lambda self, x, state: (x, state)  # noqa: E731
    monkeypatch.setattr(Decay, "initial_state", zeros, raising=False)
    monkeypatch.setattr(Decay, "step", step, raising=False)
    with pytest.raises(AssertionError, match="differs from the parallel form"):
        CONTRACT["step_follows"](DecayFamily())


def test_an_unregistered_family_is_told_to_register():
    with pytest.raises(AssertionError, match="@register_family"):
        CONTRACT["is_recognised"](DecayFamily())
