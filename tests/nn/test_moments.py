"""Second moments of states, against a loop over time and against the Gramians of white noise."""

import pytest
import torch

from lightning_compressm.control import real_gramians
from lightning_compressm.nn import moments
from lightning_compressm.nn.moments import state_moments
from tests.control.systems import random_system


def looped(eigenvalues, weight, signals, *, reverse=False):
    """One step after the other, in double precision."""
    steps = signals.to(torch.complex128).unbind(1)
    state, total = 0, 0
    for v in reversed(steps) if reverse else steps:
        driven = v @ weight.mT if eigenvalues.ndim == 1 else v.unsqueeze(-1) * weight[..., 0]
        state = eigenvalues * state + driven
        z = torch.cat((state.real, state.imag), -1)
        total = total + (z.unsqueeze(-1) * z.unsqueeze(-2)).sum(0)
    return total


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("block", [1, 3000, 1 << 25])
def test_moments_are_those_of_a_loop(reverse, batch, block, monkeypatch):
    """Whether blocks are single steps, parts of sequences, or all of them."""
    monkeypatch.setattr(moments, "_BLOCK_BYTES", block)
    system = random_system(5, 1 if batch else 3, 1, radii=(0.5, 0.999), batch=batch)
    signals = torch.randn(4, 37, 3, dtype=torch.float64)
    found = state_moments(system.eigenvalues, system.B, signals, reverse=reverse)
    expected = looped(system.eigenvalues, system.B, signals, reverse=reverse)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_single_precision_adds_up_in_double(dtype):
    system = random_system(6, 3, 1, radii=(0.9, 0.999))
    signals = torch.randn(2, 500, 3).to(dtype)
    with torch.autocast("cpu"):
        found = state_moments(system.eigenvalues, system.B, signals)
    assert found.dtype == torch.float64
    expected = looped(system.eigenvalues, system.B, signals)
    assert float((found - expected).norm() / expected.norm()) < 1e-5


def test_white_noise_gives_the_gramian():
    system = random_system(4, 2, 1, radii=(0.5, 0.9))
    signals = torch.randn(200, 400, 2, dtype=torch.float64)
    found = state_moments(system.eigenvalues, system.B, signals) / (200 * 400)
    expected, _ = real_gramians(system)
    assert float((found - expected).norm() / expected.norm()) < 0.03


def test_white_noise_gives_the_time_limited_gramian():
    """The last of T steps alone has the Gramian of the horizon T."""
    system = random_system(4, 2, 1, radii=(0.9, 0.99))
    signals = torch.randn(40_000, 5, 2, dtype=torch.float64)
    all_steps, but_last = (
        state_moments(system.eigenvalues, system.B, part) for part in (signals, signals[:, :-1])
    )
    expected, _ = real_gramians(system, horizon=5)
    found = (all_steps - but_last) / 40_000
    assert float((found - expected).norm() / expected.norm()) < 0.03


@pytest.mark.parametrize("shape", [(2, 5, 4), (2, 3), (0, 5, 3)])
def test_other_shapes_are_refused(shape):
    system = random_system(4, 3, 1)
    with pytest.raises(ValueError, match="expected eigenvalues"):
        state_moments(system.eigenvalues, system.B, torch.zeros(shape))
