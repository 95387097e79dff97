"""S5's own: how it starts."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_compressm.nn import S5
from lightning_compressm.nn._hippo import hippo_normal


def test_starts_as_a_real_hippo_system():
    """At the start the layer is x' = A x + B u, y = C x with A real and normal, B and C real."""
    layer = S5(3, 4, dt_min=0.01, dt_max=0.01, dtype=torch.float64)
    _, vectors = hippo_normal(4)
    basis = torch.cat((vectors, vectors.conj()), 1)
    poles = torch.complex(-layer.log_Lambda_re.exp(), layer.Lambda_im).detach()
    A = basis @ torch.diag(torch.cat((poles, poles.conj()))) @ basis.mH
    rows = torch.complex(layer.B_re, layer.B_im).detach()
    columns = torch.complex(layer.C_re, layer.C_im).detach()
    B = basis @ torch.cat((rows, rows.conj()))
    C = torch.cat((columns, columns.conj()), 1) @ basis.mH
    for matrix in (A, B, C):
        assert matrix.imag.abs().max() < 1e-10
    transition = torch.linalg.matrix_exp(0.01 * A.real)
    drive = torch.linalg.solve(A.real, (transition - torch.eye(8)) @ B.real)
    inputs = torch.randn(1, 30, 3, dtype=torch.float64)
    state, outputs = torch.zeros(8, dtype=torch.float64), []
    for u in inputs[0]:
        state = transition @ state + drive @ u
        outputs.append(C.real @ state + layer.D * u)
    torch.testing.assert_close(layer(inputs)[0], torch.stack(outputs), rtol=1e-9, atol=1e-10)


def test_variances_at_the_start():
    torch.manual_seed(0)
    layer = S5(64, 200, dtype=torch.float64)
    B, C = torch.complex(layer.B_re, layer.B_im), torch.complex(layer.C_re, layer.C_im)
    # Unitary coordinates leave variances 1/H and 1/(2N) as they are.
    assert B.abs().square().mean().item() == pytest.approx(1 / 64, rel=0.05)
    assert C.abs().square().mean().item() == pytest.approx(1 / 400, rel=0.05)
    assert layer.D.var().item() == pytest.approx(1.0, rel=0.5)


def test_blocks_repeat_a_smaller_hippo():
    layer = S5(2, 6, blocks=3, dtype=torch.float64)
    torch.testing.assert_close(layer.Lambda_im.detach(), hippo_normal(2)[0].repeat(3))
    torch.testing.assert_close(layer.log_Lambda_re.exp().detach(), torch.full((6,), 0.5).double())


def test_channels_mix():
    layer, inputs = S5(3, 4), torch.randn(1, 20, 3)
    other = inputs.clone()
    other[..., 1] = 0
    assert (layer(inputs) - layer(other)).abs().amax((0, 1)).min() > 1e-4


def test_the_normal_part_of_hippo():
    """HiPPO-LegS as published, plus a rank-one term, has these eigenvectors and eigenvalues."""
    states = 5
    legs = torch.zeros(2 * states, 2 * states, dtype=torch.float64)
    for n in range(2 * states):
        for k in range(n):
            legs[n, k] = -math.sqrt((2 * n + 1) * (2 * k + 1))
        legs[n, n] = -(n + 1)
    p = torch.sqrt(torch.arange(2 * states, dtype=torch.float64) + 0.5)
    normal = (legs + torch.outer(p, p)).to(torch.complex128)
    frequencies, vectors = hippo_normal(states)
    eigenvalues = torch.complex(torch.full_like(frequencies, -0.5), frequencies)
    assert (frequencies > 0).all()
    torch.testing.assert_close(normal @ vectors, vectors * eigenvalues, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(vectors.mH @ vectors, torch.eye(states, dtype=torch.complex128))
    assert (vectors[0].real > 0).all()
    assert vectors[0].imag.abs().max() < 1e-15
