import pytest
import torch
from hypothesis import given

from lightning_compressm.control import DiagonalLTI
from lightning_compressm.errors import CompreSSMError, NonFiniteError, UnstableSystemError
from tests.control.systems import FREQUENCIES, quick, random_system, systems


def simulate(system: DiagonalLTI, inputs: torch.Tensor) -> torch.Tensor:
    full = system.double()
    state = torch.zeros(system.order, dtype=torch.complex128)
    outputs = []
    for u in inputs.to(torch.complex128):
        state = full.eigenvalues * state + full.B @ u
        outputs.append(full.C @ state)
    y = torch.stack(outputs)
    return y.real if system.real_output else y


@pytest.mark.parametrize("real_output", [True, False])
def test_impulse_response_is_the_simulated_one(real_output):
    system = random_system(4, 2, 3, real_output=real_output)
    impulse = torch.zeros(9, 2, dtype=torch.float64)
    impulse[0, 1] = 1
    torch.testing.assert_close(simulate(system, impulse), system.impulse_response(9)[..., 1])


@pytest.mark.parametrize("real_output", [True, False])
def test_frequency_response_is_the_transform_of_the_impulse_response(real_output):
    system = random_system(4, 2, 3, real_output=real_output, radii=(0.3, 0.8), batch=(2,))
    length = 300
    omega = 2 * torch.pi * torch.arange(length, dtype=torch.float64) / length
    expected = torch.fft.fft(system.impulse_response(length), dim=-3)
    torch.testing.assert_close(
        system.frequency_response(omega), expected.to(torch.complex128), rtol=1e-10, atol=1e-10
    )


def test_real_form_is_the_same_map():
    system = random_system(3, 2, 2)
    a, b, c = system.to_real()
    powers = [c @ torch.linalg.matrix_power(a, t) @ b for t in range(6)]
    torch.testing.assert_close(torch.stack(powers), system.impulse_response(6))


@quick
@given(systems())
def test_folding_keeps_the_map(system):
    folded = system.folded()
    assert bool((folded.eigenvalues.imag >= 0).all())
    torch.testing.assert_close(
        folded.frequency_response(FREQUENCIES), system.frequency_response(FREQUENCIES)
    )


def test_zero_eigenvalue_has_a_finite_response():
    one = torch.ones(1, 1)
    response = DiagonalLTI(torch.zeros(1), one, one).impulse_response(3)
    assert response.flatten().tolist() == [1, 0, 0]


@pytest.mark.parametrize(
    ("eigenvalues", "b", "c"),
    [
        ((3,), (2, 1), (1, 3)),
        ((3,), (3, 1), (1, 2)),
        ((2, 3), (3, 1), (1, 3)),
        ((2, 3), (2, 3, 1), (1, 3)),
        ((), (1, 1), (1, 1)),
        ((0,), (0, 1), (1, 0)),
        ((0, 2), (0, 2, 1), (0, 1, 2)),
        ((2,), (2, 0), (1, 2)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(eigenvalues, b, c):
    with pytest.raises(ValueError, match=r"expected eigenvalues of shape \(\.\.\., N\)"):
        DiagonalLTI(torch.zeros(eigenvalues), torch.zeros(b), torch.zeros(c))


@pytest.mark.parametrize("name", ["eigenvalues", "B", "C"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_check_names_what_is_not_finite(name, value):
    parts = {"eigenvalues": torch.zeros(2), "B": torch.ones(2, 1), "C": torch.ones(1, 2)}
    parts[name].view(-1)[0] = value
    with pytest.raises(NonFiniteError, match=f"expected finite {name}, got 1 NaN"):
        DiagonalLTI(**parts).check()


def test_check_counts_unstable_eigenvalues():
    system = random_system(4, 1, 1)
    system.eigenvalues[:2] = torch.tensor([1.25, -1.0])
    with pytest.raises(UnstableSystemError, match=r"got 2 of 4 .*largest 1\.25") as caught:
        system.check()
    assert isinstance(caught.value, CompreSSMError)


def test_check_returns_a_stable_system():
    system = random_system(2, 1, 1, radii=(1 - 1e-12, 1 - 1e-12))
    assert system.check() is system


def test_complex_outputs_have_no_real_form():
    system = random_system(2, 1, 1, real_output=False)
    with pytest.raises(ValueError, match="balance='complex'"):
        system.folded()
    with pytest.raises(ValueError, match="balance='complex'"):
        system.to_real()


def test_impulse_response_needs_a_length():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        random_system(1, 1, 1).impulse_response(0)
