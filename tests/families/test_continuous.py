"""From discrete eigenvalues back to continuous time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_compressm.errors import UnstableSystemError
from lightning_compressm.families._continuous import to_continuous, to_discrete
from lightning_compressm.families.s4d import S4DFamily
from lightning_compressm.families.s5 import S5Family
from lightning_compressm.nn import S4D, S5

METHODS = ["zoh", "bilinear"]
AWKWARD = {
    "negative real": torch.tensor([-0.7, -1e-3, -0.999999], dtype=torch.complex128),
    "positive real": torch.tensor([0.7, 1e-3, 0.999999], dtype=torch.complex128),
    "just below the negative axis": torch.tensor([-0.5 - 1e-13j]),
    "signed zero": torch.complex(torch.tensor([-0.5]).double(), torch.tensor([-0.0]).double()),
    "imaginary": torch.tensor([0.5j, -0.5j]),
    "tiny": torch.tensor([1e-9 + 1e-10j]),
    "next to the circle": torch.polar(
        torch.full((5,), 1 - 1e-10, dtype=torch.float64),
        torch.tensor([0.0, 1e-6, 1.0, 3.0, math.pi], dtype=torch.float64),
    ),
}


def _random(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    radius, angle = torch.rand(2, count, dtype=torch.float64, generator=generator)
    return torch.polar(radius.sqrt(), (2 * angle - 1) * math.pi)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("eigenvalues", [*AWKWARD.values(), _random(500)], ids=[*AWKWARD, "random"])
def test_there_and_back(eigenvalues: Tensor, method: str):
    eigenvalues = eigenvalues.to(torch.complex128)
    for step in (1e-3, 0.05, 2.0):
        dt = torch.tensor(step, dtype=torch.float64)
        poles, gain = to_continuous(eigenvalues, dt, method)
        assert (poles.real < 0).all()
        again, same_gain = to_discrete(poles, dt, method)
        torch.testing.assert_close(again, eigenvalues, rtol=1e-10, atol=1e-12)
        assert torch.equal(gain, same_gain)
        assert gain.abs().min() > 0


@pytest.mark.parametrize("method", METHODS)
def test_zero_and_the_circle_stay_finite(method: str):
    eigenvalues = torch.tensor([0.0, 1.0, -1.0, 1j], dtype=torch.complex128)
    poles, gain = to_continuous(eigenvalues, torch.tensor(0.1, dtype=torch.float64), method)
    for tensor in (poles, torch.log(-poles.real), 1 / gain):
        assert torch.isfinite(torch.view_as_real(tensor + 0j)).all()
    assert (poles.real < 0).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("make", [S4D, S5])
def test_a_state_without_decay_is_refused(make: type[S4D | S5], method: str):
    """Its radius is one, whatever rounding makes of its phase."""
    layer = make(2, 6, discretization=method, dtype=torch.float64)
    family = S4DFamily() if isinstance(layer, S4D) else S5Family()
    decay = layer.log_A_real if isinstance(layer, S4D) else layer.log_Lambda_re
    family.system(layer).check()
    with torch.no_grad():
        decay.view(-1)[:3] = -80.0
    with pytest.raises(UnstableSystemError, match="modulus 1"):
        family.system(layer).check()
    with torch.no_grad():
        decay.view(-1)[:3] = -30.0  # radii that are all but one
    near = family.system(layer).eigenvalues
    with torch.no_grad():
        decay.view(-1)[:3] = -80.0
    on_circle = family.system(layer).check(horizon=100).eigenvalues
    torch.testing.assert_close(on_circle, near, rtol=1e-10, atol=1e-10)
