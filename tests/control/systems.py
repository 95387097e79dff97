"""Random systems, conjugations of their states, and Hypothesis strategies for both."""

from dataclasses import replace

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_compressm.control import DiagonalLTI, Reduction

# The same examples in every run: a failure is a change of the code.
quick = settings(
    deadline=None,
    max_examples=25,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
FREQUENCIES = torch.linspace(-torch.pi, torch.pi, 301, dtype=torch.float64)
BALANCES = ("real", "folded", "complex")


def random_system(
    n: int,
    inputs: int,
    outputs: int,
    *,
    seed: int = 0,
    radii: tuple[float, float] = (0.5, 0.95),
    batch: tuple[int, ...] = (),
    real_output: bool = True,
    dtype: torch.dtype = torch.complex128,
) -> DiagonalLTI:
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> Tensor:
        unit = torch.rand(*batch, n, generator=generator, dtype=torch.float64)
        return unit * (high - low) + low

    def normal(*shape: int) -> Tensor:
        return torch.randn(*batch, *shape, generator=generator, dtype=torch.complex128)

    eigenvalues = torch.polar(uniform(*radii), uniform(-3.1, 3.1))
    b, c = normal(n, inputs), normal(outputs, n)
    return DiagonalLTI(eigenvalues.to(dtype), b.to(dtype), c.to(dtype), real_output)


@st.composite
def systems(
    draw: st.DrawFn, *, max_order: int = 8, min_ports: int = 1, max_radius: float = 0.98
) -> DiagonalLTI:
    """Order, ports, radii and dtype vary; the entries come from a drawn seed."""
    low = draw(st.floats(0.0, max_radius))
    return random_system(
        draw(st.integers(1, max_order)),
        draw(st.integers(min_ports, 4)),
        draw(st.integers(min_ports, 4)),
        seed=draw(st.integers(0, 10_000)),
        radii=(low, draw(st.floats(low, max_radius))),
        dtype=draw(st.sampled_from([torch.complex64, torch.complex128])),
    )


def conjugate(system: DiagonalLTI, mask: Tensor) -> DiagonalLTI:
    """The same real map with some states stored conjugated."""
    return replace(
        system,
        eigenvalues=torch.where(mask, system.eigenvalues.conj(), system.eigenvalues),
        B=torch.where(mask.unsqueeze(-1), system.B.conj(), system.B),
        C=torch.where(mask, system.C.conj(), system.C),
    )


def hinf_error(system: DiagonalLTI, reduced: DiagonalLTI) -> Tensor:
    """Largest singular value of the difference of the transfer functions on a grid."""
    error = system.frequency_response(FREQUENCIES) - reduced.frequency_response(FREQUENCIES)
    return torch.linalg.matrix_norm(error, 2).amax(-1)


def relative_impulse_error(system: DiagonalLTI, reduced: DiagonalLTI, length: int = 60) -> float:
    expected = system.impulse_response(length)
    return float((reduced.impulse_response(length) - expected).norm() / expected.norm())


def rank(reduction: Reduction) -> Tensor:
    """How many states of each reduced system are not padding: an old state has a part in them."""
    return (~reduction.basis.padding()).sum(-1)


def genuine(reduction: Reduction) -> slice:
    """The states of one reduced system that are not padding."""
    return slice(0, int(rank(reduction)))
